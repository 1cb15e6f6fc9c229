"""What is told of an engine's processes, by what they and the fork server have written down."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genmodel.runners import fates, forked

CORE, WORKER = 999_999_001, 999_999_002
"""Process ids that no process has."""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's, and here the fork server's too, with an engine of two processes that both ended."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    processes = tmp_path / "processes"
    processes.mkdir()
    (processes / f"{CORE}.name").write_text("2.0 EngineCore")
    (processes / f"{WORKER}.name").write_text("3.0 VllmWorker-1")
    (tmp_path / "deaths").write_text(f"7.5 {WORKER} -11\n8.0 {CORE} -9\n")
    return tmp_path


def test_the_first_to_die_is_the_cause(directory: Path) -> None:
    found = fates.cause(directory, directory)
    assert found is not None
    assert (found.name, found.rank, found.status) == ("worker 1", 1, -signal.SIGSEGV)


def test_what_was_asked_to_end_did_not_fail(directory: Path) -> None:
    """vLLM ends an engine's processes where something else failed, and kills those that take their time."""
    fates.ask_to_end(WORKER)
    found = fates.cause(directory, directory)
    assert found is not None
    assert (found.name, found.status) == ("the engine's core", -signal.SIGKILL)
    fates.ask_to_end(CORE)
    assert fates.cause(directory, directory) is None


@pytest.mark.parametrize("status", [None, -signal.SIGSEGV])
def test_what_ended_by_itself_was_not_asked_to(directory: Path, status: int | None) -> None:
    """vLLM may end what it has not yet noticed to be dead."""
    process: Any = object.__new__(forked._Popen)
    process.pid, process.returncode, process.poll = WORKER, 0, lambda: status
    process._send_signal(signal.SIGTERM)  # to nobody, as for any process that is known to have ended
    found = fates.cause(directory, directory)
    assert found is not None
    assert found.name == ("the engine's core" if status is None else "worker 1")


def test_what_ended_before_a_process_began_was_another_of_the_same_id(directory: Path) -> None:
    """Process ids come round again after some ten thousand."""
    (directory / "deaths").write_text(f"1.0 {CORE} -9\n2.5 {WORKER} -9\n")
    assert fates.cause(directory, directory) is None
    with (directory / "deaths").open("a") as file:
        file.write(f"7.5 {CORE} -11\n")
    found = fates.cause(directory, directory)
    assert found is not None
    assert (found.name, found.status) == ("the engine's core", -signal.SIGSEGV)


def test_a_process_finds_nothing_of_another_of_the_same_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that it was asked to end, nor an exception, which would be taken for the first one."""
    own = directory / "processes" / str(os.getpid())
    fates.ask_to_end(os.getpid())
    own.with_suffix(".raised").write_text("{}")
    kept: list[Any] = []
    monkeypatch.setattr(fates, "_kept", kept)
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(name="VllmWorker-0"))
    for change in ("signal.signal", "faulthandler.enable", "faulthandler.register", "logging.setLogRecordFactory"):
        monkeypatch.setattr(f"genmodel.runners.fates.{change}", lambda *_, **__: None)
    found = []
    with contextlib.suppress(ValueError), fates.told():
        found = sorted(path.suffix for path in own.parent.glob(f"{os.getpid()}.*"))
        raise ValueError("of its own")
    kept.pop().close()
    assert found == [".name", ".stacks"]
    assert "of its own" in own.with_suffix(".raised").read_text()


def test_what_a_model_writes_there_is_no_process(directory: Path) -> None:
    """Rubbish, and a folder, which cannot be read."""
    (directory / "processes" / "12.name").write_text("x EngineCore")
    (directory / "processes" / "x.name").write_text("1.0 EngineCore")
    (directory / "processes" / "13.name").write_bytes(b"\xff")
    (directory / "processes" / "14.name").write_text("1.0 me")
    (directory / "processes" / "15.name").mkdir()
    assert sorted(fates.stacks(directory)) == [("the engine's core", 0, ""), ("worker 1", 1, "")]


@pytest.mark.parametrize("ended_before", [False, True])
def test_an_engines_process_ends_with_its_starter(ended_before: bool) -> None:
    """When the other end of the pipe is closed, as all of a process are when it ends."""
    lives, ours = os.pipe()
    told, tell = os.pipe()
    if ended_before:
        os.close(ours)
    pid = os.fork()
    if pid == 0:
        if not ended_before:
            os.close(ours)
        forked._die_with_starter(lives)
        os.write(tell, b".")
        time.sleep(600)
        os._exit(0)
    if not ended_before:
        assert os.read(told, 1) == b"."
        os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
