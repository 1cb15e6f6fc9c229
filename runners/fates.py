"""What became of a deployed engine's processes, written down where the pool can read it.

An engine's processes are neither the pool's children nor the host's: the host asks the fork server for the engine's
core, the core asks for its workers, and of a worker that is gone vLLM says "cancelled" or "see root cause above".
So each tells of itself, and the fork server, which reaps them all, of how it ended:

    TMPDIR of the host/processes/PID.name     when the process began, and what vLLM calls it
    TMPDIR of the host/processes/PID.raised   the first exception that vLLM logged in it, or that ended it
    TMPDIR of the host/processes/PID.asked    there if the one that started it asked it to end
    TMPDIR of the host/processes/PID.stacks   Python stacks by faulthandler: of a crash, or when asked by a signal
    TMPDIR of the host/PID.calls              see runners/progress.py
    TMPDIR of the fork server/deaths          a line for each process that ended, in that order

Process ids come round again in a long session, so that whatever is older than the process is of another.

Light to import: the fork server does, before torch and vLLM.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from genmodel.runners import progress
from genmodel.runners.evidence import FailureKind
from genmodel.runners.protocol import describe_failure

SETTLING = 1.0
"""Seconds that the fork server may take to write down a death that others have noticed."""
_NAMED = re.compile(r"(VllmWorker-(?P<rank>\d+)|EngineCore)")
"""What vLLM calls an engine's processes."""
_LOGGERS = ("vllm.v1.executor.multiproc_executor", "vllm.v1.engine.core")
"""Where vLLM tells of an exception that ended a worker's or the core's work."""
_ECHO = re.compile(r"WorkerProc initialization failed|^\w*Error: cancelled|Worker failed with error|EngineDead")
"""What an engine's core says because one of its workers failed."""
_COLLECTIVE = re.compile(r"/(?:torch|vllm)/distributed/")
_kept: list[object] = []


@dataclass(frozen=True, slots=True)
class Fate:
    """One process of an engine that ended, or in which something was raised."""

    name: str
    """ "worker 1", or "the engine's core", which at TP=1 has the model itself."""
    rank: int
    at: float
    """When, in seconds of a clock that all processes of the machine share."""
    status: int | None = None
    """How it ended, negative for a signal; None where something was raised before."""
    kind: FailureKind = "died"
    message: str = ""
    details: str = ""
    echo: bool = False
    """Whether it comes of another process's failure."""


# --- in the processes, and in the fork server ------------------------------------------------------------------------


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Write down what becomes of this process, if it is one of an engine."""
    name = multiprocessing.current_process().name
    if not _NAMED.match(name):
        yield
        return
    directory = _directory(Path(tempfile.gettempdir()))
    directory.mkdir(exist_ok=True)
    own = directory / str(os.getpid())
    stacks = own.with_suffix(".stacks").open("wb")
    _kept.append(stacks)
    faulthandler.enable(stacks)
    signal.signal(signal.SIGUSR1, progress.Calls(Path(tempfile.gettempdir())))
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True, chain=True)
    for stale in (".raised", ".asked"):
        own.with_suffix(stale).unlink(missing_ok=True)
    draft = own.with_suffix(".draft")
    draft.write_text(f"{time.monotonic()} {name}")
    draft.rename(own.with_suffix(".name"))  # at once, for the pool may be reading
    make = logging.getLogRecordFactory()

    def noting(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.exc_info and record.exc_info[1] and record.name in _LOGGERS:
            _write_raised(own, record.exc_info[1])
        return record

    logging.setLogRecordFactory(noting)  # configuring logging anew, as vLLM does, leaves it
    try:
        yield
    except BaseException as error:
        _write_raised(own, error)
        raise


def _write_raised(own: Path, error: BaseException) -> None:
    path = own.with_suffix(".raised")
    if path.exists():
        return  # what came first is the cause
    failure = describe_failure(error, "", 0, "")
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    where = "" if innermost is None else innermost.tb_frame.f_code.co_filename
    found = {
        "at": time.monotonic(),
        "kind": failure.kind,
        "message": failure.message,
        "details": failure.details,
        "echo": bool(_ECHO.search(failure.message) or _COLLECTIVE.search(where)),
    }
    with contextlib.suppress(OSError):
        draft = own.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.rename(path)


def ask_to_end(pid: int) -> None:
    """Write down that this process is about to end one that it started."""
    with contextlib.suppress(OSError):
        (_directory(Path(tempfile.gettempdir())) / f"{pid}.asked").touch()


def forget() -> None:
    """Of the processes of an engine that this host has ended, no more need be told."""
    for path in _directory(Path(tempfile.gettempdir())).glob("*.name"):
        path.unlink(missing_ok=True)


def write_down_deaths() -> None:
    """Let this process, which becomes the fork server, write down how every process ends that it forked.

    The statuses it sends to those that asked for the processes are of no use here: those may be dead themselves.
    """
    path = _deaths(Path(tempfile.gettempdir()))
    vars(forkserver)["os"] = _Reaper(path)


class _Reaper:
    """The os module for multiprocessing's fork server, with a waitpid that writes down what it returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        found, status = os.waitpid(pid, options)
        if found:
            with contextlib.suppress(OSError), self._path.open("a") as file:
                file.write(f"{time.monotonic()} {found} {os.waitstatus_to_exitcode(status)}\n")
        return found, status


# --- in the pool -----------------------------------------------------------------------------------------------------


def cause(directory: Path, sockets: Path, *, settle: bool = True) -> Fate | None:
    """What went wrong first among the processes of engines that a host has started, if anything did.

    Args:
        directory: TMPDIR of the host.
        sockets: TMPDIR of the fork server.
        settle: whether to wait for the fork server to write down what has just ended.
    """
    patient = time.monotonic() + SETTLING
    while settle and time.monotonic() < patient and _unwritten(directory, sockets):
        time.sleep(0.02)
    return min(_fates(directory, sockets), key=lambda fate: (fate.echo, fate.at), default=None)


def stacks(directory: Path) -> list[tuple[str, int, str]]:
    """What every thread of each process of a host's engine is doing, the main thread last: (name, rank, stacks)."""
    names = _names(directory)
    found = stacks_by_process(directory)
    return [(*_called(names[pid].name), text) for pid, text in found.items() if pid in names]


def stacks_by_process(directory: Path) -> dict[int, str]:
    """The same by process id."""
    names = _names(directory)
    before = {pid: len(_stacks(directory, pid)) for pid in names}
    for pid in names:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + SETTLING

    def text(pid: int) -> str:
        return progress.written(lambda: _stacks(directory, pid)[before[pid] :], until)

    return {pid: text(pid) for pid in names}


def _fates(directory: Path, sockets: Path) -> Iterator[Fate]:
    names = _names(directory)
    deaths = _read_deaths(sockets, names)
    for pid, process in names.items():
        name, rank = _called(process.name)
        try:
            raised = Fate(name, rank, **json.loads((_directory(directory) / f"{pid}.raised").read_text()))
        except (OSError, ValueError, TypeError):  # there is none, or a model has written it
            if pid in deaths and not (_directory(directory) / f"{pid}.asked").exists():
                at, status = deaths[pid]
                yield Fate(name, rank, at, status, details=_stacks(directory, pid))
        else:
            yield raised


def _unwritten(directory: Path, sockets: Path) -> bool:
    """Whether a process has ended of which the fork server has not yet written so."""
    names = _names(directory)
    return any(not Path(f"/proc/{pid}/exe").exists() for pid in names.keys() - _read_deaths(sockets, names).keys())


class _Name(NamedTuple):
    """What vLLM calls a process, and when that began."""

    begun: float
    name: str


def _names(directory: Path) -> dict[int, _Name]:
    found = {}
    for path in _directory(directory).glob("*.name"):
        with contextlib.suppress(OSError, ValueError):  # the host forgets them meanwhile, or a model has written there
            begun, _, name = path.read_text().partition(" ")
            if _NAMED.match(name):
                found[int(path.stem)] = _Name(float(begun), name)
    return found


def _called(process: str) -> tuple[str, int]:
    """A process in words, and its rank in the engine."""
    found = _NAMED.match(process)
    assert found is not None
    return (f"worker {found['rank']}", int(found["rank"])) if found["rank"] else ("the engine's core", 0)


def _read_deaths(sockets: Path, names: Mapping[int, _Name]) -> Mapping[int, tuple[float, int]]:
    """(when, exit status) of those of these processes that have ended."""
    try:
        lines = _deaths(sockets).read_text().splitlines()
    except OSError:
        return {}
    deaths = {int(pid): (float(at), int(status)) for at, pid, status in map(str.split, lines)}
    return {pid: deaths[pid] for pid, process in names.items() if pid in deaths and deaths[pid][0] >= process.begun}


def _stacks(directory: Path, pid: int) -> str:
    with contextlib.suppress(OSError):
        return (_directory(directory) / f"{pid}.stacks").read_text(errors="replace")
    return ""


def _directory(temporary: Path) -> Path:
    return temporary / "processes"


def _deaths(temporary: Path) -> Path:
    return temporary / "deaths"
