"""Sessions that run at once share the machine, and find what one alone would find."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genmodel.runners import machine
from genmodel.runners.machine import Share, TooSmall
from genmodel.runners.pool import Pool

MODELS = ("genmodel.reference_models.dense:factory", "genmodel.reference_models.gpt:factory")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CUDA devices and 16 cores, as far as this package asks."""
    monkeypatch.setattr(machine, "_cores", lambda: set(range(16)))
    monkeypatch.setattr(machine, "_cuda_devices", lambda: [str(i) for i in range(8)])


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen cores and vLLM for CPU."""
    monkeypatch.setattr(machine, "_cores", lambda: set(range(16)))
    monkeypatch.setattr(machine, "_cuda_devices", lambda: None)


@pytest.mark.usefixtures("cuda")
def test_devices_are_divided() -> None:
    """No device is in two shares, and a replaced worker gets those of the one it replaces."""
    found = [machine.environment(2, Share(index, 3)) for index in range(4)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in found] == ["0,1", "2,3", "4,5", "0,1"]
    assert {share["OMP_NUM_THREADS"] for share in found} == {"2"}
    assert machine.sessions(2) == 4


@pytest.mark.usefixtures("cuda")
def test_too_few_devices() -> None:
    """The message says how many workers would be right."""
    with pytest.raises(TooSmall, match="5 workers of 2 ranks need 10 CUDA devices, and there are 8: -n 4, or -n auto"):
        machine.environment(2, Share(0, 5))
    with pytest.raises(TooSmall, match="there are 8 CUDA devices: --genmodel-tp takes sizes up to 8"):
        machine.environment(16, Share())


def test_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says in one line that it is one, and which size it is for."""
    monkeypatch.setattr(machine, "_cuda_devices", lambda: ["0"])
    with pytest.raises(TooSmall, match="there is 1 CUDA device: --genmodel-tp takes sizes up to 1"):
        machine.environment(2, Share())


def test_a_default_engine_has_no_more_ranks_than_devices() -> None:
    """On CPU, any number; on CUDA a pipeline of two stages needs two devices at TP=1."""
    for devices, most in ((None, sys.maxsize), ("3", 1), ("0,1", 2)):
        pool = Pool(1, {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        pool.close()
        assert pool.deployable == most


@pytest.mark.usefixtures("cpu")
def test_cores_are_divided() -> None:
    """Each rank gets a core at least, of a session alone or of several."""
    assert machine.environment(2, Share()) == {"OMP_NUM_THREADS": "8"}
    assert machine.environment(2, Share(1, 4)) == {"OMP_NUM_THREADS": "2"}
    assert machine.environment(2, Share(1, 40)) == {"OMP_NUM_THREADS": "1"}
    assert machine.sessions(4) == 4
    with pytest.raises(TooSmall, match="16 CPU cores"):
        machine.environment(17, Share())


def test_visible_devices_are_the_only_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM is the CUDA build, CUDA_VISIBLE_DEVICES says which there are."""
    monkeypatch.setattr(machine.importlib.metadata, "distributions", lambda **_: [type("D", (), {"name": "vllm"})])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert machine.environment(2, Share())["CUDA_VISIBLE_DEVICES"] == "3,5"


# --- what the machine lacks ----------------------------------------------------------------------------------------

RUN = (
    "import sys; from genmodel.runners.session import Session, TargetOptions, UnusableTarget\n"
    "try: Session([TargetOptions(spec='no:model')]).start()\n"
    "except UnusableTarget as error: print(error)"
)


def said(*before: str, program: str = RUN, **variables: str) -> str:
    """What a program prints, such as a session that starts, after commands of a shell, in namespaces of its own."""
    command = " && ".join([*before, f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"])
    unshared = ["unshare", "-m", "-n", "sh", "-c", f"{'' if 'lo' in variables else 'ip link set lo up && '}{command}"]
    if subprocess.run(["unshare", "-m", "-n", "ip", "link", "set", "lo", "up"], check=False).returncode:
        pytest.skip("no permission for namespaces, or no ip command")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    return subprocess.run(unshared, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("before", "variables", "expected"),
    [
        (
            ["mount -t tmpfs -o size=64k tmpfs /dev/shm"],
            {},
            r"/dev/shm has 0\.1 MiB left, .* needed: docker run --shm-size=1g",
        ),
        (["ulimit -n 64"], {}, "a process may open 64 files here, and 256 are needed: ulimit -n 256"),
        ([], {"lo": "down"}, r"ranks cannot meet at 127\.0\.0\.1 \(Network is unreachable\): ip link set lo up"),
        ([], {"GLOO_SOCKET_IFNAME": "eth7"}, "GLOO_SOCKET_IFNAME names .* not there, eth7: unset it, or .* lo"),
    ],
)
def test_what_is_lacking_is_one_line(before: list[str], variables: dict[str, str], expected: str) -> None:
    """Before anything starts."""
    line = said(*before, **variables)
    assert re.search(expected, line), line
    assert line.count("\n") <= 1


def test_dockers_shared_memory_is_enough() -> None:
    """64 MiB, for two ranks; nothing is left in it."""
    program = (
        "from genmodel.runners.session import Session, TargetOptions; import os\n"
        "chosen = TargetOptions(spec='genmodel.reference_models.dense:factory')\n"
        "with Session([chosen]) as session:\n"
        "    found = session.collect(chosen, {'plain'}).traces\n"
        "print(*(type(traces).__name__ for traces in found.values()), os.listdir('/dev/shm'))"
    )
    output = said("mount -t tmpfs -o size=64m tmpfs /dev/shm", program=program)
    assert output == "tuple tuple []\n"


@pytest.mark.usefixtures("cpu")
def test_threads_are_as_many_as_there_is_shared_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB, which is Docker's default, are enough for some."""
    monkeypatch.setattr(machine, "_shared_room", lambda: 64 << 20)
    assert machine.environment(2, Share()) == {"OMP_NUM_THREADS": "3", **machine.SMALL_QUEUES}
    assert machine.environment(1, Share()) == {"OMP_NUM_THREADS": "16", **machine.SMALL_QUEUES}
    with pytest.raises(TooSmall, match=r"/dev/shm has 64\.0 MiB left, and 80 are needed"):
        machine.environment(8, Share())


def test_auto_starts_a_worker_for_each_model(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as cores go round; other tests' -n auto is left alone."""
    monkeypatch.setattr(machine, "_cuda_devices", lambda: None)
    models = [f"--genmodel=models:{name}" for name in ("right", "right2", "right3")]
    pytester.makepyfile("def test_nothing(): ...")
    for cores, workers in ((2, 1), (4, 2), (64, 3)):
        monkeypatch.setattr(machine, "_cores", lambda cores=cores: set(range(cores)))
        config = pytester.parseconfig("-p", "fake_session", *models)
        assert config.hook.pytest_xdist_auto_num_workers(config=config) == workers


def test_two_workers_find_what_one_process_finds(pytester: pytest.Pytester) -> None:
    """Two sessions with real engines at once: the same verdicts in one report, on numbers within one noise floor."""
    checks = "logits.values or tensor_parallel or deployment.multiprocess or refit.changed or gradients.parallel"
    runs = {}
    for how in (["-n", "2"], ["-p", "no:xdist"]):
        report = pytester.path / f"{len(how[1])}.json"
        arguments = [
            *how,
            *(f"--genmodel={name}" for name in MODELS),
            "-k",
            checks,
            f"--genmodel-report={report}",
            "-q",
        ]
        result = pytester.runpytest_subprocess(*arguments, "-p", "no:cacheprovider")
        assert result.ret == 0, result.outlines[-20:]
        runs[how[0]] = _verdicts(report)
    assert [name for name, _ in runs["-n"]] == list(MODELS)
    for (_, ours), (_, theirs) in zip(runs["-n"], runs["-p"], strict=True):
        assert [check["status"] for check in ours] == [check["status"] for check in theirs]
        for measured, alone in zip(*map(_measurements, (ours, theirs)), strict=True):
            assert (measured["what"], measured["where"]) == (alone["what"], alone["where"])
            # Where rounding falls depends on where memory lies; a tolerance is four noise floors.
            assert abs(measured["measured"] - alone["measured"]) <= alone["allowed"] / 4, (measured, alone)


def _verdicts(report: Path) -> list[tuple[str, Any]]:
    return [(target["name"], target["checks"]) for target in json.loads(report.read_text())["targets"]]


def _measurements(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [measurement for check in checks for measurement in check["measurements"]]
