"""A host: a process, one per rank and target, that has torch and vLLM imported and runs command after command.

Forked from a process that has imported them (`genmodel.runners.launcher`), with one end of a socket pair.
Everything the model prints goes to the host's log; what is sent back is data (`genmodel.runners.wire`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from genmodel.runners import progress
from genmodel.runners.protocol import Command, describe_failure
from genmodel.runners.wire import Channel

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
    calls = progress.Calls(Path(os.environ["TMPDIR"]))
    signal.signal(signal.SIGUSR1, calls)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
    channel = Channel(socket.socket(fileno=os.dup(connection.fileno())), blocking=True)
    connection.close()
    try:
        # Both were imported before the fork, unless that failed: then they fail here, where it can be told.
        from genmodel.runners import commands, preloaded
    except Exception as error:  # noqa: BLE001 - an import can fail in any way
        channel.send(("failed", describe_failure(error, "start", rank, "importing torch and vLLM")))
        return
    channel.send(("ready", preloaded.SECONDS))
    state = commands.State(rank=rank)
    while True:
        try:
            command = channel.receive()
        except EOFError:
            return
        try:
            _run(commands, state, command, channel)
        except OSError:
            os._exit(LOST)
        calls.forget()


def _run(commands: Any, state: Any, command: Command, channel: Channel) -> None:
    phase = Phase(lambda name: channel.send(("phase", name)))
    state.phase = phase
    try:
        result = getattr(commands, command.name)(state, **command.arguments)
        if isinstance(result, Iterator):
            for part in result:
                channel.send(("part", part))
            result = None
        channel.send(("done", (result, phase.seconds)))
    except BaseException as error:  # noqa: BLE001 - models also raise SystemExit and KeyboardInterrupt
        channel.send(("failed", describe_failure(error, command.scenario, state.rank, phase.current)))
