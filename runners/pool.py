"""The pool of hosts: starts them, gives each its commands, and outlives whatever a model does to them."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from genmodel.runners.evidence import Failure
from genmodel.runners.launcher import HostProcess, Launcher
from genmodel.runners.leftovers import PATIENCE, end_group, segments, sweep
from genmodel.runners.ports import free_ports
from genmodel.runners.protocol import Command

IMPORT_DEADLINE = 240.0
"""Seconds a host may take to import torch and vLLM; a cold disk needs about 60."""
GRACE = 5.0
"""Seconds the other ranks of a collective have, once one has failed, to answer by themselves."""


@dataclass(slots=True)
class _Host:
    process: HostProcess
    connection: Connection
    log: Path
    log_start: int = 0
    """Where in the log the present command began."""
    ready: bool = False
    phase: str = "importing torch and vLLM"
    begun: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Result:
    """One rank's answer, or why there is none; `seconds` by phase."""

    value: Any
    failure: Failure | None
    seconds: Mapping[str, float]


class Pool:
    """`size` hosts with ranks 0 .. size-1; a rank whose host failed gets a new one at its next command.

    Args:
        size: the largest tensor-parallel size that will be asked for.
        environment: additions to every host's environment.
    """

    def __init__(self, size: int, environment: Mapping[str, str] = {}) -> None:
        self._environment = dict(environment)
        self.directory = Path(tempfile.mkdtemp(prefix="genmodel-"))
        self._hosts: list[_Host | None] = [None] * size
        self._launcher: Launcher | None = None
        self.import_seconds = 0.0
        self._segments = segments()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._hosts)

    @property
    def deployable(self) -> int:
        """How many ranks a default engine can have."""
        return self.size

    @property
    def address(self) -> str:
        """Where ranks meet."""
        return "127.0.0.1"

    def free_ports(self, count: int) -> list[int]:
        """Ports that nobody uses."""
        return free_ports(count)

    def kill(self, rank: int) -> None:
        """Kill a host whose command another thread waits for."""
        host = self._hosts[rank]
        if host is not None and host.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.process.pid, signal.SIGKILL)

    def start(self) -> None:
        """Start what is not running; returns at once, while the hosts import."""
        for rank in range(self.size):
            self._ensure(rank)

    def begin(self, command: Command, ranks: Sequence[int]) -> Job:
        """Give the same command to several ranks; the ranks must be idle."""
        hosts = [self._ensure(rank) for rank in ranks]
        for host in hosts:
            host.log_start = host.log.stat().st_size
            # A host that cannot even be written to is found dead by the job.
            with contextlib.suppress(OSError):
                host.connection.send(command)
        return Job(self, command, dict(zip(ranks, hosts, strict=True)))

    def run(self, command: Command, ranks: Sequence[int], deadline: float) -> dict[int, Result]:
        """`begin` and wait."""
        return self.begin(command, ranks).wait(deadline)

    def close(self) -> None:
        """End every host and whatever it started; leaves nothing behind."""
        for host in self._hosts:
            if host is not None:
                with contextlib.suppress(OSError):
                    host.connection.send(None)
        deadline = time.monotonic() + 2.0
        for rank, host in enumerate(self._hosts):
            if host is not None:
                host.process.wait(max(0.0, deadline - time.monotonic()))
                self.discard(rank)
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None
        sweep(self._segments)
        shutil.rmtree(self.directory, ignore_errors=True)

    def discard(self, rank: int) -> None:
        """Kill a host and its children, if it still lives."""
        host, self._hosts[rank] = self._hosts[rank], None
        if host is None:
            return
        host.process.send_signal(signal.SIGKILL)  # it may not lead a group yet
        if host.process.pid is not None:
            end_group(host.process.pid)
        host.process.wait(PATIENCE)
        host.connection.close()

    @property
    def deaths(self) -> list[Connection]:
        """What becomes readable when a host ends."""
        return [] if self._launcher is None else [self._launcher.connection]

    def _ensure(self, rank: int) -> _Host:
        host = self._hosts[rank]
        if host is None or host.process.poll() is not None:
            self.discard(rank)
            self._hosts[rank] = host = self._spawn(rank)
        return host

    def _spawn(self, rank: int) -> _Host:
        if self._launcher is not None and not self._launcher.alive:
            self._launcher.close()
            self._launcher = None
        if self._launcher is None:
            self._launcher = Launcher({**os.environ, **self._environment}, self.directory / "launcher.log")
        ours, theirs = socket.socketpair()
        log = self.directory / f"host{rank}.log"
        log.touch()
        settings = {
            "rank": rank,
            "environment": {**os.environ, **self._environment},
            "directory": str(Path.cwd()),
            "path": list(sys.path),
            "log": str(log),
        }
        process = self._launcher.start(theirs, settings)
        theirs.close()
        return _Host(process, Connection(ours.detach()), log)


class Job:
    """A command on its way through one or several hosts."""

    def __init__(self, pool: Pool, command: Command, hosts: dict[int, _Host]) -> None:
        self._pool = pool
        self._command = command
        self._waiting = hosts
        self._results: dict[int, Result] = {}
        self.started = dict.fromkeys(hosts, time.perf_counter())
        """When each rank could begin: at once, or when it had imported torch and vLLM."""
        self._culprit: tuple[int, float] | None = None
        """The first rank that failed, and when."""

    def wait(
        self, deadline: float, on_phase: Callable[[int, str], None] = lambda rank, phase: None
    ) -> dict[int, Result]:
        """Every rank's result; a rank that dies or is late is killed, and its partners with it.

        Args:
            deadline: seconds for the command, from now or from when the last of the hosts has imported, which
                may itself take IMPORT_DEADLINE.
            on_phase: called with (rank, phase) as hosts report what they are doing.
        """
        importing = self._importing
        end = time.monotonic() + deadline + (IMPORT_DEADLINE if importing else 0.0)
        while self._waiting:
            connections = [host.connection for host in self._waiting.values()]
            ready = wait([*connections, *self._pool.deaths], 1.0)
            for rank, host in list(self._waiting.items()):
                if host.connection in ready or host.process.poll() is not None:
                    self._receive(rank, host, on_phase)
            if importing and not self._importing:
                importing, end = False, time.monotonic() + deadline
            if self._culprit is not None:
                end = min(end, self._culprit[1] + GRACE)
            if self._waiting and time.monotonic() > end:
                self._give_up(deadline)
        return self._results

    @property
    def _importing(self) -> bool:
        return any(not host.ready for host in self._waiting.values())

    def _receive(self, rank: int, host: _Host, on_phase: Callable[[int, str], None]) -> None:
        try:
            # A dead host's children may hold its end of the socket open: then there is nothing, and no end either.
            kind, value = host.connection.recv() if host.connection.poll() else _nothing()
        except (EOFError, OSError):
            self._fail(rank, self._death(rank, host))
            return
        if kind == "ready":
            host.ready, host.phase = True, "importing the target"
            self.started[rank] = max(self.started[rank], host.begun + value)
            self._pool.import_seconds = max(self._pool.import_seconds, value)
        elif kind == "phase":
            host.phase = value
            on_phase(rank, value)
        elif kind == "done":
            del self._waiting[rank]
            answer, seconds = pickle.loads(value)
            self._results[rank] = Result(answer, None, seconds)
        else:
            self._fail(rank, value)

    def _fail(self, rank: int, failure: Failure) -> None:
        host = self._waiting.pop(rank)
        self._results[rank] = Result(None, _with_log(failure, host), {})
        # What a model that failed has left behind in its process nobody knows, and a new one costs little.
        self._pool.discard(rank)
        # In a collective the others may now wait for this rank for ever, or fail likewise any moment.
        if self._culprit is None:
            self._culprit = rank, time.monotonic()

    def _death(self, rank: int, host: _Host) -> Failure:
        code = host.process.wait(PATIENCE)
        if code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"died with {signal.Signals(-code).name}"
        else:
            how = f"exited with status {code}"
        return Failure(
            kind="died",
            scenario=self._command.scenario,
            rank=rank,
            phase=host.phase,
            message=f"host {rank} {how} while {host.phase}",
        )

    def _give_up(self, deadline: float) -> None:
        for host in self._waiting.values():
            host.process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack to the log
        time.sleep(0.5)
        late = dict(self._waiting)
        # Of several late ranks, those in a collective wait for the others: blame the others.
        blamed = {rank for rank, host in late.items() if not _IN_COLLECTIVE.search(_written(host))} or set(late)
        if self._culprit is not None:
            blamed = set()
        culprit = self._culprit[0] if self._culprit is not None else min(blamed)
        for rank, host in late.items():
            own = f"host {rank} gave no answer within {deadline:.0f} s, while {host.phase}"
            self._fail(
                rank,
                Failure(
                    kind="timeout" if rank in blamed else "abandoned",
                    scenario=self._command.scenario,
                    rank=rank,
                    phase=host.phase,
                    message=own if rank in blamed else f"ended because rank {culprit} failed",
                ),
            )


def _nothing() -> NoReturn:
    raise EOFError


def _with_log(failure: Failure, host: _Host, lines: int = 25) -> Failure:
    """The failure with the end of the host's log, and with the true cause if only a child process knew it."""
    written = [_PREFIX.sub("", line) for line in _written(host).splitlines()]
    if "initialization failed" in failure.message:
        causes = [line for line in written if _CAUSE.match(line) and "initialization failed" not in line]
        if causes:
            failure = replace(failure, message=causes[0], details="")
    if not failure.details and failure.kind in ("raised", "died", "timeout"):
        failure = replace(failure, details="\n".join(written[-lines:]))
    return failure


def _written(host: _Host) -> str:
    """What the host has logged since the present command began."""
    with host.log.open(errors="replace") as log:
        log.seek(host.log_start)
        return log.read()


_IN_COLLECTIVE = re.compile(r"^Current thread .*\n(?:.*\n){0,5}.*/(?:torch|vllm)/distributed/", re.MULTILINE)
"""faulthandler's stack of the main thread, which takes the signal, with a collective among its innermost calls."""
_PREFIX = re.compile(r"^\([^)]* pid=\d+\)\s*(?:(?:ERROR|WARNING|INFO) [\d:. -]+ \[[^\]]*\] ?)?")
"""What vLLM puts in front of its child processes' lines: "(Worker_TP0 pid=7) ERROR 11-20 05:14:14 [core.py:9] "."""
_CAUSE = re.compile(r"[\w.]+(?:Error|Exception): ")
