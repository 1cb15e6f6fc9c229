"""Starts hosts: one process imports torch and vLLM, once, and every host is forked from it.

    pool ──► launcher ──► fork server ──fork──► hosts, and the processes of their default engines

The launcher exists so that multiprocessing's fork server, of which a process has only one, is not that of
pytest's process, whose environment, main module and own use of multiprocessing are the user's. And it is the one
that cleans up: what descends from it stays its descendant, so that nothing a model has started outlives its
host, and when pytest is gone, however it ended, all of it ends with the launcher, which removes what is left.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from multiprocessing import forkserver, reduction, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from genmodel.runners.forked import serve
from genmodel.runners.leftovers import (
    PATIENCE,
    adopt_orphans,
    descendants,
    die_with_parent,
    end,
    group,
    reap,
    remove,
)

FILES = 1024
"""Open files that hosts may have if the hard limit lets them: what most systems allow."""


def safe_path() -> dict[str, str]:
    """This process's path for another, but the standard library first and the current directory nowhere by itself.

    So no select.py or random.py of an author's hides what launchers need.
    """
    library = sysconfig.get_path("stdlib")
    own = (library, f"{library}/lib-dynload")
    folders = sorted(filter(None, sys.path), key=lambda folder: folder not in own)
    return {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}


class HostProcess:
    """A host as its pool sees it, in the manner of subprocess.Popen."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.pid: int | None = None
        """None until it runs, which is after the fork server's imports."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs or is about to."""
        self._launcher.listen(0.0)
        return self.returncode

    def wait(self, seconds: float) -> int | None:
        """`poll` once it has ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and (left := deadline - time.monotonic()) > 0:
            self._launcher.listen(left)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing to a process that does not run."""
        if self.poll() is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Launcher:
    """The pool's end of a launcher process.

    Args:
        environment: of the fork server, while it imports; hosts are told their own.
        directory: of the pool. In it, launcher.log is where the launcher and the fork server write, which do so only
            if something is wrong with them.
        sockets: another, or the same, with a path so short that sockets can be in it. Both are removed when the
            launcher is told to end or pytest is gone.
    """

    def __init__(self, environment: Mapping[str, str], directory: Path, sockets: Path) -> None:
        self._sockets = sockets
        self._serves = False
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self._processes: dict[int, HostProcess] = {}
        self._numbers = itertools.count()
        with (directory / "launcher.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(directory), str(sockets)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that a terminal's signals reach only pytest
                env={
                    **environment,
                    "OMP_NUM_THREADS": "1",  # a process with more threads than one must not fork
                    **safe_path(),
                    "TMPDIR": str(sockets),  # which is where multiprocessing has them
                },
            )
        theirs.close()

    @property
    def alive(self) -> bool:
        """Whether it can start hosts: a model can have removed the socket at which the fork server is asked to."""
        asked_at = self._sockets.glob("pymp-*/listener-*")
        return self._process.poll() is None and (not self._serves or any(asked_at))

    def start(self, host_end: socket.socket, settings: dict[str, Any]) -> HostProcess:
        """Start a host at one end of a socket pair; returns at once."""
        number = next(self._numbers)
        process = self._processes[number] = HostProcess(self)
        with contextlib.suppress(OSError):  # a launcher that is gone is noticed by `listen`
            self.connection.send((number, settings))
            reduction.send_handle(self.connection, host_end.fileno(), self._process.pid)
        return process

    def listen(self, seconds: float) -> None:
        """Take what the launcher has to tell, waiting so long for the first of it."""
        try:
            while self._processes and self.connection.poll(seconds):
                number, pid, status = self.connection.recv()
                process = self._processes[number]
                process.pid = pid
                self._serves = self._serves or pid is not None
                if status is not None:
                    process.returncode = status
                    del self._processes[number]
                seconds = 0.0
        except (EOFError, OSError):
            # The kernel ends hosts whose fork server is gone, and that goes with its launcher.
            for process in self._processes.values():
                process.returncode = -signal.SIGKILL
            self._processes.clear()

    def close(self) -> None:
        """End it and all that descends from it, and remove the directory."""
        self.connection.close()
        self._process.terminate()
        try:
            self._process.wait(5 * PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End one that does not answer, and with it the fork server and its hosts; the directory stays."""
        self.connection.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Serve the pool until it is gone, then clean up."""
    signal.signal(signal.SIGTERM, _leave)
    die_with_parent(signal.SIGTERM)
    adopt_orphans()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))
    connection = Connection(int(sys.argv[1]))
    multiprocessing.set_forkserver_preload(["genmodel.runners.preloaded"])
    try:
        with contextlib.suppress(EOFError, ConnectionError, SystemExit):
            try:
                forkserver.ensure_running()
                _serve(connection)
            finally:
                # When the pool dies, the kernel closes the connection and then sends the signal: it may come only here.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    finally:
        _end_all()
        for directory in sys.argv[2:]:
            remove(Path(directory))
    os._exit(0)  # multiprocessing would wait for hosts


def _leave(*_: object) -> None:
    """Only once: what follows is cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def _serve(connection: Connection) -> None:
    context = multiprocessing.get_context("forkserver")
    running: dict[int, tuple[int, Any]] = {}
    while True:
        for ready in wait([connection, *running]):
            if ready is connection:
                number, settings = connection.recv()
                host_end = Connection(reduction.recv_handle(connection))
                process = context.Process(target=serve, args=(host_end, settings))
                try:
                    process.start()
                except (EOFError, OSError):  # the fork server died, of its imports or by the kernel
                    connection.send((number, None, -signal.SIGKILL))
                else:
                    running[process.sentinel] = number, process
                    connection.send((number, process.pid, None))
                host_end.close()
            else:
                assert isinstance(ready, int)
                number, process = running.pop(ready)
                process.join()
                assert process.pid is not None
                _end_survivors(process.pid)
                connection.send((number, process.pid, process.exitcode))


def _end_survivors(host: int) -> None:
    """End what a dead host had started: its group, and what has left that, which came to this process instead."""
    own = _own_processes()
    end(lambda: group(host) | descendants(os.getpid(), spared=own))
    reap(spared=own)


def _end_all() -> None:
    tracker = vars(resource_tracker)["_resource_tracker"]
    if tracker._fd is not None:  # noqa: SLF001
        os.close(tracker._fd)  # noqa: SLF001 - so that the tracker, when all others are gone, sees that it can go
    end(lambda: descendants(os.getpid()))


def _own_processes() -> set[int]:
    """The fork server, whose children are the hosts that live, and its resource tracker."""
    owners: tuple[Any, ...] = vars(forkserver)["_forkserver"], vars(resource_tracker)["_resource_tracker"]
    return {getattr(owner, name, None) or 0 for owner in owners for name in ("_forkserver_pid", "_pid")}


if __name__ == "__main__":
    main()
