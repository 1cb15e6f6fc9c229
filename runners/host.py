"""A host: a process, one per rank and target, that has torch and vLLM imported and runs command after command.

Forked from a process that has imported them (`genmodel.runners.launcher`), with one end of a socket pair.
Everything the model prints goes to the host's log; what is sent back is data.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from genmodel.runners.protocol import Command, describe_failure

LOST = 121
"""Exit status of a host that can tell the pool nothing more."""


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
        try:
            connection.send(_run(commands, state, command, connection))
        except OSError:
            os._exit(LOST)


def _run(commands: Any, state: Any, command: Command, connection: Connection) -> tuple[str, Any]:
    phase = Phase(lambda name: connection.send(("phase", name)))
    state.phase = phase
    try:
        result = getattr(commands, command.name)(state, **command.arguments)
        if isinstance(result, Iterator):
            for part in result:
                connection.send(("part", _by_value(part)))
            result = None
        return "done", _by_value((result, phase.seconds))
    except BaseException as error:  # noqa: BLE001 - models also raise SystemExit and KeyboardInterrupt
        return "failed", describe_failure(error, command.scenario, state.rank, phase.current)


def _by_value(answer: Any) -> bytes:
    """Pickled here: multiprocessing would hand tensors over in shared memory, which dies with this process."""
    return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
