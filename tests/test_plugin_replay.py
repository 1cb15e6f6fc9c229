"""`--genmodel-save-evidence` and `--genmodel-replay`, on made-up evidence."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel.conformance import catalogue, replay, report, text
from genmodel.runners import archive

PRELOADED = (evidence_samples, archive, replay, report, text)
CHECKS = tuple(check.id for check in catalogue.all_checks() if check.group == "interface")
HERE = Path(__file__).parent

Run = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """pytest with made-up evidence, in this process."""
    return lambda *arguments: pytester.runpytest_inprocess("-p", "fake_session", *arguments)


def test_a_replay_ends_as_the_run_did_and_runs_nothing(run: Run) -> None:
    saving = ("--genmodel=models:wrong", "--genmodel=models:right", "--genmodel-save-evidence=saved")
    first = run(*saving, "--genmodel-report=first.json")
    log = Path("hosts.log").read_text()
    second = run("--genmodel-replay=saved", "--genmodel-report=second.json")

    assert first.ret == second.ret == 1
    assert first.parseoutcomes() == second.parseoutcomes()
    assert Path("hosts.log").read_text() == log
    first.stdout.fnmatch_lines(["genmodel: wrote *first.json, *saved"])
    for name in ("models:right", "models:wrong"):
        assert verdicts("first.json", name) == verdicts("second.json", name)


def verdicts(path: str, name: str) -> list[dict[str, object]]:
    """All that a report says of a target's checks but how long they took."""
    (target,) = (found for found in json.loads(Path(path).read_text())["targets"] if found["name"] == name)
    return [{**check, "seconds": 0} for check in target["checks"]]


def test_a_replay_says_how_the_run_was_made(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngenmodel_top_k = 3\ngenmodel_level = required")
    run("--genmodel=models:right", "--genmodel-save-evidence=saved", "-k", "interface")

    run("--genmodel-replay=saved").stdout.fnmatch_lines(
        [
            "genmodel: models:right",
            "  tox.ini: level=required",
            "  command line: replay=saved",
            "  saved run: tp=1,2, dtype=float32, top-k=10, seed=0, vllm=0.32.0, torch=2.13.0+cpu",
        ]
    )


def test_a_replay_of_part_of_the_suite_has_that_part(run: Run) -> None:
    """Checks without evidence are left out, and counted."""
    run("--genmodel=models:right", "--genmodel-save-evidence=saved", "-k", "interface")

    result = run("--genmodel-replay=saved")
    ran = frozenset[str]().union(*(check.needs for check in catalogue.select(groups=["interface"])))
    covered = [check for check in catalogue.all_checks() if check.needs <= ran]
    result.assert_outcomes(passed=len(covered), deselected=len(catalogue.all_checks()) - len(covered))
    assert set(CHECKS) <= {check.id for check in covered}


def test_a_replay_can_be_of_one_model_and_one_check(run: Run) -> None:
    run("--genmodel=models:right", "--genmodel=models:wrong", "--genmodel-save-evidence=saved", "-k", "interface")

    run("--genmodel-replay=saved", "--genmodel=models:right", "-k", "interface").assert_outcomes(
        passed=len(CHECKS), deselected=len(catalogue.all_checks()) - len(CHECKS)
    )
    run("--genmodel-replay=saved", "genmodel/interface.builds[models:wrong]").assert_outcomes(passed=1)


def test_a_replay_needs_no_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--genmodel=models:right", "--genmodel-save-evidence=saved", "-k", "interface")
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert run("--genmodel=models:right", "-k", "interface").ret == pytest.ExitCode.USAGE_ERROR
    assert run("--genmodel-replay=saved", "-k", "interface").ret == 0


def test_a_replay_imports_no_vllm(pytester: pytest.Pytester, run: Run) -> None:
    run("--genmodel=models:right", "--genmodel-save-evidence=saved")
    pytester.makeconftest(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    assert 'torch' in sys.modules\n"
        "    assert not [m for m in ('vllm', 'transformers') if m in sys.modules]\n"
        "    print('vLLM was not imported')\n"
    )
    pytester.runpytest_subprocess("--genmodel-replay=saved").stdout.fnmatch_lines(["vLLM was not imported"])


def test_fixtures_replay_too(run: Run, pytester: pytest.Pytester) -> None:
    run("--genmodel=models:right", "--genmodel-save-evidence=saved")
    pytester.makepyfile(
        """
        def test_mine(genmodel_target, genmodel_evidence):
            assert genmodel_target.spec == "models:right"
            assert genmodel_evidence.traces["plain", 2]
        """
    )
    result = run("--genmodel-replay=saved", "-k", "test_mine or interface", "-v", ".")

    result.assert_outcomes(passed=len(CHECKS) + 1, deselected=len(catalogue.all_checks()) - len(CHECKS))
    result.stdout.fnmatch_lines(["*::test_mine[[]models:right[]] PASSED*"])


def test_the_printed_command_replays(run: Run) -> None:
    run("--genmodel=models:wrong", "--genmodel-save-evidence=saved", "-k", "interface")
    shown = run("--genmodel-replay=saved", "-k", "interface").stdout.str()

    assert "'genmodel/interface.signature[models:wrong]' --genmodel=models:wrong --genmodel-replay=saved\n" in shown


def test_saving_is_not_part_of_the_printed_command(run: Run) -> None:
    shown = run("--genmodel=models:wrong", "--genmodel-save-evidence=saved", "-k", "interface").stdout.str()

    assert "'genmodel/interface.signature[models:wrong]' --genmodel=models:wrong\n" in shown


def test_xdist_saves_and_replays(pytester: pytest.Pytester) -> None:
    both = ("--genmodel=models:right", "--genmodel=models:wrong")
    saving = pytester.runpytest_subprocess(
        "-p", "fake_session", "-n", "2", *both, "--genmodel-save-evidence=saved", "-k", "interface"
    )
    replayed = pytester.runpytest_subprocess("-n", "2", "--genmodel-replay=saved", "-k", "interface")

    assert len(list(Path("saved").iterdir())) == 2
    assert saving.parseoutcomes() == replayed.parseoutcomes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--genmodel-replay=nowhere",), "--genmodel-replay: no such directory: nowhere"),
        (("--genmodel-replay=empty",), "--genmodel-replay: no saved evidence in *empty: no */evidence.json"),
        (
            ("--genmodel-replay=saved", "--genmodel=a:b"),
            "--genmodel-replay: no saved run of a:b; there are models:right",
        ),
        (("--genmodel-replay=saved", "--genmodel-tp=1"), "--genmodel-tp cannot be chosen for a replay: *"),
        (("--genmodel-replay=saved", "--genmodel-save-evidence=x"), "--genmodel-save-evidence: a replay has nothing *"),
        (("--genmodel=models:right", "--genmodel-save-evidence=file"), "--genmodel-save-evidence: file is a file; *"),
        (("--genmodel-replay=damaged",), "cannot use *evidence.json: *"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_one_line(
    run: Run, pytester: pytest.Pytester, arguments: tuple[str, ...], message: str
) -> None:
    pytester.mkdir("empty")
    pytester.path.joinpath("file").touch()
    for folder in ("saved", "damaged"):
        run("--genmodel=models:right", f"--genmodel-save-evidence={folder}", "-k", "interface.builds")
    (tensors,) = Path("damaged").glob("*/tensors.safetensors")
    tensors.write_bytes(b"{}")
    result = run(*arguments)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stdout.str() + result.stderr.str()
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
