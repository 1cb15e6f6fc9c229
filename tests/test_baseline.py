"""The law by which a run is worse than an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evidence_samples import FAILING, NOISE, change_scores, change_traces, clean, scaled, shifted
from genmodel.conformance.baseline import BaselineError, Comparison, compare, grown, read
from genmodel.conformance.catalogue import all_checks, judge
from genmodel.conformance.report import report_json, target_json
from genmodel.conformance.verdict import Measurement, Status
from genmodel.runners.evidence import Evidence, Span

CLEAN = clean()
Change = Callable[[Evidence], Evidence]


def report_of(evidence: Evidence) -> tuple[dict[str, Any], list[Any]]:
    verdicts = [judge(check, evidence) for check in all_checks()]
    return json.loads(json.dumps(report_json([target_json(evidence)], verdicts))), verdicts


THEN = report_of(CLEAN)[0]


def against(evidence: Evidence, then: dict[str, Any] = THEN, **kwargs: Any) -> Comparison:
    now, verdicts = report_of(evidence)
    return compare(then, now, verdicts, **kwargs)


def number(measured: float, allowed: float = 4.0) -> Measurement:
    return Measurement(what="x", where="TP=1", measured=measured, allowed=allowed)


@pytest.mark.parametrize(
    ("then", "now", "worse"),
    [
        (number(1.0), number(1.9), False),
        (number(1.0), number(2.1), True),
        (number(2.1), number(1.0), False),
        (number(1.0, 4.0), number(3.0, 12.0), True),
        (number(1.0), number(math.nan), True),
        (number(math.nan), number(math.nan), False),
        (number(math.nan), number(1.0), False),
        (number(1.0), number(math.inf), True),
        (number(0, 0), number(0, 0), False),
        (number(0, 0), number(1, 0), True),
        (number(2, 0), number(3, 0), True),
        (number(1.0, math.nan), number(1.1, math.nan), True),
    ],
    ids=str,
)
def test_grown_by_more_than_a_noise_floor(then: Measurement, now: Measurement, worse: bool) -> None:
    """A quarter of the tolerance of then is its noise floor; a floor that grows along hides nothing."""
    assert grown(then, now) is worse


def test_the_same_run_is_neither_worse_nor_better() -> None:
    found = against(CLEAN)

    assert (found.regressions, found.improvements) == ((), ())
    assert found.summary == "nothing is worse than the baseline, nor better"


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_rounding_of_the_same_size_is_no_regression(seed: int) -> None:
    """The same truth with other rounding errors, as another kernel makes them."""
    then = {**THEN, "targets": [{**THEN["targets"][0], "seed": seed}]}
    assert against(clean(seed=seed), then).regressions == ()


def test_an_error_within_its_tolerance_that_grew_is_a_regression() -> None:
    """All checks pass, with logits further off than rounding takes them."""
    moved = change_scores(CLEAN, shifted(4 * NOISE), sizes=(2,))
    verdicts = [judge(check, moved) for check in all_checks()]
    assert {v.status for v in verdicts} == {Status.PASSED, Status.NOT_APPLICABLE}
    changes = [c for c in against(moved).regressions if c.check == "logits.values"]

    assert {c.kind for c in changes} == {"error"}
    assert all(c.said.startswith("TP=2, ") for c in changes)


def test_a_check_that_fails_newly_is_a_regression_and_then_an_improvement() -> None:
    wrong = change_scores(CLEAN, scaled(1.001))
    worse = against(wrong)
    kinds = {c.check: c.kind for c in worse.regressions}
    assert kinds["logits.values"] == kinds["logits.kl"] == "failure"
    assert "failed, and was passed: TP=" in next(c.said for c in worse.regressions if c.check == "logits.values")

    better = against(CLEAN, report_of(wrong)[0])
    assert better.regressions == ()
    assert {"logits.values", "logits.kl"} <= {c.check for c in better.improvements if c.kind == "fixed"}


def test_a_failure_that_grows_is_a_regression() -> None:
    then = report_of(change_scores(CLEAN, scaled(1.001)))[0]

    assert "logits.values" in {c.check for c in against(change_scores(CLEAN, scaled(1.1)), then).regressions}


def test_a_size_that_is_no_longer_run_is_a_regression() -> None:
    """Every check still passes, on half of the evidence."""
    half = replace(CLEAN, target=replace(CLEAN.target, tensor_parallel_sizes=(1,)))
    kinds = {c.check: c for c in against(half).regressions}

    assert kinds["logits.values"].kind == "vanished"
    assert kinds["logits.values"].said.startswith("no longer measured: TP=2 prompt:")
    assert "not applicable, and was passed" in kinds["logits.ranks_agree"].said


def test_numbers_about_something_else_are_not_compared() -> None:
    other = against(replace(CLEAN, target=replace(CLEAN.target, dtype="bfloat16")))

    (change,) = other.regressions
    assert change.said == "cannot be compared: dtype=float32 then, bfloat16 now"


def test_a_target_that_was_not_run_is_noted() -> None:
    other = replace(CLEAN, target=replace(CLEAN.target, name="a:b", spec="a:b"))

    assert against(other).notes[0] == "my_pkg:factory is in the baseline, and was not run"
    assert against(other).regressions == ()


def test_left_out_checks_and_stopped_runs() -> None:
    now, verdicts = report_of(CLEAN)
    some = [v for v in verdicts if v.check != "logits.kl"]

    (gone,) = compare(THEN, now, some).regressions
    assert (gone.check, gone.kind) == ("logits.kl", "vanished")
    assert compare(THEN, now, some, left_out={("my_pkg:factory", "logits.kl")}).regressions == ()
    assert compare(THEN, now, some, ended_early=True).regressions == ()


def test_versions_and_cost_are_told() -> None:
    span = Span(what="TP=1", rank=0, begin=0.0, phases={"generate": 10.0})
    then = report_of(replace(CLEAN, timeline=(span,), environment={"vllm": "0.31.0", "python": "3.11.7"}))[0]
    slower = replace(CLEAN, timeline=(replace(span, phases={"generate": 15.0}),))
    notes = against(slower, {**then, "commit": {"sha": "a" * 40, "changed": True}}).notes

    assert notes == (
        "other than then: torch 2.13.0+cpu (none), vllm 0.32.0 (0.31.0)",
        "the baseline is of commit aaaaaaaaaaaa with changes",
        "my_pkg:factory took 15 s of hosts' time, and 10 s then (+50%)",
    )


def test_every_corruption_is_worse_than_clean() -> None:
    """The law sees what the checks see."""
    for check, ways in FAILING.items():
        for name, change in ways.items():
            worse = {c.check for c in against(change(CLEAN)).regressions}
            assert check in worse, (check, name)


def test_traces_that_are_gone_are_failures_not_vanished() -> None:
    gone = change_traces(CLEAN, lambda t: replace(t, continuations=()))

    assert "failure" in {c.kind for c in against(gone).regressions if c.check == "logits.complete"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a JSON report: Expecting value"),
        ("[]", "is not a report of genmodel"),
        ("{}", "is not a report of genmodel"),
        ('{"schema_version": 7}', "has schema_version 7, and this genmodel reads 1: --genmodel-baseline-update"),
        ('{"schema_version": 1}', "is not a report of genmodel: KeyError: 'targets'"),
        ('{"schema_version": 1, "targets": [{"name": 1, "checks": [{}]}]}', "is not a report of genmodel: KeyError"),
        ("[" * 100_000, "is not a JSON report"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "b.json").write_text(content)

    with pytest.raises(BaselineError) as refused:
        read(tmp_path / "b.json")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_report_is_read(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(THEN))

    assert read(tmp_path / "b.json") == THEN
