"""Processes forked from the fork server: hosts, and those a default engine starts.

The fork server has imported torch and vLLM and run nothing, so what is forked from it is what a fresh
interpreter would be after its imports. A default `LLM()` with two workers starts three processes; importing
in each would cost more than everything else the deployed scenario does.

Light to import: the launcher does, which needs none of torch and vLLM.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing.process
import os
import select
import signal
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.popen_forkserver import Popen as _ForkServerPopen
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from genmodel.runners import fates
from genmodel.runners.leftovers import adopt_orphans, die_with_parent, name_shared

FIRST_TO_GO = "500"
"""Where memory runs out, the kernel takes hosts before pytest, an editor or a shell, which are at 0 (of 1000)."""
_F_SETSIG = 10
"""Linux's; the fcntl module has no name for it."""
_kept: list[int] = []
"""Ends of pipes by which processes see that this one lives."""


def serve(connection: Connection, settings: dict[str, Any]) -> None:
    """Be a host: `settings` are its rank, environment, working directory, sys.path and log file."""
    os.setpgid(0, 0)  # so that it and all it starts can be killed together
    die_with_parent()
    adopt_orphans()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    _have_own_tracker()
    # To models a host is a main process, as with torchrun: some ask multiprocessing.parent_process().
    vars(multiprocessing.process)["_parent_process"] = None
    log = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _replace_environment(settings["environment"])
    os.chdir(settings["directory"])
    sys.path[:] = settings["path"]

    from genmodel.runners import host

    host.serve(connection, settings["rank"])


def _have_own_tracker() -> None:
    """Let what this process shares be unlinked when it dies, not when the launcher ends."""
    tracker = vars(resource_tracker)["_resource_tracker"]
    inherited, tracker._fd, tracker._pid = tracker._fd, None, None  # noqa: SLF001 - it starts one when it needs one
    os.close(inherited)


def fork_instead_of_spawn() -> None:
    """Let multiprocessing's "spawn" context, here and in what is forked from here, fork from the fork server."""
    SpawnProcess._Popen = staticmethod(_from_fork_server)  # type: ignore[method-assign, assignment] # noqa: SLF001
    fates.write_down_deaths()
    # Else multiprocessing starts another fork server for what a forked process starts.
    server = forkserver._forkserver  # noqa: SLF001
    server.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]


def _from_fork_server(process: SpawnProcess) -> _Popen:
    process.__class__ = ForkedProcess
    starter_lives, ours = os.pipe()
    _kept.append(ours)  # open for as long as this process lives
    process.__dict__["_starter_lives"] = starter_lives
    try:
        return _Popen(process)
    finally:
        os.close(process.__dict__.pop("_starter_lives"))


class _Popen(_ForkServerPopen):
    """Writes down that a process was asked to end: then how it ends tells of no failure."""

    def _send_signal(self, sig: int) -> None:
        if self.poll() is None:  # else it ended by itself, and how it did may be the cause of all else
            fates.ask_to_end(self.pid)
        super()._send_signal(sig)  # type: ignore[misc]


class ForkedProcess(SpawnProcess):
    """Has what a spawned process has of its parent: environment, working directory, output and process group."""

    _start_method = "forkserver"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_starter_lives": DupFd(self.__dict__["_starter_lives"]),
            "_inherited": {
                "environment": dict(os.environ),
                "group": os.getpgrp(),
                "output": [DupFd(1), DupFd(2)],
            },
        }

    def run(self) -> None:
        """The target, as if in a process that this one's parent had spawned."""
        inherited = self.__dict__.pop("_inherited")
        os.setpgid(0, inherited["group"])
        _die_with_starter(self.__dict__.pop("_starter_lives").detach())
        for number, duplicate in enumerate(inherited["output"], 1):
            descriptor = duplicate.detach()
            os.dup2(descriptor, number)
            os.close(descriptor)
        _replace_environment(inherited["environment"])
        with fates.told():
            super().run()


def _die_with_starter(lives: int) -> None:
    """Let the kernel end this process with the one that asked for it, which is not its parent: that is the fork server.

    The starter holds the other end of a pipe, and the signal that the kernel sends at its end can be chosen.

    Args:
        lives: this end, of a pipe that nothing is ever written to. The pipe that multiprocessing sends the process
            through will not do: the kernel also signals what is written, and may do so when that has been read.
    """
    fcntl.fcntl(lives, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lives, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lives, fcntl.F_SETFL, fcntl.fcntl(lives, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lives], [], [], 0)[0]:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the fork server's
    if "TMPDIR" in environment:
        name_shared(Path(environment["TMPDIR"]))
    # The OpenMP runtime has read OMP_NUM_THREADS already, when the fork server loaded it.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))
