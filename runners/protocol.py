"""What the pool and its hosts say to each other."""

from __future__ import annotations

import errno
import os
import re
import signal
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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

LONGEST_LINE = 4_000
LONGEST_TEXT = 100_000
"""Characters that are kept of a text of a model's, by whether it has to be one line."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
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
    root = next((e for e in _causes(error) if _speaks_for_itself(e) or e.__cause__ is None), error)
    name = "" if _speaks_for_itself(root) else f"{type(root).__name__}: "
    message = f"{name}{_said(root)}".strip().removesuffix(":").splitlines()
    frames = traceback.extract_tb(root.__traceback__)
    shown = [f for f in frames if not f.filename.startswith(NOT_THE_AUTHORS)] or frames[-3:]
    details = "".join([*traceback.format_list(shown), *traceback.format_exception_only(root)])
    return printable_failure(
        Failure(
            kind=kind,
            scenario=scenario,
            rank=rank,
            phase=phase,
            message=message[0] if message else type(root).__name__,
            details="" if _speaks_for_itself(root) else details,
        )
    )


def printable(text: str, *, lines: bool = False) -> str:
    """Text that every terminal, file and serialiser takes, whatever a model has put into it.

    A terminal's colours go, and white space other than a space becomes one. What a terminal would obey, such as ESC,
    and what no file can hold, such as half of a surrogate pair, is spelt out. The middle of what is too long goes.

    Args:
        text: any text.
        lines: whether line breaks and tabs may stay; else it becomes one line.
    """
    most, kept = (LONGEST_TEXT, "\n\t") if lines else (LONGEST_LINE, "")
    if len(text) > most:
        text = f"{text[: most // 2]} [... {len(text) - most:,} characters ...] {text[-(most // 2) :]}"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in kept else " " if c.isspace() else ascii(c)[1:-1] for c in _COLOUR.sub("", text)
    )


def printable_failure(failure: Failure) -> Failure:
    """The failure with all its text printable, in one line where that is promised."""
    return replace(
        failure,
        message=printable(failure.message),
        phase=printable(failure.phase),
        details=printable(failure.details, lines=True),
    )


def signal_name(number: int) -> str:
    """What people call a signal; those without a name are the real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"real-time signal {number}" if number >= signal.SIGRTMIN else f"signal {number}"


def no_room(error: BaseException | None) -> bool:
    """Whether a full disk is what it comes from, be it told by Python or by a library's own exception."""
    return error is not None and any(
        getattr(e, "errno", None) in _NO_ROOM or _NO_ROOM_SAID in _said(e) for e in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, its cause, and so on; a model's can go round in circles."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__


def _said(error: BaseException) -> str:
    """An exception's text; a model's own class may not even give that."""
    try:
        return str(error)[: LONGEST_TEXT + 1]
    except BaseException as another:  # noqa: BLE001 - it is the model's code
        return f"(and its text cannot be had: {type(another).__name__})"


def _speaks_for_itself(error: BaseException) -> bool:
    """Whether the message was written for people, so that the exception's class adds nothing."""
    return isinstance(error, Unusable) or type(error).__name__ in ("InterfaceError", "LoadError")
