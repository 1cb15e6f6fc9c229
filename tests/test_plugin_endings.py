"""However a run ends, no verdict is lost in silence: they are shown and written, or one line says which are missing."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel.conformance import catalogue, pages, report, text
from genmodel.fixtures.active import ERRORS_ONLY

CHECKS = tuple(check.id for check in catalogue.all_checks() if check.group == "interface")
PRELOADED = (evidence_samples, pages, report, text)
SOME = ("-p", "fake_session", "-p", "no:cacheprovider", "-k", "interface")
AT_SIGNATURE = """
    import os
    import signal

    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(item):
        if item.name == "interface.signature[models:right]":
            {}
"""


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this may itself run in one


def errors(result: pytest.RunResult) -> list[str]:
    return [line for line in result.errlines if line.startswith("ERROR: ")]


# --- what a model says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distributed", [(), ("-n", "1")])
def test_text_that_cannot_be_printed_costs_no_verdict(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, distributed: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("LC_ALL", "C")
    written = [f"--genmodel-report=r.{kind}" for kind in ("json", "md", "html")]
    arguments = [*SOME, "--genmodel=models:unprintable", *written, "--junitxml=junit.xml", *distributed]
    result = pytester.runpytest_subprocess(*arguments)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=len(CHECKS) - 4, failed=3, skipped=1)
    assert not {"\x1b", "\0", "\x85", "\u2028"} & set(result.stdout.str())
    for path in ("r.md", "r.html", "junit.xml"):
        assert "half of a pair \\ud800, red, nothing \\x00, and" in Path(path).read_text(encoding="utf-8")
    assert len(ET.parse("junit.xml").getroot()[0]) == len(CHECKS)
    assert len(json.loads(Path("r.json").read_text())["targets"][0]["checks"]) == len(CHECKS)


# --- verdicts that do not arrive -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "status", "missing"),
    [
        ("return True", ERRORS_ONLY, 1),
        ("raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED, len(CHECKS) - 1),
        ("raise OSError('a plugin is broken')", pytest.ExitCode.INTERNAL_ERROR, len(CHECKS) - 1),
        ("pytest.exit('enough', returncode=0)", ERRORS_ONLY, len(CHECKS) - 1),
        ("item.session.shouldstop = 'enough'; return True", pytest.ExitCode.INTERRUPTED, len(CHECKS) - 1),
    ],
    ids=["swallowed", "interrupt", "hook", "exit", "stop"],
)
def test_missing_verdicts_fail_the_run_and_are_named(
    pytester: pytest.Pytester, does: str, status: int, missing: int
) -> None:
    """Those that came are shown and written all the same."""
    pytester.makeconftest(AT_SIGNATURE.format(does))
    arguments = (*SOME, "--genmodel=models:right", "--genmodel-report=r.md", "--genmodel-report=r.json")
    result = pytester.runpytest_inprocess(*arguments, no_reraise_ctrlc=True)

    assert result.ret == status
    (line,) = errors(result)
    assert line.startswith(f"ERROR: {missing} of {len(CHECKS)} verdicts are missing: interface.signature")
    assert line.endswith("of models:right")
    result.stdout.fnmatch_lines(["*= genmodel: models:right =*", "reference *"])
    assert len(json.loads(Path("r.json").read_text())["missing"]) == missing
    assert Path("r.md").read_text().startswith("## 💥 genmodel: the model was not judged in full")


def test_a_run_that_is_stopped_by_a_failure_says_what_it_left_out(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:wrong", "-x")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert errors(result)[0].startswith(f"ERROR: {len(CHECKS) - 2} of {len(CHECKS)} verdicts are missing: ")


@pytest.mark.parametrize("mode", ["load", "each"])
def test_verdicts_missing_from_a_worker_fail_the_run(pytester: pytest.Pytester, mode: str) -> None:
    """Where every worker runs all of them, each has to give all of them."""
    pytester.makeconftest(AT_SIGNATURE.format("return os.environ['PYTEST_XDIST_WORKER'] == 'gw0' or None"))
    result = pytester.runpytest_subprocess(*SOME, "--genmodel=models:right", "-n1", "--dist", mode)

    assert result.ret == ERRORS_ONLY
    assert errors(result) == [f"ERROR: 1 of {len(CHECKS)} verdicts are missing: interface.signature of models:right"]


def test_verdicts_lost_with_a_worker_are_named(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(AT_SIGNATURE.format("os._exit(0)"))
    result = pytester.runpytest_subprocess(*SOME, "--genmodel=models:right", "-n1", "--max-worker-restart=0")

    assert result.ret != pytest.ExitCode.OK
    (line,) = errors(result)
    assert line.startswith(f"ERROR: {len(CHECKS) - 1} of {len(CHECKS)} verdicts are missing: interface.signature")


def test_what_others_skip_is_not_missing(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items[:2]:
                item.add_marker(pytest.mark.skip(reason="not today"))
        """
    )
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:right")

    assert (result.ret, errors(result)) == (pytest.ExitCode.OK, [])


@pytest.mark.parametrize("only", ["--collect-only", "--setup-only", "--setup-plan"])
def test_nothing_is_missing_where_nothing_was_to_be_judged(pytester: pytest.Pytester, only: str) -> None:
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", only)

    assert (result.ret, errors(result)) == (pytest.ExitCode.OK, [])


# --- interrupts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _interrupts_ignored() -> Iterator[None]:
    """As by a shell that starts something in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


@pytest.mark.usefixtures("_interrupts_ignored")
def test_an_interrupt_ends_a_run_in_the_background(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(AT_SIGNATURE.format("os.kill(os.getpid(), signal.SIGINT)"))
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", no_reraise_ctrlc=True)

    assert result.ret == pytest.ExitCode.INTERRUPTED


@pytest.mark.parametrize("distributed", [(), ("-n", "1")])
def test_reports_of_targets_that_are_done_survive_a_kill(
    pytester: pytest.Pytester, distributed: tuple[str, ...]
) -> None:
    """They do not pretend to be of a whole run."""
    pytester.makeconftest(
        AT_SIGNATURE.format("kill_once_written()")
        + """
    import time
    from pathlib import Path

    def pytest_configure(config):
        if not hasattr(config, "workerinput"):
            Path("pid").write_text(str(os.getpid()))

    def kill_once_written():
        patient = time.monotonic() + 60
        while not Path("r.html").exists() and time.monotonic() < patient:
            time.sleep(0.1)
        os.kill(int(Path("pid").read_text()), signal.SIGKILL)
    """
    )
    targets = ("--genmodel=models:wrong", "--genmodel=models:right")
    kept = ("--genmodel-report=r.json", "--genmodel-report=r.html", "--genmodel-save-evidence=kept")
    result = pytester.runpytest_subprocess(*SOME, *targets, *kept, *distributed)

    assert result.ret == -signal.SIGKILL
    written = json.loads(Path("r.json").read_text())
    assert [(target["name"], len(target["checks"])) for target in written["targets"]] == [("models:wrong", len(CHECKS))]
    assert written["targets"][0]["reference"] is not None
    assert {entry["target"] for entry in written["missing"]} == {"models:right"}
    assert "models:wrong does not conform" in Path("r.html").read_text()
    assert len(list(Path("kept").glob("*/evidence.json"))) == 1


# --- what cannot be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/proc/r.md", "No such file or directory"),
        ("full.json", "No space left on device"),
        ("a_file/r.json", "Not a directory"),
    ],
)
def test_a_report_that_cannot_be_written_loses_no_verdict(pytester: pytest.Pytester, name: str, problem: str) -> None:
    Path("full.json").symlink_to("/dev/full")
    Path("a_file").touch()
    result = pytester.runpytest_inprocess(
        *SOME, "--genmodel=models:wrong", f"--genmodel-report={name}", "--genmodel-report=r.json"
    )

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.assert_outcomes(passed=len(CHECKS) - 3, failed=2, skipped=1)
    result.stdout.fnmatch_lines(["*= genmodel: models:wrong =*", "genmodel: wrote *r.json"])
    (line,) = errors(result)
    assert line == f"ERROR: cannot write {Path(name).absolute()}: {problem}"
    assert json.loads(Path("r.json").read_text())["missing"] == []


def test_a_directory_removed_during_the_run_is_made_again(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(AT_SIGNATURE.format("import shutil; shutil.rmtree('out')"))
    Path("out").mkdir()

    assert pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", "--genmodel-report=out/r.json").ret == 0
    assert Path("out/r.json").exists()


def test_a_picture_that_cannot_be_drawn_loses_no_verdict(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(pages, "html", broken)
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", "--genmodel-report=r.html")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert errors(result) == [f"ERROR: cannot make {Path('r.html').absolute()}: RuntimeError: no fonts\\nat all"]
    result.stdout.fnmatch_lines(["*= genmodel: models:right =*"])


def test_a_baseline_is_not_replaced_by_part_of_a_run(pytester: pytest.Pytester) -> None:
    update = ("--genmodel-baseline=b.json", "--genmodel-baseline-update")
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:wrong", "-x", *update)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert errors(result)[0] == f"ERROR: {Path('b.json').absolute()} was not updated: verdicts are missing"
    assert not Path("b.json").exists()


# --- other plugins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["terminal", "logging", "capture", "skipping", "junitxml"])
def test_plugins_of_pytests_own_can_be_left_out(pytester: pytest.Pytester, without: str) -> None:
    assert pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", "-p", f"no:{without}").ret == 0
    assert pytester.runpytest_inprocess(*SOME, "--genmodel=models:wrong", "-p", f"no:{without}").ret == 1


def test_checks_are_not_forked(pytester: pytest.Pytester) -> None:
    """pytest-forked would lose what a report carries; it asks for its option at each test."""
    pytester.makeconftest(
        """
        def pytest_addoption(parser):
            parser.addoption("--forked", action="store_true")

        def pytest_runtest_call(item):
            assert item.config.getoption("forked") is (item.name == "test_interface")
        """
    )
    pytester.makepyfile("def test_interface(): ...")
    result = pytester.runpytest_inprocess(*SOME, "--genmodel=models:right", "--forked", "-p", "no:pytest_forked", ".")

    result.assert_outcomes(passed=len(CHECKS) + 1)


def test_with_the_plugins_that_people_have(pytester: pytest.Pytester) -> None:
    """They reorder, repeat, time and trace tests as soon as they are installed."""
    for name in ("randomly", "rerunfailures", "cov", "asyncio", "forked"):
        pytest.importorskip(f"pytest_{name}")
    active = ("--reruns=1", "--cov=fake_session", "--forked", "--timeout=60", "-W", "error::pytest.PytestWarning")
    quiet = ("-o", "asyncio_default_fixture_loop_scope=function")
    result = pytester.runpytest_subprocess(*SOME, "--genmodel=models:right", "--genmodel=models:wrong", *active, *quiet)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["failed"], outcomes["skipped"]) == (2 * len(CHECKS) - 3, 2, 1)
    assert errors(result) == []
