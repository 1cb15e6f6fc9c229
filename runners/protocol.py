"""What the pool and its hosts say to each other."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import genmodel
from genmodel.runners.evidence import Failure, FailureKind

_NOT_THE_AUTHORS = (
    *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(genmodel.__file__).parent / "runners"),
    str(Path(genmodel.__file__).parent / "modeling"),
    "<frozen",
)
"""Where a frame says nothing to the author of a model: the standard library, installed packages, the harness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing for a host to do; `name` is a function of `genmodel.runners.commands`."""

    name: str
    scenario: str
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
    kind: FailureKind = "unusable" if isinstance(error, Unusable) else "raised"
    root = error
    while root.__cause__ is not None and not _speaks_for_itself(root):
        root = root.__cause__
    name = "" if _speaks_for_itself(root) else f"{type(root).__name__}: "
    message = f"{name}{root}".strip().splitlines()
    frames = traceback.extract_tb(root.__traceback__)
    shown = [f for f in frames if not f.filename.startswith(_NOT_THE_AUTHORS)] or frames[-3:]
    details = "".join(traceback.format_list(shown)) + "".join(traceback.format_exception_only(root))
    return Failure(
        kind=kind,
        scenario=scenario,
        rank=rank,
        phase=phase,
        message=message[0] if message else type(root).__name__,
        details="" if _speaks_for_itself(root) else details,
    )


def _speaks_for_itself(error: BaseException) -> bool:
    """Whether the message was written for people, so that the exception's class adds nothing."""
    return isinstance(error, Unusable) or type(error).__name__ in ("InterfaceError", "LoadError")
