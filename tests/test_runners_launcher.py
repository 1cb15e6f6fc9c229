"""However the pool goes, what its launcher has started is ended, and its directories are removed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genmodel.runners import launcher


class Exited(Exception):
    """In place of the end of the process."""


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What `main` did, of a launcher that starts nothing and is this process."""
    done: list[str] = []

    def leave(status: int) -> None:
        raise Exited(status)

    read, write = os.pipe()
    monkeypatch.setattr("sys.argv", ["launcher", str(read), str(tmp_path)])
    monkeypatch.setattr(launcher, "die_with_parent", lambda _: None)
    monkeypatch.setattr(launcher, "adopt_orphans", lambda: None)
    monkeypatch.setattr(launcher.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(launcher.multiprocessing, "set_forkserver_preload", lambda _: None)
    monkeypatch.setattr(launcher.forkserver, "ensure_running", lambda: None)
    monkeypatch.setattr(launcher, "_end_all", lambda: done.append("ended"))
    monkeypatch.setattr(launcher, "remove", lambda path: done.append(str(path)))
    monkeypatch.setattr(launcher.os, "_exit", leave)
    before = signal.getsignal(signal.SIGTERM)
    yield done
    signal.signal(signal.SIGTERM, before)
    os.close(write)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, SystemExit])
@pytest.mark.parametrize("signals", [0, 1, 2])
def test_a_signal_that_comes_as_the_connection_closes_hinders_nothing(
    ended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], signals: int
) -> None:
    """At the last moment, just before it would be ignored: the kernel sends it when it has closed all files."""

    def serve(_: object) -> None:
        raise error

    real, left = signal.signal, [signals]

    def late(number: int, handler: Any) -> Any:
        while handler is signal.SIG_IGN and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGTERM)
        return real(number, handler)

    monkeypatch.setattr(launcher, "_serve", serve)
    monkeypatch.setattr(launcher.signal, "signal", late)
    with pytest.raises(Exited):
        launcher.main()
    assert ended == ["ended", str(tmp_path)]


def test_what_nobody_expected_leaves_nothing_behind_either(
    ended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised, so that the log has it."""

    def serve(_: object) -> None:
        raise ValueError("what is this")

    monkeypatch.setattr(launcher, "_serve", serve)
    with pytest.raises(ValueError, match="what is this"):
        launcher.main()
    assert ended == ["ended", str(tmp_path)]
