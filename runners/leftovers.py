"""What killed processes would leave behind: those they had started, vLLM's shared memory, temporary files.

Linux only, as vLLM is: processes are found in /proc, and who comes after whom is told by `adopt_orphans`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection
from multiprocessing import process, shared_memory
from pathlib import Path

SEGMENTS = Path("/dev/shm")
"""Where POSIX shared memory lives on Linux."""
PATIENCE = 2.0
"""Seconds that multiprocessing's resource trackers have to unlink what dead processes had shared."""
_MEMORY, _SEMAPHORE = "psm_", "mp-"
"""What multiprocessing begins names with."""
_RANDOM = 16
"""Characters that it adds to the name of shared memory."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the one that started it dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Let whatever descends from this process stay its descendant, even a daemon in a session of its own."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end(find: Callable[[], Collection[int]]) -> None:
    """Kill what `find` finds until it finds nothing, but let resource trackers finish their work first.

    A tracker unlinks the shared memory and semaphores of processes that can no longer do so themselves.
    """
    patient = time.monotonic() + PATIENCE
    while (found := find()) and time.monotonic() < patient + PATIENCE:
        for pid in found:
            if time.monotonic() > patient or not _is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def group(leader: int) -> set[int]:
    """The living processes of a process group."""
    return {pid for pid, (_, own) in _processes().items() if own == leader}


def descendants(root: int, spared: Collection[int] = ()) -> set[int]:
    """The living processes that `root` has started, and those these have; but for `spared`, and what they have."""
    parents = {pid: parent for pid, (parent, _) in _processes().items() if pid not in spared}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def reap(spared: Collection[int]) -> None:
    """Forget the dead children of this process, but for those somebody else waits for."""
    me = os.getpid()
    for pid, (parent, _) in _processes(dead=True).items():
        if parent == me and pid not in spared:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def name_shared(directory: Path) -> None:
    """Let what this process shares by multiprocessing, memory and semaphores, have a name that tells whose it is.

    Args:
        directory: of the host's temporary files, in that of its pool.
    """
    whose = f"{directory.parent.name}-{directory.name}"
    prefix = f"/{_MEMORY}{whose}_"
    vars(shared_memory).update(_SHM_NAME_PREFIX=prefix, _SHM_SAFE_NAME_LENGTH=len(prefix) + _RANDOM)
    vars(process.current_process())["_config"]["semprefix"] = f"/{_SEMAPHORE}{whose}"


def remove(directory: Path) -> None:
    """Remove a host's temporary directory, or its pool's, and the shared memory of the processes it belonged to.

    Their resource tracker does that too, unless it was killed with them. Of vLLM's communicators no tracker knows: they
    are named after the rendezvous file, and vLLM itself unlinks them only when it ends in peace.
    """
    of_host = directory.name.isdigit()
    whose = f"{directory.parent.name}-{directory.name}[-_]*" if of_host else f"{directory.name}-*"
    patterns = [f"{kind}{whose}" for kind in (_MEMORY, f"sem.{_SEMAPHORE}")]
    patterns += [f"{rendezvous.name}*" for rendezvous in directory.glob("**/vllm_dist_*")]
    for segment in (found for pattern in patterns for found in SEGMENTS.glob(pattern)):
        with contextlib.suppress(OSError):
            segment.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _processes(dead: bool = False) -> dict[int, tuple[int, int]]:
    """(parent, process group) of everything that lives, or that is dead and not yet reaped."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # After the command in brackets, which may hold anything.
            state, parent, own, *_ = stat.read_text(errors="replace").rpartition(")")[2].split()
            if (state in "ZX") == dead:
                found[int(stat.parent.name)] = int(parent), int(own)
    return found


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
