"""A host: a long-lived process, one per rank, that imports torch and vLLM once and runs command after command.

Forked from a process that has done so (`genmodel.runners.launcher`), with one end of a socket pair. Everything
the model prints goes to the host's log; what is sent back is data.
"""

from __future__ import annotations

import contextlib
import faulthandler
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from genmodel.runners.protocol import Command, describe_failure


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
            self.current = before  # not in `finally`: after an exception it names the phase that failed
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def serve(connection: Connection, rank: int) -> None:
    """Serve commands until told to stop or until the other end is gone."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        # Both were imported before the fork, unless that failed: then they fail here, where it can be told.
        from genmodel.runners import commands, preloaded
    except Exception as error:  # noqa: BLE001 - an import can fail in any way
        connection.send(("failed", describe_failure(error, "start", rank, "importing torch and vLLM")))
        return
    connection.send(("ready", preloaded.SECONDS))
    state = commands.State(rank=rank)
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
    except BaseException as error:  # noqa: BLE001 - models also raise SystemExit and KeyboardInterrupt
        return "failed", describe_failure(error, command.scenario, state.rank, phase.current)
    return "done", data
