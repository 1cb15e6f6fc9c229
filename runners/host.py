"""A host: a long-lived process, one per rank, that imports torch and vLLM once and runs command after command.

Started as `python -m genmodel.runners.host FD`, where FD is one end of a socket pair. Everything the
model prints goes to the host's log; what is sent back is data.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from genmodel.runners.evidence import Failure, FailureKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing for a host to do; `name` is a function of `genmodel.runners.commands`."""

    name: str
    scenario: str
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


class Unusable(Exception):
    """Raised by a command for a user's mistake; the message is one line."""


class Phase:
    """What this host is doing right now, told to the pool so that a death can be placed."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}
        self.current = ""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Any:
        """Time a phase; phases of one name add up."""
        before, self.current = self.current, name
        self._tell(name)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            raise  # `current` keeps naming the phase that failed
        else:
            self.current = before
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def main() -> None:
    """Serve commands until told to stop or until the other end is gone."""
    # The kernel ends this process when the one that started it dies, however it dies.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Connection(int(sys.argv[1]))
    settings = connection.recv()
    os.environ.update(settings["environment"])
    os.chdir(settings["directory"])
    sys.path[:] = settings["path"]
    start = time.perf_counter()
    try:
        from genmodel.runners import commands
    except Exception as error:
        connection.send(("failed", describe_failure(error, "start", settings["rank"], "importing torch and vLLM")))
        return
    connection.send(("ready", time.perf_counter() - start))
    state = commands.State(rank=settings["rank"])
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        if command is None:
            return
        connection.send(_run(commands, state, command, connection))


def _run(commands: Any, state: Any, command: Command, connection: Connection) -> tuple[str, Any]:
    phase = Phase(lambda name: connection.send(("phase", name)))
    state.phase = phase
    try:
        result = getattr(commands, command.name)(state, **command.arguments)
        # By value: multiprocessing would hand tensors over in shared memory, which dies with this process.
        data = pickle.dumps((result, phase.seconds), pickle.HIGHEST_PROTOCOL)
    except BaseException as error:  # models also raise SystemExit and KeyboardInterrupt
        failure = describe_failure(error, command.scenario, state.rank, phase.current)
        state.recover()
        return "failed", failure
    return "done", data


def describe_failure(error: BaseException, scenario: str, rank: int, phase: str) -> Failure:
    """One line, and the traceback trimmed to frames outside torch, vLLM and the harness where there are any."""
    kind: FailureKind = "unusable" if isinstance(error, Unusable) else "raised"
    root = error
    while root.__cause__ is not None and not _speaks_for_itself(root):
        root = root.__cause__
    name = "" if _speaks_for_itself(root) else f"{type(root).__name__}: "
    message = f"{name}{root}".strip().splitlines()
    frames = traceback.extract_tb(root.__traceback__)
    own = [f for f in frames if "/site-packages/" not in f.filename and not _of_harness(f.filename)]
    shown = own or frames[-3:]
    details = "".join(traceback.format_list(shown)) + "".join(traceback.format_exception_only(root))
    return Failure(
        kind=kind,
        scenario=scenario,
        rank=rank,
        phase=phase,
        message=message[0] if message else type(root).__name__,
        details=details if kind == "raised" else "",
    )


def _speaks_for_itself(error: BaseException) -> bool:
    """Whether the message was written for people, so that the exception's class adds nothing."""
    return isinstance(error, Unusable) or type(error).__name__ in ("InterfaceError", "LoadError")


def _of_harness(filename: str) -> bool:
    return any(f"/{folder}/" in filename for folder in ("genmodel/runners", "genmodel/modeling")) or filename.startswith("<frozen")


if __name__ == "__main__":
    main()
