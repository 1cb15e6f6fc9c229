"""What people and other tools read: failures, the table, reasons, and the JSON report."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from evidence_samples import FAILING, change_scores, clean, shifted, spoiled
from genmodel.conformance import text
from genmodel.conformance.catalogue import GROUPS, all_checks, get, judge
from genmodel.conformance.report import report_json, target_json, verdict_json
from genmodel.conformance.verdict import Status, Verdict
from genmodel.runners.evidence import Evidence, Failure

IDS = [check.id for check in all_checks()]


def judged(evidence: Evidence) -> list[Verdict]:
    return [judge(check, evidence) for check in all_checks()]


def shifted_at_two() -> Evidence:
    return change_scores(clean(), shifted(1e-3), sizes=(2,))


def unbuilt() -> Evidence:
    failure = Failure(
        kind="raised", scenario="inspection", message="the factory raised KeyError: 'x'", details="in factory"
    )
    evidence = clean()
    return replace(
        evidence,
        inspection=failure,
        gradients=replace(failure, scenario="gradients"),
        reference=failure,
        weights=dict.fromkeys(evidence.weights, failure),
        parallel_gradients=dict.fromkeys(evidence.parallel_gradients, failure),
        traces=dict.fromkeys(evidence.traces, failure),
    )


def test_a_failure_tells_claim_numbers_causes_fix_and_command() -> None:
    verdict = judge(get("logits.values"), shifted_at_two())
    told = text.failure(verdict, get("logits.values"), "pytest this")
    order = [
        "raw logits are the reference's",
        "worst first",
        "Usual causes",
        "How to fix",
        "Seen in",
        "Run just this check",
    ]
    assert sorted(order, key=told.index) == order
    flat = " ".join(told.split())
    worst = r"TP=2 first token: mean \|logit difference\|: 0\.001 where 8\.\de-06 is allowed, 12\d times its limit"
    assert re.search(worst, flat), flat
    assert "vllm-project/vllm#52158" in told
    assert "6 of 12 measurements hold, the closest at" in told
    assert told.endswith("  pytest this")


@pytest.mark.parametrize(("check_id", "name"), [(check_id, name) for check_id in FAILING for name in FAILING[check_id]])
def test_every_failure_fits_the_terminal(check_id: str, name: str) -> None:
    verdict = judge(get(check_id), FAILING[check_id][name](clean()))
    assert max(map(len, text.failure(verdict, get(check_id), "pytest").splitlines())) <= text.WIDTH
    assert "\n" not in text.summary(verdict)


def test_the_summary_is_the_worst_measurement() -> None:
    verdict = judge(get("logits.values"), shifted_at_two())
    assert text.summary(verdict).startswith("TP=2, first token: mean |logit difference|: 0.001 where")


def test_nan_is_worst_of_all() -> None:
    spoiled_too = change_scores(shifted_at_two(), spoiled(float("nan")), requests=("one_token",), sizes=(1,))
    assert text.summary(judge(get("logits.values"), spoiled_too)).startswith(
        "TP=1, first token: max |logit difference|: nan"
    )


def test_checks_that_one_event_took_down_have_one_cause() -> None:
    verdicts = judged(unbuilt())
    causes = {text.cause(verdict) for verdict in verdicts}
    assert causes == {("no evidence: the factory raised KeyError: 'x'", "in factory")}
    told = text.failure(verdicts[0], all_checks()[0], "pytest this")
    assert told.count("KeyError") == told.count("in factory") == 1
    assert "Usual causes" not in told  # the cause is known
    assert {text.cause(verdict) for verdict in judged(clean()) if verdict.status is Status.PASSED} == {None}


def test_the_table_has_groups_across_and_engines_down() -> None:
    lines = text.table(judged(shifted_at_two())).splitlines()
    assert lines[0].split() == [*GROUPS]
    assert [line.split()[0] for line in lines[1:4]] == ["TP=1", "TP=2", "reference"]
    assert lines[1].split()[3] == "-"
    assert "11/11 0." in lines[1]
    assert re.search(r"10/13 12\d !", lines[2])
    assert "12/12" in lines[3]
    assert "!" not in lines[1] + lines[3]


def test_the_table_counts_missing_evidence_where_it_is_missing() -> None:
    evidence = clean()
    evidence.traces["plain", 2] = Failure(kind="died", scenario="plain", message="died")
    rows = {line.split()[0]: line for line in text.table(judged(evidence)).splitlines()}
    assert "11/11" in rows["TP=1"]
    assert "2/13" in rows["TP=2"]


def test_an_expected_failure_is_not_marked() -> None:
    verdict = replace(judge(get("logits.values"), shifted_at_two()), status=Status.XFAILED)
    assert re.search(r"0/1 12\d\n", text.table([verdict]))


def test_not_applicable_checks_are_listed_with_reasons() -> None:
    told = text.not_applicable(judged(clean()))
    assert told.splitlines()[0] == "not applicable (1):"
    assert "gradients.dropout" in told
    assert "declares no dropout" in told
    assert text.not_applicable([]) == ""


def test_the_catalogue_lists_every_check() -> None:
    told = text.catalogue()
    assert all(f"  {check_id} " in told for check_id in IDS)
    assert max(map(len, told.splitlines())) <= text.WIDTH


def test_the_report_is_strict_json_and_complete() -> None:
    evidence = change_scores(clean(), spoiled(float("nan")))
    verdicts = judged(evidence)
    facts = json.loads(json.dumps(target_json(evidence), allow_nan=False))
    report = json.loads(json.dumps(report_json([facts], verdicts), allow_nan=False))
    assert report["schema_version"] == 1
    assert report["environment"]["vllm"] == "0.32.0"
    (target,) = report["targets"]
    assert target["name"] == "my_pkg:factory"
    assert target["reference"]["independent"] is True
    assert target["seconds"]["import"] == 3.0
    assert target["seconds"]["checks"] > 0
    assert [check["id"] for check in target["checks"]] == IDS
    values = next(check for check in target["checks"] if check["id"] == "logits.values")
    assert values["status"] == "failed"
    assert "nan" in [measurement["measured"] for measurement in values["measurements"]]
    assert sum(report["counts"].values()) == len(IDS)


def test_the_report_of_a_model_that_does_not_build() -> None:
    evidence = unbuilt()
    report = report_json([target_json(evidence)], judged(evidence))
    assert report["targets"][0]["reference"] is None
    assert report["counts"]["failed"] == len(IDS)
    assert report_json([], [])["environment"] == {}


def test_numbers_that_are_not_finite_read_back() -> None:
    verdict = judge(get("interface.builds"), FAILING["interface.builds"]["no parameters"](clean()))
    (measurement,) = verdict_json(verdict)["measurements"]
    assert float(measurement["ratio"]) == float("inf")
