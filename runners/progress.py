"""Whether a host that is late was at work, on a machine too slow for its deadline, or would never have ended.

The first is the machine's fault, the second the model's. A host is looked at several times in the second half of its
deadline: the time on the CPU that each of its processes has used, and where each one is. What uses none and is always
in the same place waits for ever; what uses some, and all the while is in one and the same call of the model's, loops
for ever. Everything else gets on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from genmodel.runners.leftovers import group
from genmodel.runners.protocol import NOT_THE_AUTHORS

LOOKS = (0.5, 0.62, 0.74, 0.86)
"""When a host is looked at, as shares of its deadline, before the look at its end."""
IDLE = 0.05
"""Share of a core that a process that only waits may use, most of it for being looked at."""
CLEAR = 0.4, 0.02
"""Seconds on the CPU, and share of a core, that tell a loop from a process that hardly gets to run."""
CALLS = ".calls"
"""How the file of a process ends in which it counts calls."""
_TICKS = os.sysconf("SC_CLK_TCK")
_FRAME = re.compile(r'  File "([^"]*)", line (\d+) in (.*)')
_OUTERMOST = re.compile(r"^Current thread.*^  (File .* in <module>|\.\.\.)$", re.DOTALL | re.MULTILINE)
"""The main thread's stack, which faulthandler writes last, down to its last frame or the longest stack it writes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One process at one look."""

    used: float
    """Seconds on the CPU since it began."""
    wants: bool
    """Whether it runs, or would if it had a core, or waits for a disk."""
    place: tuple[str, ...]
    """Its main thread's calls, the innermost of the author's first: the line of each, but of the first its function."""
    in_model: bool
    """Whether any of these is the author's."""
    calls: int
    """How often it was found in another call than at the look before; this look does not count yet."""


@dataclass(frozen=True, slots=True)
class Look:
    """A host and what it has started at one moment, by process id."""

    at: float
    """Seconds, by time.monotonic."""
    seen: Mapping[int, Seen]


def look(leader: int, directory: Path, at: float, stacks: Callable[[], Mapping[int, str]]) -> Look:
    """Look at a host's process group.

    Args:
        leader: the host's process id.
        directory: where processes count their calls.
        at: when, by time.monotonic.
        stacks: asks processes for what faulthandler writes, by their id.
    """
    states = {}
    for pid in group(leader):
        # Before they are asked, which takes the CPU.
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            states[pid] = *_state(pid), _count(directory / f"{pid}{CALLS}")
    texts = stacks()
    return Look(
        at,
        {pid: Seen(used, wants, *_place(texts.get(pid, "")), calls) for pid, (used, wants, calls) in states.items()},
    )


def stuck(leader: int, looks: Sequence[Look]) -> bool:
    """Whether a host that was late would never have ended, for what it is in."""
    first, last = looks[0], looks[-1]
    seconds = last.at - first.at
    if not last.seen.keys() <= first.seen.keys() or leader not in last.seen:
        return False  # it has started something since
    used = {pid: seen.used - first.seen[pid].used for pid, seen in last.seen.items()}
    at_work = [
        pid
        for pid in last.seen
        if used[pid] > IDLE * seconds
        or 2 * sum(each.seen[pid].wants for each in looks if pid in each.seen) > len(looks)
    ]
    if not at_work:
        return _same_place(leader, looks)
    clear = max(CLEAR[0], CLEAR[1] * seconds)
    loops = {pid: used[pid] >= clear and _same_place(pid, looks) and not _called_anew(pid, looks) for pid in at_work}
    in_model = [loops[pid] for pid in at_work if last.seen[pid].in_model]
    return any(in_model) if in_model else all(loops.values())


def share(looks: Sequence[Look]) -> float:
    """How many cores a host had the use of, while it was looked at."""
    first, last = looks[0], looks[-1]
    used = sum(seen.used - (first.seen[pid].used if pid in first.seen else 0.0) for pid, seen in last.seen.items())
    return used / max(last.at - first.at, 1e-9)


def written(read: Callable[[], str], until: float) -> str:
    """What faulthandler writes when it is asked, once that is whole.

    It writes one frame at a time. Part of a stack would look like another place.

    Args:
        read: reads what has been written so far.
        until: seconds, by time.monotonic, after which a part must do.
    """
    found = read()
    while True:
        time.sleep(0.02)
        before, found = found, read()
        if (found == before and _OUTERMOST.search(found)) or time.monotonic() > until:
            return found


def takes_signal(pid: int) -> bool:
    """Whether a process has a handler for the signal that asks for its stacks, which else might end it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def is_authors(file: str) -> bool:
    """Whether a frame's file is the model's author's, not the harness's, a library's, or made up."""
    return not file.startswith(("<", *NOT_THE_AUTHORS))


class Calls:
    """A process's handler of the signal: notes when it finds another call running than when it was asked before.

    Lines alone do not tell a loop that never ends from a function that is called again and again.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{os.getpid()}{CALLS}"
        self._last: FrameType | None = None

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        """Find the innermost call of the author's."""
        found = frame
        while found is not None and not is_authors(found.f_code.co_filename):
            found = found.f_back
        found = found or frame
        if found is not self._last:
            with contextlib.suppress(OSError), self._path.open("ab") as file:
                file.write(b".")
        self._last = found

    def forget(self) -> None:
        """Let go of the call, which holds what is in its variables."""
        self._last = None


def _state(pid: int) -> tuple[float, bool]:
    """Seconds on the CPU, and whether it wants more."""
    # After the command in brackets, which may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS, fields[0] in "RD"


def _place(stack: str) -> tuple[tuple[str, ...], bool]:
    """Where the main thread is, and whether that is in the model's code."""
    # The main thread's comes last.
    calls = [match.groups() for match in map(_FRAME.match, stack.rpartition("Current thread")[2].splitlines()) if match]
    innermost = next((i for i, (file, *_) in enumerate(calls) if is_authors(file)), None)
    place = tuple(f"{file}:{line}" for file, line, _ in calls[innermost or 0 :])
    if innermost is None:
        return place, False
    file, _, function = calls[innermost]
    return (f"{file}:{function}", *place[1:]), True


def _same_place(pid: int, looks: Sequence[Look]) -> bool:
    return len({each.seen[pid].place for each in looks if pid in each.seen}) == 1


def _called_anew(pid: int, looks: Sequence[Look]) -> bool:
    """Whether it is in other calls at some looks, though they may be of the same functions."""
    counts = [each.seen[pid].calls for each in looks if pid in each.seen]
    return counts[-1] - counts[0] > 1  # the first look finds a call that none was compared with


def _count(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
