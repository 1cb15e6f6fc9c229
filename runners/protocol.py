"""What the pool and its hosts say to each other."""

from __future__ import annotations

import errno
import os
import sysconfig
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genmodel
from genmodel.runners.evidence import Failure, FailureKind

NOT_THE_AUTHORS = (
    *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(genmodel.__file__).parent / "runners"),
    str(Path(genmodel.__file__).parent / "modeling"),
    "<frozen",
)
"""Where a frame says nothing to the author of a model: the standard library, installed packages, the harness."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ROOM_SAID = os.strerror(errno.ENOSPC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing for a host to do; `name` is a function of `genmodel.runners.commands`."""

    name: str
    scenario: str
    process: str
    """Which process it runs in: a host runs commands of one name only, and the next name gets a fresh one."""
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One target as every host is told of it."""

    arch: str
    spec: str
    pickled: bytes | None
    """The target by value (cloudpickle), if it has no importable name."""
    directory: str
    """Checkpoint directory; rank 0 fills it."""
    dtype: str
    seed: int
    reference: str | None
    names: str | Mapping[str, Any] | None = None
    """What translates the reference's parameter names, as `TargetOptions.names`."""
    address: str = "127.0.0.1"
    """Where the ranks of an engine meet."""

    @property
    def architecture(self) -> str | None:
        """vLLM's name of the target if it is one of vLLM's own models, else None."""
        return self.spec if self.pickled is None and ":" not in self.spec else None


class Unusable(Exception):
    """Raised by a command for a user's mistake; the message is one line."""


def describe_failure(error: BaseException, scenario: str, rank: int, phase: str) -> Failure:
    """One line, and the traceback trimmed to frames outside torch, vLLM and the harness where there are any."""
    if no_room(error):
        error = Unusable(f"no space left on the device of {tempfile.gettempdir()}: free some, or set TMPDIR")
    kind: FailureKind = "unusable" if isinstance(error, Unusable) else "raised"
    root = error
    while root.__cause__ is not None and not _speaks_for_itself(root):
        root = root.__cause__
    name = "" if _speaks_for_itself(root) else f"{type(root).__name__}: "
    message = f"{name}{root}".strip().removesuffix(":").splitlines()
    frames = traceback.extract_tb(root.__traceback__)
    shown = [f for f in frames if not f.filename.startswith(NOT_THE_AUTHORS)] or frames[-3:]
    details = "".join(traceback.format_list(shown)) + "".join(traceback.format_exception_only(root))
    return Failure(
        kind=kind,
        scenario=scenario,
        rank=rank,
        phase=phase,
        message=message[0] if message else type(root).__name__,
        details="" if _speaks_for_itself(root) else details,
    )


def no_room(error: BaseException | None) -> bool:
    """Whether a full disk is what it comes from, be it told by Python or by a library's own exception."""
    while error is not None:
        if getattr(error, "errno", None) in _NO_ROOM or _NO_ROOM_SAID in str(error):
            return True
        error = error.__cause__
    return False


def _speaks_for_itself(error: BaseException) -> bool:
    """Whether the message was written for people, so that the exception's class adds nothing."""
    return isinstance(error, Unusable) or type(error).__name__ in ("InterfaceError", "LoadError")
