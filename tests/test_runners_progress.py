"""Who is to blame for a host that is late: what a few looks at it tell of a loop, a wait, and a slow machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genmodel.runners import machine
from genmodel.runners.progress import Look, Seen, look, share, stuck, takes_signal, written

HOST, WORKER, OTHER = 10, 11, 12
HERE, THERE = ("model.py:forward", "harness.py:7"), ("model.py:mlp", "harness.py:7")


def looks(*each: dict[int, tuple[float, bool, tuple[str, ...]]], anew: int | None = None) -> list[Look]:
    """Looks ten seconds apart, each of (seconds on the CPU, wants it, place) by process.

    Each finds the process `anew` in another call than the one before it; the first finds all in one.
    """

    def seen(process: int, i: int, told: tuple[float, bool, tuple[str, ...]]) -> Seen:
        return Seen(*told, in_model="model" in told[2][0], calls=i if process == anew else min(i, 1))

    return [Look(10.0 * i, {p: seen(p, i, told) for p, told in at.items()}) for i, at in enumerate(each)]


def test_a_wait_without_end_is_the_models() -> None:
    asleep = {HOST: (1.0, False, HERE)}
    assert stuck(HOST, looks(asleep, asleep, asleep))
    assert stuck(HOST, looks({HOST: (1.0, False, HERE)}, {HOST: (1.1, False, HERE)}))


def test_a_loop_without_end_is_the_models() -> None:
    assert stuck(HOST, looks(*({HOST: (10.0 * i, True, HERE)} for i in range(4))))


def test_what_calls_the_same_function_again_and_again_gets_on() -> None:
    """As a model does whose time goes into one line; in a deployed engine, too."""
    assert not stuck(HOST, looks(*({HOST: (10.0 * i, True, HERE)} for i in range(4)), anew=HOST))
    waits = HOST, (1.0, False, ("vllm.py:1", "harness.py:3"))
    deployed = [dict([waits, (WORKER, (9.0 * i, True, HERE))]) for i in range(4)]
    assert stuck(HOST, looks(*deployed))
    assert not stuck(HOST, looks(*deployed, anew=WORKER))


def test_what_is_elsewhere_at_any_look_gets_on() -> None:
    places = (HERE, HERE, THERE, HERE)
    assert not stuck(HOST, looks(*({HOST: (10.0 * i, True, place)} for i, place in enumerate(places))))
    assert not stuck(HOST, looks(*({HOST: (0.0, False, place)} for place in places)))


def test_what_hardly_gets_to_run_cannot_be_blamed() -> None:
    """It stands where it stood because nobody lets it go on; and while it waits for a disk."""
    assert not stuck(HOST, looks(*({HOST: (0.01 * i, True, HERE)} for i in range(4))))


def test_what_starts_processes_gets_on() -> None:
    asleep = {HOST: (1.0, False, HERE)}
    assert not stuck(HOST, looks(asleep, {**asleep, WORKER: (0.0, True, HERE)}))


def test_a_host_that_waits_for_workers_is_as_stuck_as_they_are() -> None:
    def deployed(place: tuple[str, ...], other: tuple[str, ...] = ("vllm.py:1",)) -> list[Look]:
        waits = HOST, (1.0, False, ("vllm.py:1", "harness.py:3"))
        return looks(
            *(
                dict([waits, (WORKER, (9.0 * i, True, (HERE, place)[i % 2])), (OTHER, (9.0 * i, True, other))])
                for i in range(4)
            )
        )

    assert stuck(HOST, deployed(HERE))
    assert not stuck(HOST, deployed(THERE))
    assert not stuck(HOST, deployed(("vllm.py:2",)))


def test_share_of_the_machine() -> None:
    assert share(looks({HOST: (1.0, True, HERE)}, {HOST: (6.0, True, HERE), WORKER: (5.0, True, HERE)})) == 1.0
    assert share(looks({HOST: (1.0, True, HERE)})) == 0.0


# --- real processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import faulthandler, signal, sys, time
from pathlib import Path
from genmodel.runners.progress import Calls
signal.signal(signal.SIGUSR1, Calls(Path(sys.argv[1])))
faulthandler.register(signal.SIGUSR1, chain=True)

def once():
    sum(range(100_000))

def again():
    while True:
        once()

def loop():
    while True:
        pass

def wait():
    time.sleep(3600)

print("ready", flush=True)
globals()[sys.argv[2]]()
"""


@pytest.fixture
def program(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """A process that does what the parameter says, in a group of its own; its id, and the file of its stacks."""
    path, log = tmp_path / "program.py", tmp_path / "log"
    path.write_text(PROGRAM)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, path, tmp_path, request.param],
            stdout=subprocess.PIPE,
            stderr=file,
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid, log
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("program", "blamed"), [("again", False), ("loop", True), ("wait", True)], indirect=["program"]
)
def test_real_processes(program: tuple[int, Path], blamed: bool) -> None:
    """One that calls a function again and again is not blamed, one that loops or sleeps is."""
    pid, log = program

    def stacks() -> dict[int, str]:
        start = log.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        return {pid: written(lambda: log.read_text()[start:], time.monotonic() + 5.0)}

    seen = []
    for _ in range(4):
        seen.append(look(pid, log.parent, time.monotonic(), stacks))
        # So long as it takes to use half a second, on a busy machine too.
        until = time.monotonic() + 10.0
        while not blamed and seen[-1].seen[pid].used + 0.3 > _used(pid) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
    until = time.monotonic() + 20.0
    while stuck(pid, seen) != blamed and time.monotonic() < until:
        time.sleep(0.3)
        seen.append(look(pid, log.parent, time.monotonic(), stacks))
    assert stuck(pid, seen) == blamed


def test_part_of_a_stack_is_not_taken_for_another_place() -> None:
    """faulthandler writes a frame at a time, and each is a whole line."""
    thread, main = "Thread 0x1:\n", "Current thread 0x2:\n"
    frames = [f'  File "{name}", line 3 in {name}\n' for name in ("inner", "outer", "<module>")]
    texts = [thread, thread + frames[2], thread + frames[2] + main]
    texts += [texts[-1] + "".join(frames[: i + 1]) for i in range(3)]
    given = iter(texts)
    last = texts[-1]
    assert written(lambda: next(given, last), time.monotonic() + 60) == last
    assert written(lambda: texts[-2], time.monotonic() + 0.1) == texts[-2], "it never ends, and a part must do"
    deep = main + 100 * frames[0] + "  ...\n"
    assert written(lambda: deep, time.monotonic() + 60) == deep


def _used(pid: int) -> float:
    return look(pid, Path(), 0.0, dict).seen[pid].used


def test_a_process_without_a_handler_is_not_asked() -> None:
    """The signal would end it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not takes_signal(process.pid)
        process.kill()
    assert not takes_signal(process.pid)


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1.0 <= machine.slowness() <= machine.SLOWEST
    monkeypatch.setattr(machine, "NOMINAL", 1e-6)
    assert machine.slowness() == machine.SLOWEST
    monkeypatch.setattr(machine, "NOMINAL", 1e6)
    assert machine.slowness() == 1.0
    assert "it had 0.25 of " in machine.strain(0.25, machine.throttled())


def test_throttling_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/ours\n",
        "/sys/fs/cgroup/ours/cpu.stat": "usage_usec 9\nthrottled_usec 2500000\n",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.throttled() == 2.5
    assert machine.strain(1.0, 0.0).endswith("its control group was throttled for 2 s")
    files |= {
        "/proc/self/cgroup": "4:cpu,cpuacct:/ours\n0::/\n",
        "/sys/fs/cgroup/cpu/ours/cpu.stat": "throttled_time 7000000000\n",
    }
    assert machine.throttled() == 7.0
