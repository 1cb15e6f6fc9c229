"""A run of the packaged suite on made-up evidence: what is selected, how it ends, and what is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel.conformance import catalogue, report, text
from genmodel.conformance.verdict import Level
from genmodel.fixtures.active import ERRORS_ONLY
from genmodel.fixtures.distribution import target_of

CHECKS = tuple(check.id for check in catalogue.all_checks() if check.group == "interface")
HERE = Path(__file__).parent

Suite = Callable[..., pytest.RunResult]

PRELOADED = (evidence_samples, report, text)


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this may itself run in one


@pytest.fixture
def suite(pytester: pytest.Pytester) -> Suite:
    """Run the interface checks on made-up evidence in this process."""

    def run(*arguments: str, target: str = "models:right") -> pytest.RunResult:
        return pytester.runpytest_inprocess("-p", "fake_session", "-k", "interface", f"--genmodel={target}", *arguments)

    return run


@pytest.fixture
def recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make interface.vllm_accepts a recommended check."""
    checks = tuple(
        replace(check, level=Level.RECOMMENDED) if check.id == "interface.vllm_accepts" else check
        for check in catalogue.all_checks()
    )
    monkeypatch.setattr(catalogue, "all_checks", lambda: checks)


def log() -> list[str]:
    """What the made-up sessions were asked for."""
    return Path("hosts.log").read_text().splitlines() if Path("hosts.log").exists() else []


# --- outcomes ------------------------------------------------------------------------------------------------------


def test_right_model_passes_and_hosts_run_once(suite: Suite) -> None:
    result = suite()

    assert result.ret == 0
    result.assert_outcomes(passed=len(CHECKS))
    needed = {scenario for check in CHECKS for scenario in catalogue.get(check).needs}
    assert log() == [
        "main start",
        "main resolve models:right",
        f"main collect models:right {' '.join(sorted(needed))}",
        "main resolve models:right",
        "main close",
    ]


def test_a_whole_run(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("-p", "fake_session", "--genmodel=models:right")

    assert result.ret == 0
    result.assert_outcomes(passed=len(catalogue.all_checks()) - 1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*interface *gradients *logits *deployment", "TP=1 *", "TP=2 *", "not applicable (1):"]
    )


def test_terse_output_has_one_line_per_group(suite: Suite) -> None:
    letters = "." * len(CHECKS)

    suite().stdout.re_match_lines(
        [
            rf"collected {len(catalogue.all_checks())} items .*",
            rf"genmodel/interface\[models:right\] {letters} .*100%.*",
        ]
    )


def test_verbose_output_has_node_ids(suite: Suite) -> None:
    suite("-v").stdout.fnmatch_lines([f"genmodel/{check}[[]models:right[]] PASSED*" for check in CHECKS])


def test_failed_checks_say_why_without_a_traceback(suite: Suite) -> None:
    result = suite(target="models:wrong")

    assert result.ret == 1
    result.assert_outcomes(passed=len(CHECKS) - 3, failed=2, skipped=1)
    shown = result.stdout.str()
    assert "Traceback" not in shown
    assert "suite.py" not in shown
    result.stdout.fnmatch_lines(
        [
            "*__ interface.signature of models:wrong __*",
            "The model has the methods vLLM calls*",
            "Measured, worst first",
            "*missing parts of vLLM's interface: 1, and none is allowed",
            "*compute_logits is missing",
            "Usual causes",
            "How to fix",
            "Run just this check",
            "FAILED genmodel/interface.signature[[]models:wrong[]] - reference, missing parts*",
        ]
    )


def test_not_applicable_is_skipped_with_its_reason_and_listed(suite: Suite) -> None:
    result = suite("-rs", target="models:wrong")

    result.stdout.fnmatch_lines(
        [
            "not applicable (1):",
            "  interface.attention_prefixes *the model has no layer with a KV cache",
            "SKIPPED [[]1[]] *interface.py:*: not applicable: the model has no layer with a KV cache",
        ]
    )


def test_harness_that_cannot_prove_its_path_is_an_error(suite: Suite) -> None:
    result = suite(target="models:unproven")

    assert result.ret == ERRORS_ONLY
    result.assert_outcomes(passed=len(CHECKS) - 1, errors=1)
    result.stdout.fnmatch_lines(["ERROR genmodel/interface.reaches_workers[[]*[]] - no evidence: one*"])


@pytest.mark.parametrize("target", ["models:boom", "models:crash"])
def test_harness_that_raises_is_an_error_of_every_check_and_told_once(suite: Suite, target: str) -> None:
    result = suite(target=target)

    assert result.ret == ERRORS_ONLY
    result.assert_outcomes(errors=len(CHECKS))
    assert result.stdout.str().count("Traceback") == 1
    assert result.stdout.str().count(f"As for {CHECKS[0]}") == len(CHECKS) - 1
    assert log()[-1] == "main close"


@pytest.mark.usefixtures("recommended")
def test_recommended_check_that_fails_is_shown_and_does_not_fail_the_run(suite: Suite) -> None:
    deselected = ("--deselect", "genmodel/interface.signature[models:wrong]")
    result = suite(*deselected, target="models:wrong")

    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "genmodel/interface[[]models:wrong[]] *r*",
            "interface.vllm_accepts failed, which is recommended only:",
            "  vLLM's own is_text_generation_model agrees*",
            "*passed, 1 skipped, * 1 failed (recommended) in *",
        ]
    )
    suite("-v", *deselected, target="models:wrong").stdout.fnmatch_lines(["*vllm_accepts* FAILED (RECOMMENDED)*"])


@pytest.mark.usefixtures("recommended")
def test_level_required_leaves_recommended_checks_out(suite: Suite) -> None:
    result = suite("--genmodel-level=required", target="models:wrong")

    result.assert_outcomes(
        passed=len(CHECKS) - 3, failed=1, skipped=1, deselected=len(catalogue.all_checks()) - len(CHECKS) + 1
    )
    result.stdout.no_fnmatch_line("*vllm_accepts*")


# --- expected failures ---------------------------------------------------------------------------------------------


def test_expected_failure_is_shown_with_its_reason(suite: Suite) -> None:
    Path("expected.toml").write_text(
        '"interface.signature" = "issue 12"\n[interface.vllm_accepts]\nreason = "issue 13"\n'
    )
    result = suite("--genmodel-expect=expected.toml", "-rx", target="models:wrong")

    assert result.ret == 0
    result.assert_outcomes(passed=len(CHECKS) - 3, xfailed=2, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "failed as expected (2):",
            "  interface.signature: issue 12",
            "XFAIL genmodel/interface.signature[[]models:wrong[]] - issue 12",
        ]
    )


def test_expected_failure_that_passes_fails(suite: Suite) -> None:
    Path("expected.toml").write_text('"interface.builds" = "known"\n')
    result = suite("--genmodel-expect=expected.toml")

    assert result.ret == 1
    result.assert_outcomes(passed=len(CHECKS) - 1, failed=1)
    result.stdout.fnmatch_lines(["FAILED genmodel/interface.builds[[]models:right[]] - expected to fail, and *"])


def test_an_error_beside_a_failure_is_a_failure(suite: Suite, pytester: pytest.Pytester) -> None:
    """The exit status of errors is that of errors alone, an author's own failing test included."""
    pytester.makepyfile("def test_interface(): assert False")

    assert suite(".", target="models:unproven").ret == pytest.ExitCode.TESTS_FAILED
    assert suite("--genmodel=models:wrong", target="models:unproven").ret == pytest.ExitCode.TESTS_FAILED


def test_an_error_of_the_harness_is_no_expected_failure(suite: Suite) -> None:
    Path("expected.toml").write_text('"interface.reaches_workers" = "known"\n')
    result = suite("--genmodel-expect=expected.toml", target="models:unproven")

    assert result.ret == ERRORS_ONLY
    result.assert_outcomes(passed=len(CHECKS) - 1, errors=1)


def test_expectations_can_be_for_one_target(suite: Suite) -> None:
    Path("expected.toml").write_text('[interface.signature]\nreason = "known"\ntargets = ["models:other"]\n')

    suite("--genmodel-expect=expected.toml", target="models:wrong").assert_outcomes(
        passed=len(CHECKS) - 3, failed=2, skipped=1
    )


def test_runxfail_ignores_expectations(suite: Suite) -> None:
    Path("expected.toml").write_text('"interface.signature" = "known"\n')

    assert suite("--genmodel-expect=expected.toml", "--runxfail", target="models:wrong").ret == 1


def test_a_tests_timeout_does_not_cover_the_engines(suite: Suite, pytester: pytest.Pytester) -> None:
    """pytest-timeout's clock, like any plugin's around a test, starts after the evidence is there."""
    pytester.makeconftest(
        """
        from pathlib import Path

        import pytest

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(item):
            with Path("hosts.log").open("a") as log:
                log.write("clock\\n")
            yield
        """
    )
    suite("-k", "interface.builds").assert_outcomes(passed=1, deselected=len(catalogue.all_checks()) - 1)

    assert [line.split()[1:2] for line in log()[2:]] == [["collect"], ["resolve"], [], ["close"]]


# --- selection -----------------------------------------------------------------------------------------------------


def test_collect_only_starts_nothing(suite: Suite) -> None:
    result = suite("--co", "-q")

    assert result.ret == 0
    result.stdout.fnmatch_lines([f"genmodel/{check}[[]models:right[]]" for check in CHECKS])
    assert log() == []


def test_only_the_suite_runs_unless_paths_are_given(suite: Suite, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ntestpaths = test_mine.py")
    pytester.makepyfile(test_mine="def test_interface(): ...")

    suite().assert_outcomes(passed=len(CHECKS))
    suite("test_mine.py").assert_outcomes(passed=len(CHECKS) + 1)


def test_last_failed_runs_what_failed(suite: Suite) -> None:
    suite(target="models:wrong")
    suite("--lf", target="models:wrong").assert_outcomes(failed=2, deselected=len(catalogue.all_checks()) - 2)


def test_first_failure_can_end_the_run(suite: Suite) -> None:
    suite("-x", target="models:wrong").assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        (("-k", "interface.builds"), 1),
        (("-k", "interface and required and not builds"), len(CHECKS) - 1),
        (("-m", "genmodel"), len(CHECKS)),
        (("-m", "not genmodel"), 0),
        (("--deselect", "genmodel/interface.builds[models:right]"), len(CHECKS) - 1),
        (("genmodel/interface.builds[models:right]",), 1),
        (("genmodel/interface.builds[models:right]", "genmodel/interface.rebuild[models:right]"), 2),
        (("../genmodel/interface.builds[models:right]",), 1),
    ],
)
def test_pytest_selects_checks_as_it_selects_tests(suite: Suite, arguments: tuple[str, ...], passed: int) -> None:
    result = suite(*arguments)

    assert result.parseoutcomes().get("passed", 0) == passed
    assert any("collect" in line for line in log()) == bool(passed)


def test_the_printed_command_runs_just_that_check(pytester: pytest.Pytester, suite: Suite) -> None:
    pytester.makeini("[pytest]\naddopts = -p fake_session")
    result = suite("--genmodel-top-k=5", target="models:wrong")
    command = re.findall(r"^  ((?:python -m )?pytest .*interface\.signature.*)$", result.stdout.str(), re.MULTILINE)[0]
    assert command.endswith("'genmodel/interface.signature[models:wrong]' --genmodel=models:wrong --genmodel-top-k=5")

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        shlex.split(command), capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False
    )
    assert done.returncode == 1
    assert "collected 1 item\n" in done.stdout
    assert "FAILED genmodel/interface.signature[models:wrong]" in done.stdout


# --- several processes ---------------------------------------------------------------------------------------------


def test_xdist_keeps_a_target_in_one_worker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_interface(number): ...

        def test_interface_of(genmodel_target):
            assert genmodel_target.spec.startswith("models:")
        """
    )
    arguments = ["--genmodel=models:right", "--genmodel=models:wrong", "--genmodel-report=report.json", "."]
    result = pytester.runpytest_subprocess("-p", "fake_session", "-k", "interface", "-n", "2", *arguments)

    result.assert_outcomes(passed=2 * len(CHECKS) - 3 + 4 + 2, failed=2, skipped=1)
    for target in ("right", "wrong"):
        (worker,) = {line.split()[0] for line in log() if f"models:{target}" in line}
        assert worker in ("gw0", "gw1")
        result.stdout.fnmatch_lines([f"*= genmodel: models:{target} =*"])
    assert sorted(line for line in log() if "close" in line) == ["gw0 close", "gw1 close"]
    assert not any("start" in line for line in log())
    written = json.loads(Path("report.json").read_text())
    assert [(target["name"], len(target["checks"])) for target in written["targets"]] == [
        ("models:right", len(CHECKS)),
        ("models:wrong", len(CHECKS)),
    ]
    assert written["environment"]["python"] == "3.11.7"
    assert "genmodel: collecting models:right" in result.stderr.str()


@pytest.mark.parametrize(
    ("nodeid", "target"),
    [
        ("genmodel/interface.builds[a:b]", "a:b"),
        ("tests/test_mine.py::test_it[1-a:b]", "a:b"),
        ("tests/test_mine.py::test_it[a:bc]", None),
        ("tests/test_mine.py::test_it", None),
    ],
)
def test_target_of_a_node_id(nodeid: str, target: str | None) -> None:
    assert target_of(nodeid, ["a:b"]) == target


# --- authors' own tests --------------------------------------------------------------------------------------------


def test_fixtures_give_the_target_and_all_its_evidence(pytester: pytest.Pytester, suite: Suite) -> None:
    pytester.makepyfile(
        """
        def test_interface(genmodel_target, genmodel_evidence):
            assert genmodel_evidence.target == genmodel_target
            assert genmodel_evidence.inspection.vocab_size
        """
    )
    result = suite("--genmodel=models:other", "-v", ".")

    result.assert_outcomes(passed=2 * len(CHECKS) + 2)
    result.stdout.fnmatch_lines(["*::test_interface[[]models:right[]] PASSED*"])
    (collected,) = (line for line in log() if "collect models:right" in line)
    assert {"plain", "gradients", "reference", "deployed"} < set(collected.split())


# --- what is written -----------------------------------------------------------------------------------------------


def test_header_says_where_settings_come_from(suite: Suite, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ngenmodel_top_k = 7")

    suite("--genmodel-tp=1").stdout.fnmatch_lines(
        [
            "genmodel: models:right",
            "  command line: tp=1",
            "  tox.ini: top-k=7",
            "  default: dtype=float32, seed=0, level=recommended",
        ]
    )


def test_progress_is_shown_unless_quiet(suite: Suite) -> None:
    assert "genmodel: collecting models:right" in suite().stdout.str()
    assert "genmodel: collecting models:right" not in suite("-q").stdout.str()


def test_table_of_every_target(suite: Suite) -> None:
    result = suite("--genmodel=models:wrong")

    result.stdout.fnmatch_lines(
        ["*= genmodel: models:right =*", "*interface*", "TP=2*3/3*", "reference*", "*= genmodel: models:wrong =*"]
    )


def test_json_report(suite: Suite) -> None:
    result = suite("--genmodel-report=out/one.json", "--genmodel-report=two.json", target="models:wrong")

    result.stdout.fnmatch_lines(["genmodel: wrote *one.json, *two.json"])
    written = json.loads(Path("out/one.json").read_text())
    assert written == json.loads(Path("two.json").read_text())
    (target,) = written["targets"]
    assert target["name"] == "models:wrong"
    assert [check["id"] for check in target["checks"]] == list(CHECKS)
    assert target["counts"]["failed"] == 2
    assert target["seconds"]["import"] == 3.0


def test_junit_xml(suite: Suite) -> None:
    suite("--junitxml=junit.xml", target="models:wrong")
    (tests,) = ET.parse("junit.xml").getroot()
    cases = {case.get("name"): case for case in tests}

    assert tests.attrib["tests"] == str(len(CHECKS))
    assert (tests.attrib["failures"], tests.attrib["skipped"], tests.attrib["errors"]) == ("2", "1", "0")
    failure = cases["genmodel.interface.signature[models:wrong]"].find("failure")
    assert failure is not None
    assert failure.attrib["message"].startswith("reference, missing parts of vLLM's interface")
    assert "How to fix" in (failure.text or "")
    said = {p.get("name"): p.get("value") for p in cases["genmodel.interface.signature[models:wrong]"].iter("property")}
    assert said == {
        "genmodel_target": "models:wrong",
        "genmodel_check": "interface.signature",
        "genmodel_level": "required",
        "genmodel_status": "failed",
    }


def test_junit_xml_has_the_worst_number_against_its_limit(pytester: pytest.Pytester) -> None:
    pytester.runpytest_inprocess("-p", "fake_session", "--genmodel=models:right", "-k", "kl", "--junitxml=junit.xml")
    said = {p.get("name"): p.get("value") for p in ET.parse("junit.xml").getroot().iter("property")}

    assert said["genmodel_status"] == "passed"
    assert (said["genmodel_worst"] or "").startswith(("TP=1, ", "TP=2, "))
    assert 0 < float(said["genmodel_measured"] or "") < float(said["genmodel_allowed"] or "")


def test_reports_for_people(suite: Suite) -> None:
    suite("--genmodel-report=out/a.md", "--genmodel-report=out/a.html", target="models:wrong")

    assert Path("out/a.md").read_text().startswith("## ❌ genmodel: the model does not conform")
    assert "pytest 'genmodel/interface.signature[models:wrong]' --genmodel=models:wrong" in Path("out/a.md").read_text()
    page = Path("out/a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == len([t for t in evidence_samples.clean().traces.values() if isinstance(t, tuple)])


def test_reports_for_people_under_xdist(pytester: pytest.Pytester) -> None:
    arguments = ["--genmodel=models:right", "--genmodel=models:wrong", "--genmodel-report=a.html", "-k", "interface"]
    pytester.runpytest_subprocess("-p", "fake_session", "-n", "2", *arguments)

    page = Path("a.html").read_text()
    assert page.count("<svg") == 2 * len([t for t in evidence_samples.clean().traces.values() if isinstance(t, tuple)])


# --- baselines -----------------------------------------------------------------------------------------------------


def test_a_baseline_is_written_and_held_against(suite: Suite) -> None:
    """What fails newly fails the run, though it is only recommended or expected nowhere; what is the same does not."""
    written = suite("--genmodel-baseline=b.json", "--genmodel-baseline-update")
    same = suite("--genmodel-baseline=b.json", "--genmodel-report=r.json", "--genmodel-report=r.md")

    assert written.ret == same.ret == 0
    written.stdout.fnmatch_lines(["genmodel: wrote *b.json"])
    same.stdout.fnmatch_lines(["*= genmodel: against b.json =*", "nothing is worse than the baseline, nor better"])
    assert json.loads(Path("r.json").read_text())["baseline"]["regressions"] == []
    assert "### Against the baseline `b.json`" in Path("r.md").read_text()


@pytest.mark.parametrize("distributed", [(), ("-n", "1")])
def test_a_number_grown_beyond_the_noise_fails_the_run(pytester: pytest.Pytester, distributed: tuple[str, ...]) -> None:
    """All checks pass, and the exit code is 1."""
    arguments = ("-p", "fake_session", "--genmodel=models:right", "-k", "kl or builds", "--genmodel-baseline=b.json")
    pytester.runpytest_inprocess(*arguments, "--genmodel-baseline-update")
    content = json.loads(Path("b.json").read_text())
    for check in content["targets"][0]["checks"]:
        for measurement in check["measurements"]:
            measurement["measured"], measurement["allowed"] = 0.0, measurement["allowed"] / 1e6
    Path("b.json").write_text(json.dumps(content))
    result = pytester.runpytest_subprocess(*arguments, "--genmodel-report=r.json", *distributed)

    assert result.ret == 1
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["* worse than the baseline, nothing better", "  worse: models:right, logits.kl: TP=*"])
    kinds = {change["kind"] for change in json.loads(Path("r.json").read_text())["baseline"]["regressions"]}
    assert kinds == {"error"}


def test_what_was_not_selected_did_not_vanish(suite: Suite) -> None:
    suite("--genmodel-baseline=b.json", "--genmodel-baseline-update")

    assert suite("--genmodel-baseline=b.json", "-k", "builds").ret == 0
    assert suite("--genmodel-baseline=b.json", "genmodel/interface.builds[models:right]").ret == 0


def test_a_check_that_is_gone_vanished(suite: Suite) -> None:
    suite("--genmodel-baseline=b.json", "--genmodel-baseline-update")
    Path("b.json").write_text(Path("b.json").read_text().replace("interface.builds", "interface.bygone"))
    result = suite("--genmodel-baseline=b.json")

    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["  worse: *interface.bygone: was passed, and*", "  not in the baseline: interface.builds"]
    )


def test_a_run_that_was_stopped_has_no_vanished_checks(suite: Suite) -> None:
    suite("--genmodel-baseline=b.json", "--genmodel-baseline-update", target="models:wrong")
    result = suite("--genmodel-baseline=b.json", "-x", target="models:wrong")

    result.stdout.fnmatch_lines(["nothing is worse than the baseline, nor better"])
