"""The pool of hosts: starts them, gives each its commands, and outlives whatever a model does to them."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from genmodel.runners import fates, machine, progress
from genmodel.runners.evidence import Failure, FailureKind
from genmodel.runners.host import LOST
from genmodel.runners.launcher import HostProcess, Launcher
from genmodel.runners.leftovers import PATIENCE, remove
from genmodel.runners.ports import free_ports
from genmodel.runners.protocol import Command, printable_failure, signal_name
from genmodel.runners.wire import Channel, Garbled, ready

IMPORT_DEADLINE = 240.0
"""Seconds a host may take to import torch and vLLM; a cold disk needs about 60."""
GRACE = 5.0
"""Seconds the other ranks of a collective have, once one has failed, to answer by themselves."""
LONGEST_PATH = 60
"""Characters; a socket's address may have 107, of which vLLM takes 37 for a name and multiprocessing 32."""
LONGEST_LOG = 64 << 20
"""Bytes that a host may have written; what is older is forgotten, so that no model fills the disk by printing."""
LONGEST_READ = 1 << 18
"""Bytes of the log's end that are looked at."""
SHOWN = 25
"""Lines of a log, and of the model's own frames."""


@dataclass(slots=True)
class _Host:
    process: HostProcess
    channel: Channel
    log: Path
    directory: Path
    """Of its temporary files, which go with it."""
    name: str = ""
    """`Command.process` of what has run in it; empty if nothing has yet."""
    log_start: int = 0
    """Where in the log the present command began."""
    kills: int = 0
    """How many processes the kernel had killed for lack of memory when the present command began."""
    ready: bool = False
    phase: str = "importing torch and vLLM"
    begun: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Result:
    """One rank's answer, or why there is none; `seconds` by phase."""

    value: Any
    """Of a command that answers in parts, those it gave, by name, even if it failed after them."""
    failure: Failure | None
    seconds: Mapping[str, float]


class Pool:
    """`size` hosts with ranks 0 .. size-1, each for one named process: what code leaves behind in it ends with it.

    A rank gets a new host at its next command if its host failed, or has run commands of another name.

    Args:
        size: the largest tensor-parallel size that will be asked for.
        environment: additions to every host's environment.

    Raises:
        OSError: if there is no temporary directory, or no room in it.
    """

    def __init__(self, size: int, environment: Mapping[str, str] = {}) -> None:
        self._environment = dict(environment)
        self.directory = self.sockets = Path(tempfile.mkdtemp(prefix="genmodel-"))
        if len(str(self.directory)) > LONGEST_PATH:
            self.sockets = Path(tempfile.mkdtemp(prefix="genmodel-", dir="/tmp"))
        self._hosts: list[_Host | None] = [None] * size
        self._numbers = itertools.count()
        self._launcher: Launcher | None = None
        self.import_seconds = 0.0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._hosts)

    @property
    def deployable(self) -> int:
        """How many ranks a default engine can have: as many as there are devices, and on CPU any number."""
        devices = self._environment.get("CUDA_VISIBLE_DEVICES")
        return sys.maxsize if devices is None else len(devices.split(","))

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
        hosts = [self._ensure(rank, command.process) for rank in ranks]
        for host in hosts:
            host.log_start = _size(host.log)
            host.kills = _kills()
            # A host that cannot even be written to is found dead by the job.
            with contextlib.suppress(OSError):
                host.channel.send(command)
        return Job(self, command, dict(zip(ranks, hosts, strict=True)))

    def close(self) -> None:
        """End every host and whatever it started; leaves nothing behind."""
        hosts, self._hosts = self._hosts, [None] * self.size
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None
        for host in filter(None, hosts):
            host.channel.close()
        remove(self.directory)
        remove(self.sockets)

    def discard(self, rank: int) -> None:
        """Kill a host and its children, if it still lives."""
        host, self._hosts[rank] = self._hosts[rank], None
        if host is None:
            return
        host.process.send_signal(signal.SIGKILL)
        # The launcher tells of its death only when what it had started is dead, too.
        if host.process.wait(5 * PATIENCE) is None and self._launcher is not None:
            self._launcher.kill()
        host.channel.close()
        remove(host.directory)
        with contextlib.suppress(OSError):
            host.log.unlink(missing_ok=True)

    @property
    def deaths(self) -> list[Connection]:
        """What becomes readable when a host ends."""
        return [] if self._launcher is None else [self._launcher.connection]

    def _ensure(self, rank: int, name: str = "") -> _Host:
        host = self._hosts[rank]
        others = host is not None and name and host.name not in ("", name)
        if host is None or others or host.process.poll() is not None:
            self.discard(rank)
            self._hosts[rank] = host = self._spawn(rank)
        host.name = name or host.name
        return host

    def _spawn(self, rank: int) -> _Host:
        for needed in (self.directory, self.sockets):
            needed.mkdir(0o700, exist_ok=True)  # a model can have removed it
        if self._launcher is not None and not self._launcher.alive:
            self._launcher.kill()
            self._launcher = None
        if self._launcher is None:
            self._launcher = Launcher({**os.environ, **self._environment}, self.directory, self.sockets)
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        log = self.directory / f"{number}.log"
        log.touch(0o600)
        directory = self.directory / str(number)
        directory.mkdir(0o700)
        own = {
            "TMPDIR": str(directory),
            "VLLM_RPC_BASE_PATH": str(directory if self.sockets == self.directory else self.sockets),
        }
        settings = {
            "rank": rank,
            "environment": {**_lasting_caches(), **os.environ, **self._environment, **own},
            "directory": str(Path.cwd()),
            "path": list(sys.path),
            "log": str(log),
        }
        process = self._launcher.start(theirs, settings)
        theirs.close()
        return _Host(process, Channel(ours, blocking=False), log, directory)


class Job:
    """A command on its way through one or several hosts."""

    def __init__(self, pool: Pool, command: Command, hosts: dict[int, _Host]) -> None:
        self._pool = pool
        self._command = command
        self._waiting = hosts
        self._results: dict[int, Result] = {}
        self._parts: dict[int, dict[str, Any]] = {rank: {} for rank in hosts}
        self._begun = time.monotonic()
        self.started = dict.fromkeys(hosts, time.perf_counter())
        """When each rank could begin: at once, or when it had imported torch and vLLM."""
        self._looks: dict[int, list[progress.Look]] = {rank: [] for rank in hosts}
        """At each rank in its present phase, once half of its time is over."""
        self._throttled = machine.throttled()
        self._culprit: tuple[int, float] | None = None
        """The first rank that failed, and when."""

    def wait(self, deadline: float) -> dict[int, Result]:
        """Every rank's result; a rank that dies or is late is killed, and its partners with it.

        Args:
            deadline: seconds that any one phase of the command may take; importing torch and vLLM may take
                IMPORT_DEADLINE.
        """
        end = time.monotonic() + deadline
        while self._waiting:
            readable = ready([host.channel for host in self._waiting.values()], self._pool.deaths, 1.0)
            for rank, host in list(self._waiting.items()):
                ended = host.process.poll() is not None
                if not ended and host.channel.fileno() not in readable:
                    _shorten(host)
                    self._look_at_engine(rank, host)
                    self._watch(rank, host, 1 - (end - time.monotonic()) / deadline)
                elif self._receive(rank, host, ended):
                    end = time.monotonic() + deadline
                    self._looks = {rank: [] for rank in self._looks}
            if self._importing:
                end = max(end, self._begun + IMPORT_DEADLINE)
            if self._culprit is not None:
                end = self._culprit[1] + GRACE
            if self._waiting and time.monotonic() > end:
                self._give_up(deadline)
        return self._results

    def _look_at_engine(self, rank: int, host: _Host) -> None:
        """Do not wait for a deployed engine of which a process has failed: vLLM does not notice everything."""
        found = fates.cause(host.directory, self._pool.sockets, settle=False)
        if (
            host.phase == "ending the engine"
            or found is None
            or found.echo
            or time.monotonic() < found.at + fates.SETTLING
        ):
            return
        said = f"the engine gave no answer while {host.phase}"
        self._fail(
            rank, Failure(kind="died", scenario=self._command.scenario, rank=rank, phase=host.phase, message=said)
        )

    @property
    def _importing(self) -> bool:
        return any(not host.ready for host in self._waiting.values())

    def _receive(self, rank: int, host: _Host, ended: bool) -> bool:
        """Take what a host has sent, its end included; returns whether that was anything whole."""
        some = False
        try:
            while rank in self._waiting and (message := host.channel.receive()) is not None:
                some = True
                self._take(rank, host, message)
        except EOFError:
            ended = True
        except Garbled as garbled:
            said = f"host {rank} sent what is no message of its own ({garbled}) while {host.phase}"
            self._fail(rank, self._failure(rank, host, "died", said))
        # A dead host's children may hold its end of the socket open: then there is nothing, and no end either.
        if ended and rank in self._waiting:
            # It tells why its connection ended by ending itself.
            code = host.process.wait(PATIENCE)
            said = f"host {rank} {_ended(code, host)} while {host.phase}"
            self._fail(rank, self._failure(rank, host, "died", said))
        return some or ended

    def _take(self, rank: int, host: _Host, message: object) -> None:
        match message:
            case ("ready", float(seconds)):
                host.ready, host.phase = True, "importing the target"
                self.started[rank] = max(self.started[rank], host.begun + seconds)
                self._pool.import_seconds = max(self._pool.import_seconds, seconds)
            case ("phase", str(name)):
                host.phase = name
            case ("part", (str(name), part)):
                self._parts[rank][name] = part
            case ("done", (answer, dict(seconds))):
                del self._waiting[rank]
                self._results[rank] = Result(self._parts[rank] or answer, None, seconds)
            case ("failed", Failure() as failure):
                self._fail(rank, failure)
            case _:
                raise Garbled("it is none that a host sends")

    def _fail(self, rank: int, failure: Failure) -> None:
        host = self._waiting.pop(rank)
        told = _with_log(_with_cause(failure, host, self._pool.sockets), host)
        self._results[rank] = Result(self._parts[rank], printable_failure(told), {})
        # What a model that failed has left behind in its process nobody knows, and a new one costs little.
        self._pool.discard(rank)
        # In a collective the others may now wait for this rank for ever, or fail likewise any moment.
        if self._culprit is None:
            self._culprit = rank, time.monotonic()

    def _failure(self, rank: int, host: _Host, kind: FailureKind, message: str) -> Failure:
        return Failure(kind=kind, scenario=self._command.scenario, rank=rank, phase=host.phase, message=message)

    def _watch(self, rank: int, host: _Host, over: float) -> None:
        """Look at a host when these shares of its time are over."""
        looks = self._looks[rank]
        wanted = host.ready and rank in self._waiting and self._culprit is None
        if wanted and len(looks) < sum(over >= due for due in progress.LOOKS):
            before = _size(host.log)
            looks.append(_look(host)[0])
            # What the look has added to the log is no model's; what came with it is lost.
            with contextlib.suppress(OSError):
                os.truncate(host.log, before)

    def _give_up(self, deadline: float) -> None:
        """Of all that still work, say that they are late, and end them."""
        late = dict(self._waiting)
        stacks: dict[int, str] = {}
        for rank, host in late.items():
            last, stacks[rank] = _look(host)
            self._looks[rank].append(last)
        # Of several late ranks, those in a collective wait for the others: blame the others.
        blamed = {rank for rank, stack in stacks.items() if not _IN_COLLECTIVE.search(stack)} or set(late)
        if self._culprit is not None:
            blamed = set()
        culprit = self._culprit[0] if self._culprit is not None else min(blamed)
        for rank, host in late.items():
            if rank in blamed:
                self._fail(rank, self._late(rank, host, IMPORT_DEADLINE if not host.ready else deadline))
            else:
                self._fail(rank, self._failure(rank, host, "abandoned", f"ended because rank {culprit} failed"))

    def _late(self, rank: int, host: _Host, allowed: float) -> Failure:
        gave = "no more than half of an answer" if host.channel.in_the_middle else "no answer"
        name, inner, stack = _busy(host) or (f"host {rank}", rank, "")
        said = f"{name} gave {gave} within {allowed:.0f} s, while {host.phase}"
        looks = self._looks[rank]
        # Before it is ready, no model's code has run in it.
        if host.ready and progress.stuck(host.process.pid or 0, looks):
            return _with_log(self._failure(inner, host, "timeout", said), host, stack)
        busy = machine.strain(progress.share(looks), self._throttled)
        said = f"{said}, but it was getting on ({busy}): raise --genmodel-timeout"
        # A loop that never ends and calls one function after another looks like this, too: say where it was.
        return _with_log(self._failure(inner, host, "slow", said), host, stack)


def _busy(host: _Host) -> tuple[str, int, str] | None:
    """Which process of a host's deployed engine runs the model's code, with its rank and stack.

    Of several, those in a collective wait for the others.
    """
    found = [one for one in fates.stacks(host.directory) if any(map(_is_authors, one[2].splitlines()))]
    return min(found, key=lambda one: _IN_COLLECTIVE.search(one[2]) is not None, default=None)


def _ended(code: int | None, host: _Host) -> str:
    """How a host did."""
    if code is None or code == LOST:
        return "lost its connection (was it closed, with other file descriptors?)"
    if code == -signal.SIGKILL and _kills() > host.kills:
        return "was killed by the kernel, which ran out of memory,"
    return f"died with {signal_name(-code)}" if code < 0 else f"exited with status {code}"


def _kills() -> int:
    """Processes the kernel has killed for lack of memory, of the machine or of a control group."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE):
            return int(found[1])
    return 0


def _lasting_caches() -> dict[str, str]:
    """Where to keep what is compiled: by default torch keeps it with the temporary files, which end with the host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{user}")}


def _look(host: _Host) -> tuple[progress.Look, str]:
    """Look at what a host and its children are doing; returns also what its own log says of that."""
    leader = host.process.pid or 0
    found: dict[int, str] = {}

    def stacks() -> dict[int, str]:
        found.update(fates.stacks_by_process(host.directory))
        if progress.takes_signal(leader):
            found[leader] = _stacks(host.log, leader)
        return found

    return progress.look(leader, host.directory, time.monotonic(), stacks), found.get(leader, "")


def _stacks(log: Path, pid: int) -> str:
    """What every thread of a process is doing, which faulthandler writes to its log when asked by a signal."""
    start = _size(log)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    return progress.written(lambda: _read(log, start), time.monotonic() + PATIENCE)


def _shorten(host: _Host) -> None:
    """Forget what a host that writes without end has written."""
    if _size(host.log) > LONGEST_LOG:
        with contextlib.suppress(OSError):
            os.truncate(host.log, 0)
        host.log_start = 0


def _with_cause(failure: Failure, host: _Host, sockets: Path) -> Failure:
    """The failure, or what failed first in the deployed engine that the host had started."""
    if failure.kind not in ("raised", "died", "timeout"):
        return failure
    found = fates.cause(host.directory, sockets)
    if found is None:
        return failure
    if found.status is None:
        return replace(failure, kind=found.kind, rank=found.rank, message=found.message, details=found.details)
    said = f"{found.name} {_ended(found.status, host)} while {host.phase}"
    return _with_log(replace(failure, kind="died", rank=found.rank, message=said, details=""), host, found.details)


def _with_log(failure: Failure, host: _Host, stacks: str = "") -> Failure:
    """The failure with the model's own frames, which may be in stacks that are not in the log, and the log's end."""
    lines = _read(host.log, host.log_start).splitlines()
    written = [_PREFIX.sub("", line) for line in lines if "resource_tracker" not in line]
    if not failure.details and failure.kind in ("raised", "died", "timeout", "slow"):
        own = [line for line in [*stacks.splitlines(), *written] if _is_authors(line)]
        parts = {"in the model's own code, innermost first:": own[:SHOWN], "end of the log:": written[-SHOWN:]}
        shown = [line for title, part in parts.items() if part for line in (title, *part)]
        failure = replace(failure, details="\n".join(shown))
    return failure


def _is_authors(line: str) -> bool:
    """Whether it is a frame of faulthandler's, in a file of the model's author."""
    frame = _FRAME.match(line)
    return frame is not None and progress.is_authors(frame[1])


def _read(log: Path, start: int) -> str:
    """What has been written since, or the last LONGEST_READ bytes of it; nothing where a model has removed the log."""
    try:
        # A model can also have put something else in its place, such as a FIFO, which would wait for a writer.
        descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            file.seek(max(start, _size(log) - LONGEST_READ))
            return file.read(LONGEST_READ).decode(errors="replace")
    except OSError:
        return ""


def _size(log: Path) -> int:
    """Bytes in a log, which a model can have removed."""
    try:
        return log.lstat().st_size
    except OSError:
        return 0


_FRAME = re.compile(r'  File "([^"<]*)", line \d+ in ')
"""As faulthandler writes them."""
_IN_COLLECTIVE = re.compile(r"^Current thread .*\n(?:.*\n){0,5}.*/(?:torch|vllm)/distributed/", re.MULTILINE)
"""faulthandler's stack of the main thread, which takes the signal, with a collective among its innermost calls."""
_PREFIX = re.compile(r"^\([^)]* pid=\d+\)\s*(?:(?:ERROR|WARNING|INFO) [\d:. -]+ \[[^\]]*\] ?)?")
"""What vLLM puts in front of its child processes' lines: "(Worker_TP0 pid=7) ERROR 11-20 05:14:14 [core.py:9] "."""
