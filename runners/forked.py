"""Processes forked from the fork server: hosts, and those a default engine starts.

The fork server has imported torch and vLLM and run nothing, so what is forked from it is what a fresh
interpreter would be after its imports. A default `LLM()` with two workers starts three processes; importing
in each would cost more than everything else the deployed scenario does.

Light to import: the launcher does, which needs none of torch and vLLM.
"""

from __future__ import annotations

import ctypes
import multiprocessing.process
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.popen_forkserver import Popen as _ForkServerPopen
from multiprocessing.reduction import DupFd
from typing import Any


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it dies, however it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(connection: Connection, settings: dict[str, Any]) -> None:
    """Be a host: `settings` are its rank, environment, working directory, sys.path and log file."""
    os.setpgid(0, 0)  # so that it and all it starts can be killed together
    die_with_parent()
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


def fork_instead_of_spawn() -> None:
    """Let multiprocessing's "spawn" context, here and in what is forked from here, fork from the fork server."""
    SpawnProcess._Popen = staticmethod(_from_fork_server)  # type: ignore[method-assign, assignment] # noqa: SLF001
    # Else multiprocessing starts another fork server for what a forked process starts.
    server = forkserver._forkserver  # noqa: SLF001
    server.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]


def _from_fork_server(process: SpawnProcess) -> _ForkServerPopen:
    process.__class__ = ForkedProcess
    return _ForkServerPopen(process)


class ForkedProcess(SpawnProcess):
    """Has what a spawned process has of its parent: environment, working directory, output and process group."""

    _start_method = "forkserver"

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
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
        die_with_parent()
        for number, duplicate in enumerate(inherited["output"], 1):
            descriptor = duplicate.detach()
            os.dup2(descriptor, number)
            os.close(descriptor)
        _replace_environment(inherited["environment"])
        super().run()


def _replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # The OpenMP runtime has read OMP_NUM_THREADS already, when the fork server loaded it.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules and threads.isdecimal():
        sys.modules["torch"].set_num_threads(int(threads))
