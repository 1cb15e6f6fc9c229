"""Hosts outlive what models do to them, every fault is told with its cause, and nothing outlives the hosts."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners import pool
from genmodel.runners.evidence import Evidence, Failure
from genmodel.runners.leftovers import SEGMENTS, descendants
from genmodel.runners.protocol import LONGEST_TEXT
from genmodel.runners.session import TOO_MANY_TIMEOUTS, Session, TargetOptions, UnusableTarget

SOON = 6.0
"""Seconds that a phase of a model that will not end may take."""

ENGINE = r"while generating \(plain\)"
FAULTS: tuple[tuple[str, int, str, str, str], ...] = (
    # target, tensor-parallel size, kind of failure, message, details
    ("forward.segfault", 1, "died", f"host 0 died with SIGSEGV {ENGINE}", "in segfault"),
    ("forward.segfault", 2, "died", f"host 1 died with SIGSEGV {ENGINE}", "in segfault"),
    ("forward.abort", 1, "died", f"host 0 died with SIGABRT {ENGINE}", "in abort"),
    ("forward.leave", 1, "died", f"host 0 exited with status 3 {ENGINE}", ""),
    ("forward.leave", 2, "died", f"host 1 exited with status 3 {ENGINE}", ""),
    ("forward.leave_quietly", 1, "died", f"host 0 exited with status 0 {ENGINE}", ""),
    ("forward.kill", 2, "died", f"host 1 died with SIGKILL {ENGINE}", ""),
    ("forward.terminate", 1, "died", f"host 0 died with SIGTERM {ENGINE}", ""),
    ("forward.close_files", 1, "died", rf"host 0 .* {ENGINE}", ""),
    ("forward.interrupt", 1, "raised", "KeyboardInterrupt", "in interrupt"),
    ("forward.interrupt", 2, "raised", "KeyboardInterrupt", "in interrupt"),
    ("forward.ask_to_exit", 1, "raised", "SystemExit: enough", "in ask_to_exit"),
    ("forward.fail", 2, "raised", "FloatingPointError: on this rank only", "in fail"),
    ("compute_logits.fail", 1, "raised", "FloatingPointError: on this rank only", "in fail"),
    ("loading.fail", 2, "raised", "FloatingPointError: on this rank only", "in load_weights"),
    ("loading.segfault", 1, "died", "host 0 died with SIGSEGV while starting the engine", "in load_weights"),
    ("forward.exhaust", 1, "raised", "can't allocate memory", "in exhaust"),
    ("forward.loop", 1, "timeout", f"host 0 gave no answer within 6 s, {ENGINE}", "in loop"),
    ("forward.block", 2, "timeout", f"host 1 gave no answer within 6 s, {ENGINE}", "in block"),
    ("forward.wait_for_others", 2, "timeout", f"host [01] gave no answer within 6 s, {ENGINE}", ""),
    ("factory.fail", 1, "raised", "FloatingPointError: on this rank only", "in fail"),
    ("factory.kill", 1, "died", "host 0 died with SIGKILL while inspecting the target", ""),
    ("factory.sleep", 1, "timeout", "host 0 gave no answer within 6 s, while inspecting the target", "in sleep"),
    ("training.segfault", 1, "died", "host 0 died with SIGSEGV while inspecting the target", "in segfault"),
    ("factory.send_pickle", 1, "died", r"host 0 sent what is no message of its own \(it begins with b'\\x00", ""),
    (
        "factory.send_length",
        1,
        "died",
        r"no message of its own \(it says that it is 4611686018428436480 bytes long\)",
        "",
    ),
    ("factory.send_rubbish", 1, "died", r"host 0 sent what is no message of its own \(it begins with", ""),
    ("factory.send_nonsense", 1, "died", r"no message of its own \(it is none that a host sends\)", ""),
    ("factory.send_half", 1, "timeout", "host 0 gave no more than half of an answer within 6 s", "in send_half"),
    ("factory.signal_in_real_time", 1, "died", "host 0 died with real-time signal 40 while inspecting", ""),
    ("factory.fail_in_circles", 1, "raised", "^ValueError: first", "in fail_in_circles"),
    (
        "factory.fail_at_length",
        1,
        "raised",
        r"^ValueError: \\x1b\[2J\\x00\\udc80.* characters \.\.\.\] ",
        "in fail_at_length",
    ),
    ("factory.fail_without_text", 1, "raised", r"^Mute: \(and its text cannot be had: SystemExit\)", "in fail_without"),
)

PLACES = {
    "build": ("while starting the engine", "in on_last_rank"),
    "loading": ("while starting the engine", "in load_weights"),
    "serving": (r"while generating \(deployed\)", "in acting"),
}
"""Where a deployed engine meets a fault, what it was doing then, and a frame of it."""
DEPLOYED_FAULTS: tuple[tuple[str, str, str, str], ...] = (
    # fault, kind of failure, message (PHASE stands for what the engine was doing), details
    ("segfault", "died", "worker 1 died with SIGSEGV PHASE", "in segfault"),
    ("abort", "died", "worker 1 died with SIGABRT PHASE", "in abort"),
    ("leave", "died", "worker 1 exited with status 3 PHASE", ""),
    ("leave_quietly", "died", "worker 1 exited with status 0 PHASE", ""),
    ("kill", "died", "worker 1 died with SIGKILL PHASE", ""),
    ("terminate", "raised", "SystemExit", "in terminate"),
    ("interrupt", "raised", "KeyboardInterrupt", "in interrupt"),
    ("ask_to_exit", "raised", "SystemExit: enough", "in ask_to_exit"),
    ("fail", "raised", "FloatingPointError: on this rank only", "in fail"),
    ("exhaust", "raised", "can't allocate memory", "in exhaust"),
    ("close_files", "(died|raised)", "(worker 1 .* PHASE|Bad file descriptor)", ""),
)

CHANGES = (
    "forward.close_output",
    "forward.write_garbage",
    "factory.change_directory",
    "forward.change_dtype",
    "factory.change_dtype",
    "factory.change_device",
    "forward.change_seeds",
    "forward.change_threads",
    "factory.change_environment",
    "factory.change_gradients",
    "factory.change_signals",
    "factory.change_interpreter",
    "factory.leave_threads",
    "forward.leave_children",
    "factory.leave_files",
    "mutates_config",
    "differs_each_time",
)
"""What changes the process, or leaves something in it; not all of it fails."""


def options(target: str, *sizes: int, timeout: float | None = None) -> TargetOptions:
    spec = target if ":" in target else f"fatal_targets:{target}"
    return TargetOptions(spec=spec, tensor_parallel_sizes=sizes or (1,), timeout=timeout)


HEALTHY = options("genmodel.reference_models.dense:factory", 1, 2)


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def of_pool(directory: Path) -> list[str]:
    """Command lines of the processes that have the pool's directory in the environment they began with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(directory).encode() in path.read_bytes():
                found.append(command_line(int(path.parent.name)))
        except OSError:
            continue
    return found


def gone(find: Callable[[], object], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while find() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not find()


def shared(directory: Path) -> list[str]:
    return [path.name for path in SEGMENTS.iterdir() if directory.name in path.name]


@pytest.fixture
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Session], Path]]:
    """Count what a session leaves behind; to be told of the session."""
    ports = tmp_path / "ports"
    ports.touch()
    monkeypatch.setenv("FATAL_PORTS", str(ports))
    before, sessions = descendants(os.getpid()), []

    def watch(session: Session) -> Path:
        assert session._pool is not None
        sessions.append(session._pool.directory)
        return session._pool.directory

    yield watch
    (directory,) = sessions
    assert descendants(os.getpid()) == before
    assert of_pool(directory) == []
    assert shared(directory) == []
    assert not directory.exists()
    for port in ports.read_text().split():
        socket.create_server(("", int(port))).close()


def failure_of(evidence: Evidence) -> Failure:
    (found,) = evidence.traces.values()
    assert isinstance(found, Failure), found
    return found


def test_every_fault_is_told_and_the_next_model_is_judged_as_ever(
    nothing_is_left: Callable[[Session], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signal, rank, phase and the model's own frames; afterwards the healthy model passes on both sizes."""
    monkeypatch.setenv("FATAL_TRACE", str(tmp_path / "unpickled"))
    asked = [options(name, size, timeout=SOON if kind == "timeout" else None) for name, size, kind, *_ in FAULTS]
    with Session([*asked, HEALTHY]) as session:
        directory = nothing_is_left(session)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        for chosen, (name, size, kind, message, details) in zip(asked, FAULTS, strict=True):
            found = failure_of(session.collect(chosen, {"plain"}))
            assert found.kind == kind, (name, found)
            assert re.search(message, found.message), (name, found)
            assert found.scenario == "plain"
            assert details in found.details, (name, found.details)
            assert details == "" or "fatal_targets.py" in found.details
            if name != "forward.wait_for_others":
                assert found.rank == size - 1, (name, found)
            assert found.phase, found
            assert found.message.isprintable()
            assert len(found.message) + len(found.details) < 2 * LONGEST_TEXT
        assert not (tmp_path / "unpickled").exists()
        evidence = session.collect(HEALTHY, {"plain", "reference"})
        verdict = catalogue.judge(catalogue.get("logits.values"), evidence)
        assert verdict.status is Status.PASSED, verdict


def test_what_a_model_does_to_its_process_ends_with_it(nothing_is_left: Callable[[Session], Path]) -> None:
    """A witness, built after each, sees the process that the first one saw, and the engines' ports are free."""
    asked = [options(name) for name in CHANGES]
    witnesses = [options("witness") for _ in range(len(CHANGES) + 1)]
    with Session([*asked, *witnesses]) as session:
        directory = nothing_is_left(session)

        def seen(chosen: TargetOptions) -> str:
            found = session.collect(chosen, {"inspection"}).inspection
            assert not isinstance(found, Failure | None), found
            return found.model_class

        expected = seen(witnesses[0])
        for name, chosen, witness in zip(CHANGES, asked, witnesses[1:], strict=True):
            evidence = session.collect(chosen, {"plain"})
            assert evidence.traces, name
            assert seen(witness) == expected, name
            assert shared(directory) == [], name
            assert not [line for line in of_pool(directory) if "sleep" in line], name


@pytest.mark.parametrize("place", PLACES)
def test_every_fault_in_a_deployed_engine_is_told(nothing_is_left: Callable[[Session], Path], place: str) -> None:
    """Of the worker where it happened: signal or exit status, rank, phase and the model's own frames."""
    phase, frame = PLACES[place]
    asked = [options(f"{place}.{fault}", 2) for fault, *_ in DEPLOYED_FAULTS]
    with Session(asked) as session:
        nothing_is_left(session)
        for chosen, (fault, kind, message, details) in zip(asked, DEPLOYED_FAULTS, strict=True):
            found = failure_of(session.collect(chosen, {"deployed"}))
            assert re.fullmatch(kind, found.kind), (fault, found)
            assert re.search(message.replace("PHASE", phase), found.message), (fault, found)
            assert found.rank == 1, (fault, found)
            assert details in found.details, (fault, found.details)
            assert details == "" or frame in found.details, (fault, found.details)


def test_a_fault_in_an_engine_of_one_rank_is_told() -> None:
    """On CPU in its one worker; elsewhere the engine's core has the model."""
    dies, fails = options("serving.segfault"), options("loading.fail")
    with Session([dies, fails]) as session:
        found = failure_of(session.collect(dies, {"deployed"}))
        assert re.fullmatch(
            r"(worker 0|the engine's core) died with SIGSEGV while generating \(deployed\)", found.message
        ), found
        assert (found.kind, found.rank) == ("died", 0)
        assert "in segfault" in found.details
        found = failure_of(session.collect(fails, {"deployed"}))
        assert (found.kind, found.message) == ("raised", "FloatingPointError: on this rank only")
        assert "in load_weights" in found.details


def test_what_may_only_be_slow_is_not_blamed_and_shows_where_it_was() -> None:
    """One call after another, in a host and in a worker for which a host waits."""
    inspected, deployed = options("factory.call_for_ever", timeout=SOON), options("serving.call_for_ever", timeout=20.0)
    with Session([inspected, deployed]) as session:
        evidence = session.collect(inspected, {"inspection"})
        failures = [evidence.inspection, failure_of(session.collect(deployed, {"deployed"}))]
    for found, name in zip(failures, ("host 0", "(worker 0|the engine's core)"), strict=True):
        assert isinstance(found, Failure)
        assert found.kind == "slow", found
        assert re.match(rf"{name} gave no answer .*, but it was getting on .*: raise --genmodel-timeout", found.message)
        assert "in call_for_ever" in found.details, found
    verdict = catalogue.judge(catalogue.get("interface.builds"), evidence)
    assert verdict.status is Status.ERROR
    assert "in call_for_ever" in verdict.details


def test_a_worker_that_hangs_is_named() -> None:
    """Rank and frames of the one that computes, not of the one that waits for it."""
    hangs = {name: options(f"serving.{name}", 2, timeout=20.0) for name in ("loop", "block", "wait_for_others")}
    with Session(hangs.values()) as session:
        for name, chosen in hangs.items():
            found = failure_of(session.collect(chosen, {"deployed"}))
            ranks = (0, 1) if name == "wait_for_others" else (1,)
            assert found.kind == "timeout", (name, found)
            assert found.rank in ranks, (name, found)
            assert found.message == f"worker {found.rank} gave no answer within 20 s, while generating (deployed)"
            assert len(ranks) == 2 or f"in {name}" in found.details, (name, found.details)


@contextlib.contextmanager
def hardly_running(session: Session, share: float) -> Iterator[None]:
    """Give the hosts this share of the time, as a machine with too much to do would."""
    ended = threading.Event()

    def stop_and_go() -> None:
        while not ended.is_set():
            for number, seconds in ((signal.SIGSTOP, 0.1 * (1 - share)), (signal.SIGCONT, 0.1 * share)):
                for host in filter(None, session._pool._hosts):  # type: ignore[union-attr]
                    if host.process.pid is not None and host.process.returncode is None:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(host.process.pid, number)
                ended.wait(seconds)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize("size", [1, 2])
def test_a_slow_machine_is_not_the_models_fault(nothing_is_left: Callable[[Session], Path], size: int) -> None:
    """A model that is right and gets a twentieth of the machine: an error of the run, with what to do."""
    chosen = options(HEALTHY.spec, size, timeout=120.0)
    with Session([chosen]) as session:
        nothing_is_left(session)
        assert not isinstance(session.collect(chosen, {"inspection"}).inspection, Failure | None)
        session._targets[chosen]._deadline = 3.0
        with hardly_running(session, 0.05):
            evidence = session.collect(chosen, {"plain", "alone"})
    assert {found.kind for found in evidence.traces.values() if isinstance(found, Failure)} == {"slow"}
    verdict = catalogue.judge(catalogue.get("scheduling.max_model_len"), evidence)
    assert verdict.status is Status.ERROR
    assert re.search(
        r"host \d gave no answer within 3 s, .* getting on \(it had .* cores.*\): raise --genmodel-timeout",
        verdict.reason,
    )


def test_what_a_killed_model_shared_is_unlinked(
    nothing_is_left: Callable[[Session], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory and semaphores that it did not name, though the tracker that knows of them was killed, too."""
    told = tmp_path / "shared"
    monkeypatch.setenv("FATAL_SHARED", str(told))
    strangers = [SEGMENTS / f"{name}{os.getpid()}" for name in ("psm_", "sem.mp-", "psm_0-", "psm_genmodel-")]
    for stranger in strangers:
        stranger.touch()
    chosen = options("factory.leave_shared_and_die")
    with Session([chosen]) as session:
        directory = nothing_is_left(session)
        session.collect(chosen, {"inspection"})
        names = told.read_text().split()
        assert all(directory.name in name for name in names)
        assert [name for name in names if (SEGMENTS / name).exists()] == []
    assert all(stranger.exists() for stranger in strangers)
    for stranger in strangers:
        stranger.unlink()


def test_a_model_that_removes_the_pools_files_refuses_nobody_else(
    nothing_is_left: Callable[[Session], Path],
) -> None:
    """Nor does one that puts something else in the place of its log."""
    removes, replaces = options("factory.remove_everything_and_fail"), options("factory.replace_log_and_die")
    with Session([replaces, removes, HEALTHY]) as session:
        directory = nothing_is_left(session)
        for chosen, kind in ((replaces, "died"), (removes, "raised")):
            found = session.collect(chosen, {"inspection"}).inspection
            assert isinstance(found, Failure)
            assert found.kind == kind
        evidence = session.collect(HEALTHY, {"plain", "reference"})
        assert catalogue.judge(catalogue.get("logits.values"), evidence).status is Status.PASSED
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_scenario_that_fails_leaves_the_others_their_verdicts() -> None:
    """Those before it are kept, those after it go on in new hosts, and after some timeouts no more are begun."""
    late, dying = options("later.sleep", timeout=SOON), options("later.kill")
    scenarios = ("plain", "alone", "arrivals", "cached", "chunked")
    with Session([late, dying]) as session:
        for chosen, kind in ((late, "timeout"), (dying, "died")):
            traces = session.collect(chosen, scenarios).traces
            failed = {name: found for (name, _), found in traces.items() if isinstance(found, Failure)}
            assert {name for name, _ in traces} == set(scenarios)
            assert "plain" not in failed
            assert failed["alone"].kind == kind
            assert all(found.scenario == name for name, found in failed.items())


def test_hangs_are_bounded() -> None:
    """A model that always hangs costs so many deadlines, and every scenario has a failure that says so."""
    chosen = options("forward.sleep", timeout=SOON)
    scenarios = ("plain", "alone", "arrivals", "cached", "chunked", "preempted")
    with Session([chosen]) as session:
        found = list(session.collect(chosen, scenarios).traces.values())
    assert [failure.kind for failure in found if isinstance(failure, Failure)] == ["timeout"] * len(scenarios)
    assert sum("gave no answer" in failure.message for failure in found) == TOO_MANY_TIMEOUTS  # type: ignore[union-attr]
    assert sum("not run, after" in failure.message for failure in found) == len(scenarios) - TOO_MANY_TIMEOUTS  # type: ignore[union-attr]


RANDOM_FAULTS = (
    *(f"factory.{name}" for name in ("segfault", "abort", "leave", "leave_quietly", "kill", "terminate", "interrupt")),
    *(f"factory.{name}" for name in ("ask_to_exit", "fail", "exhaust", "close_files", "leave_everything_and_die")),
    *(f"training.{name}" for name in ("segfault", "leave", "fail", "leave_everything_and_die")),
    *(f"factory.{name}" for name in ("leave_children", "leave_files")),
)


def test_a_hundred_random_faults_lose_no_verdict_and_leave_nothing(nothing_is_left: Callable[[Session], Path]) -> None:
    """Each in inspection or training, as a random number generator has it, in one session."""
    generator = random.Random(0)
    asked = [options(generator.choice(RANDOM_FAULTS)) for _ in range(100)]
    checks = [check for check in catalogue.all_checks() if check.needs <= {"inspection", "gradients"}]
    assert len(checks) > 10
    with Session(asked) as session:
        directory = nothing_is_left(session)
        for chosen in asked:
            evidence = session.collect(chosen, {"inspection", "gradients"})
            verdicts = [catalogue.judge(check, evidence) for check in checks]
            lost = [(chosen.spec, verdict) for verdict in verdicts if verdict.status is Status.ERROR]
            assert lost == []
        # Launcher, fork server, its resource tracker and the last model's host.
        assert len(of_pool(directory)) <= 6, of_pool(directory)
        assert len([path for path in directory.iterdir() if path.is_dir() and path.name.isdigit()]) <= 1


@pytest.mark.parametrize("target", ["gives_nan", "gives_infinity"])
def test_logits_that_are_not_numbers_agree_with_nothing(target: str) -> None:
    """All checks of logits fail, but those that ask only whether the reference resolves anything."""
    chosen = options(target)
    with Session([chosen]) as session:
        evidence = session.collect(chosen, {"plain", "alone", "reference", "inspection"})
    judged = {
        check.id: catalogue.judge(check, evidence).status
        for check in catalogue.all_checks()
        if check.group == "logits" and not check.tensor_parallel
    }
    passed = {name for name, status in judged.items() if status is Status.PASSED}
    assert passed <= {"logits.resolution"}, judged


# --- the end of pytest ---------------------------------------------------------------------------------------------


HANGING = (
    "-m pytest -p no:cacheprovider -k interface.builds --genmodel-tp=1 "
    "--genmodel=fatal_targets:factory.leave_everything_and_hang"
)


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM], [signal.SIGKILL]],
    ids=["interrupt", "interrupt twice", "terminate", "kill"],
)
def test_hosts_end_with_pytest_however_it_ends(tmp_path: Path, signals: list[signal.Signals]) -> None:
    """While a model hangs that has left children: they, its host and all temporary files go within seconds."""
    output = tmp_path / "output"
    with output.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, *shlex.split(HANGING)],
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=file,
            stderr=file,
            # A shell lets what it starts in the background ignore SIGINT, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one thread
        )
    try:
        assert gone(lambda: not list(tmp_path.glob("genmodel-*/*/hangs")), 200.0), output.read_text()
        (directory,) = tmp_path.glob("genmodel-*")
        assert [line for line in of_pool(directory) if "sleep" in line]
        for number in signals:
            run.send_signal(number)
            time.sleep(0.2)
        run.wait(20)
    finally:
        run.kill()
        run.wait()
    assert gone(lambda: of_pool(directory)), of_pool(directory)
    assert gone(directory.exists)
    assert shared(directory) == []
    assert "INTERNALERROR" not in output.read_text()


# --- no room -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory on a device of 256 KiB of its own, less than a checkpoint takes."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no permission to mount")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk_is_one_line(small_disk: Path) -> None:
    """Met while the checkpoint is written, it is not the model's fault, and TMPDIR is named."""
    with Session([HEALTHY]) as session, pytest.raises(UnusableTarget, match=r"no space left on .*TMPDIR") as raised:
        session.collect(HEALTHY, {"inspection"})
    assert "\n" not in str(raised.value)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_temporary_directory_that_cannot_be_written_is_one_line(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It and all that Python would take instead."""
    if what == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    else:
        with pytest.raises(OSError, match="No space"):
            (small_disk / "all").write_bytes(bytes(1 << 20))
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(small_disk)])
    with pytest.raises(UnusableTarget, match=r"cannot write to .*TMPDIR") as raised:
        Session([HEALTHY]).start()
    assert "\n" not in str(raised.value)


# --- the pool's small laws -----------------------------------------------------------------------------------------


def test_a_log_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that prints for ever does not fill the disk; what comes after is still seen."""
    monkeypatch.setattr(pool, "LONGEST_LOG", 100)
    log = tmp_path / "log"
    log.write_text("x" * 101)
    host = pool._Host(None, None, log, tmp_path, log_start=50)  # type: ignore[arg-type]
    pool._shorten(host)
    assert log.stat().st_size == 0
    log.write_text("the end")
    assert pool._read(log, host.log_start) == "the end"


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "LONGEST_READ", 10)
    log = tmp_path / "log"
    log.write_bytes(b"\xff" * 1000 + b"0123456789")
    assert pool._read(log, 3) == "0123456789"


@pytest.fixture
def limited_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A control group of little memory that hosts may join; for that one has to be root."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = root / ("memory" if version_1 else "") / f"genmodel-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(1 << 28))
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    monkeypatch.setenv("LIMITED_GROUP", str(group))
    yield group
    group.rmdir()


@pytest.mark.usefixtures("limited_group")
def test_the_kernel_kills_a_model_that_has_no_memory_left() -> None:
    """A real kill, under a limit of 256 MiB, on one rank of two; the next model is judged as ever."""
    dies = options("forward.fill", 2)
    with Session([dies, HEALTHY]) as session:
        (found,) = session.collect(dies, {"plain"}).traces.values()
        assert isinstance(found, Failure)
        assert (found.kind, found.rank) == ("died", 1)
        assert "host 1 was killed by the kernel, which ran out of memory, while generating (plain)" in found.message
        evidence = session.collect(HEALTHY, {"plain", "reference"})
        assert catalogue.judge(catalogue.get("logits.values"), evidence).status is Status.PASSED


def test_a_kill_for_lack_of_memory_is_called_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel counts them; any other SIGKILL is just that."""
    host = pool._Host(None, None, tmp_path / "log", tmp_path, kills=3)  # type: ignore[arg-type]
    monkeypatch.setattr(pool, "_kills", lambda: 4)
    assert pool._ended(-signal.SIGKILL, host) == "was killed by the kernel, which ran out of memory,"
    monkeypatch.setattr(pool, "_kills", lambda: 3)
    assert pool._ended(-signal.SIGKILL, host) == "died with SIGKILL"
