"""`parametrize_with_checks` in an author's own test file, on made-up evidence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Imported here so that pytester's in-process runs, which forget what they import, share these.
import evidence_samples
from genmodel import parametrize_with_checks
from genmodel.conformance import api, catalogue
from genmodel.conformance.catalogue import UnknownCheck
from genmodel.conformance.verdict import Level

PRELOADED = (evidence_samples, api)
HERE = Path(__file__).parent
REQUIRED = [check for check in catalogue.all_checks() if check.level is Level.REQUIRED]

FILE = """
    import fake_session
    from genmodel import parametrize_with_checks
    from genmodel.runners import session

    session.Session = lambda options: fake_session.FakeSession(options, print)

    @parametrize_with_checks({arguments})
    def test_conformance(target, check):
        check(target)
"""


@pytest.fixture(autouse=True)
def _plugin_for_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this may itself run in one


def run(pytester: pytest.Pytester, arguments: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_mine=FILE.format(arguments=arguments))
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)


def log() -> list[str]:
    return Path("hosts.log").read_text().splitlines()


def test_every_required_check_of_every_target_is_a_test(pytester: pytest.Pytester) -> None:
    result = run(pytester, "['models:right', 'models:other']", "-v")

    result.assert_outcomes(passed=2 * (len(REQUIRED) - 1), skipped=2)
    result.stdout.fnmatch_lines(["*test_mine.py::test_conformance[[]models:right-logits.kl[]] PASSED*"])
    assert [line for line in log() if "start" in line or "close" in line] == ["main close"]
    assert len([line for line in log() if " collect " in line]) == 2


def test_a_failure_is_told_as_the_suite_tells_it(pytester: pytest.Pytester) -> None:
    result = run(pytester, "['models:wrong'], checks=['interface.signature', 'interface.attention_prefixes']", "-rs")

    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "The model has the methods vLLM calls*",
            "Usual causes",
            "How to fix",
            "*pytest 'test_mine.py::test_conformance[[]models:wrong-interface.signature[]]'",
            "SKIPPED*not applicable: the model has no layer with a KV cache",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_only_what_is_selected_is_run(pytester: pytest.Pytester) -> None:
    run(pytester, "['models:right']", "-k", "interface.builds").assert_outcomes(passed=1, deselected=len(REQUIRED) - 1)

    assert "main collect models:right inspection" in log()


def test_expected_failures_are_strict(pytester: pytest.Pytester) -> None:
    expected = "{'interface.signature': 'issue 12', 'interface.builds': 'issue 13'}"
    checks = "checks=['interface.signature', 'interface.builds']"
    result = run(pytester, f"['models:wrong'], expected_failures={expected}, {checks}", "-rx")

    result.assert_outcomes(xfailed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*interface.builds was expected to fail, and passed: issue 13", "XFAIL*interface.signature* - issue 12"]
    )


def test_a_target_that_cannot_be_used_fails_in_one_line(pytester: pytest.Pytester) -> None:
    result = run(pytester, "['models:late'], checks=['gradients.numeric']")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no evidence: head_dim 16 is not supported*"])


def test_a_class_can_be_a_target(pytester: pytest.Pytester) -> None:
    result = run(pytester, "[dict], checks=['interface.builds']", "-v")

    result.stdout.fnmatch_lines(["*test_conformance[[]builtins:dict-interface.builds[]] PASSED*"])


def test_unknown_ids_are_answered_with_close_ones() -> None:
    with pytest.raises(UnknownCheck, match=r"did you mean interface\.builds"):
        parametrize_with_checks(["a:b"], checks=["interface.bilds"])
    with pytest.raises(UnknownCheck, match=r"did you mean interface\.builds"):
        parametrize_with_checks(["a:b"], expected_failures={"interface.bilds": "x"})
    with pytest.raises(UnknownCheck, match=r"not among the checks chosen: logits\.kl"):
        parametrize_with_checks(["a:b"], checks=["interface.builds"], expected_failures={"logits.kl": "x"})
    with pytest.raises(ValueError, match=r"logits\.kl: a reason is required"):
        parametrize_with_checks(["a:b"], expected_failures={"logits.kl": " "})


def test_a_check_is_made_for_its_targets() -> None:
    mark = parametrize_with_checks(["a:b"], checks=["interface.builds"])
    (parameter,) = mark.args[1]

    with pytest.raises(ValueError, match="this check was made for a:b, not for c:d"):
        parameter.values[1]("c:d")
