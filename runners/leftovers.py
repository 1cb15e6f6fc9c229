"""What killed processes would leave behind: their children, and vLLM's shared memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

SEGMENTS = Path("/dev/shm")
"""Where POSIX shared memory lives on Linux."""
PATIENCE = 2.0
"""Seconds that multiprocessing's resource trackers have to unlink what dead processes had shared."""


def end_group(leader: int) -> None:
    """Kill every process of a process group, but let its resource trackers finish their work first.

    A tracker unlinks the shared memory and semaphores of a process that can no longer do so itself.
    """
    for pid in _members(leader):
        if b"resource_tracker" not in _command_line(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(_command_line(pid) for pid in _members(leader)) and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def segments() -> frozenset[str]:
    """Names of the shared memory segments there are now."""
    return frozenset(path.name for path in SEGMENTS.iterdir()) if SEGMENTS.is_dir() else frozenset()


def sweep(before: frozenset[str]) -> None:
    """Unlink the segments of vLLM's CPU communicator that are new since `before` and mapped by nobody alive.

    No tracker knows of them, and vLLM itself unlinks them only when it ends in peace.
    """
    new = {name for name in segments() - before if name.startswith("vllm_dist_")}
    for name in new - _mapped() if new else ():
        with contextlib.suppress(OSError):
            (SEGMENTS / name).unlink()


def _members(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # After the command in brackets, which may hold anything: state, parent, process group.
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[2]) == group:
                found.append(int(stat.parent.name))
    return found


def _command_line(pid: int) -> bytes:
    """Empty for a process that is gone, or dead and not yet reaped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _mapped() -> set[str]:
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or is somebody else's
            found.update(re.findall(rf"{SEGMENTS}/([^\s]+)", maps.read_text(errors="replace")))
    return found
