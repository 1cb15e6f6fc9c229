"""Every check passes clean evidence and fails evidence that is wrong in its way."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from evidence_samples import FAILING, change_gradients, change_inspection, clean, with_dropout
from genmodel.conformance.catalogue import all_checks, get, judge
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Evidence, Failure, LowPrecision, Probe, RoundedGradient, TrainingMode, Ways
from genmodel.runners.scenarios import SCENARIOS

IDS = [check.id for check in all_checks()]
FAILED_PROBE = Probe(call="forward(…)", shape=None, dtype=None, error="ValueError: no")
SAMPLES = [(check_id, name) for check_id in IDS for name in FAILING.get(check_id, {})]


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return clean()


def test_every_check_has_evidence_that_fails_it() -> None:
    assert set(FAILING) == set(IDS)
    assert all(FAILING.values())


@pytest.mark.parametrize("check_id", IDS)
def test_clean_evidence_passes(check_id: str, evidence: Evidence) -> None:
    sample = with_dropout(evidence) if check_id == "gradients.dropout" else evidence
    verdict = judge(get(check_id), sample)
    assert verdict.status is Status.PASSED, verdict
    assert verdict.measurements


@pytest.mark.parametrize(("check_id", "name"), SAMPLES)
def test_corrupted_evidence_fails(check_id: str, name: str, evidence: Evidence) -> None:
    verdict = judge(get(check_id), FAILING[check_id][name](evidence))
    assert verdict.status is Status.FAILED, verdict
    assert any(not m.ok for m in verdict.measurements)
    assert all(m.where in ("reference", "TP=1", "TP=2") for m in verdict.measurements)


@pytest.mark.parametrize("check_id", IDS)
def test_a_check_reads_what_it_declares_and_nothing_else(check_id: str, evidence: Evidence) -> None:
    check = get(check_id)
    sample = with_dropout(evidence) if check_id == "gradients.dropout" else evidence
    for scenario in SCENARIOS:
        status = judge(check, without(sample, scenario)).status
        assert (status is Status.ERROR) == (scenario in check.needs), scenario


@pytest.mark.parametrize("check_id", IDS)
def test_a_scenario_that_failed_fails_the_checks_that_need_it(check_id: str, evidence: Evidence) -> None:
    check = get(check_id)
    sample = with_dropout(evidence) if check_id == "gradients.dropout" else evidence
    for scenario in check.needs:
        failure = Failure(
            kind="died", scenario=scenario, message="host 1 died with SIGSEGV", rank=1, phase="loading weights"
        )
        verdict = judge(check, without(sample, scenario, failure))
        assert verdict.status is Status.FAILED
        assert verdict.reason == "no evidence: host 1 died with SIGSEGV while loading weights (rank 1)"
        proof = judge(check, without(sample, scenario, replace(failure, kind="proof")))
        assert proof.status is Status.ERROR


@pytest.mark.parametrize(
    ("check_id", "fields", "reason"),
    [
        ("gradients.dropout", {}, "declares no dropout"),
        ("gradients.training_mode", {"modes": {}}, "not measured"),
        (
            "gradients.batch",
            {"ways": Ways(), "modes": {"batch": TrainingMode(reason="takes no batch", refused=True)}},
            "takes no batch",
        ),
        ("gradients.float32", {"float32_ways": Ways(reason="raises")}, "raises"),
        ("gradients.float32", {"float32_ways": Ways()}, "not measured"),
        ("gradients.bfloat16", {"low_precision": {}}, "not measured"),
        ("gradients.autocast", {"low_precision": {"autocast": LowPrecision(reason="raises")}}, "raises"),
        (
            "gradients.bfloat16",
            {
                "low_precision": {
                    "bfloat16": LowPrecision(
                        parameters={"w": RoundedGradient(norm=1.0, error=1.0, noise=0.3, elements=100)}
                    )
                }
            },
            "rounding alone",
        ),
        (
            "gradients.attention_inputs",
            {
                "attention_inputs": {"attn": (0.0, 0.0, 0.0)},
                "unjudged_attention_inputs": dict.fromkeys(("q of attn", "k of attn", "v of attn"), "is a constant"),
            },
            "k of attn is a constant",
        ),
        (
            "gradients.packed_sequences",
            {"packing": None, "packing_reason": "takes no cu_seqlens", "ways": Ways()},
            "takes no cu_seqlens",
        ),
        ("gradients.causality", {"future_leak": None}, "no embedding"),
        ("gradients.attention_inputs", {"attention_inputs": {}}, "no TrainableAttention"),
    ],
)
def test_not_applicable_gradient_checks(
    check_id: str, fields: dict[str, object], reason: str, evidence: Evidence
) -> None:
    verdict = judge(get(check_id), change_gradients(evidence, **fields))
    assert verdict.status is Status.NOT_APPLICABLE
    assert reason in verdict.reason


def test_gradients_do_not_concern_native_models_even_without_evidence(evidence: Evidence) -> None:
    native = replace(change_inspection(evidence, native=True), gradients=None)
    verdicts = [judge(check, native) for check in all_checks() if check.group == "gradients"]
    assert {verdict.status for verdict in verdicts} == {Status.NOT_APPLICABLE}
    assert "requires_grad=False" in verdicts[0].reason


def test_models_without_attention_have_no_prefixes_to_check(evidence: Evidence) -> None:
    verdict = judge(get("interface.attention_prefixes"), change_inspection(evidence, attention=()))
    assert verdict.status is Status.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("check_id", "changes"),
    [
        ("interface.inputs_embeds", {"takes_embeddings": False}),
        ("interface.inputs_embeds", {"embeds": None}),
        ("interface.inputs_embeds", {"forward": FAILED_PROBE}),
        ("interface.prompt_embeddings", {"takes_embeddings": False}),
        ("interface.random_state", {"rebuilt_difference": None}),
        ("interface.arguments_kept", {"embed": FAILED_PROBE, "forward": FAILED_PROBE}),
    ],
)
def test_what_cannot_be_called_or_compared_is_not_judged(
    check_id: str, changes: dict[str, Any], evidence: Evidence
) -> None:
    verdict = judge(get(check_id), change_inspection(evidence, **changes))
    assert verdict.status is Status.NOT_APPLICABLE, verdict


@pytest.mark.parametrize("sizes", [(1,), (2,)])
def test_sizes_are_compared_only_where_there_are_two(sizes: tuple[int, ...], evidence: Evidence) -> None:
    one = replace(evidence, target=replace(evidence.target, tensor_parallel_sizes=sizes))
    assert judge(get("logits.tensor_parallel"), one).status is Status.NOT_APPLICABLE


def test_a_dead_engine_does_not_hide_what_the_other_measured(evidence: Evidence) -> None:
    died = without(evidence, "plain", Failure(kind="died", scenario="plain", message="died"), size=1)
    verdict = judge(get("logits.values"), died)
    assert verdict.status is Status.FAILED
    assert verdict.where == "TP=1"
    assert {m.where for m in verdict.measurements} == {"TP=2"}
    assert all(m.ok for m in verdict.measurements)


def test_a_reference_that_lacks_a_sequence_is_the_harness_s_fault(evidence: Evidence) -> None:
    lacking = replace(evidence, reference=replace(evidence.reference, logits={}))
    assert judge(get("logits.values"), lacking).status is Status.ERROR


def test_all_checks_together_take_less_than_a_second(evidence: Evidence) -> None:
    began = time.perf_counter()
    for check in all_checks():
        judge(check, evidence)
    assert time.perf_counter() - began < 1


def without(evidence: Evidence, scenario: str, instead: Failure | None = None, size: int | None = None) -> Evidence:
    """The evidence as if a scenario had not run, or had failed."""
    if scenario == "reference":
        others = {} if instead is None else dict.fromkeys(evidence.references, instead)
        return replace(evidence, reference=instead, references=others)
    if scenario in ("weights", "parallel_gradients"):
        return replace(evidence, **{scenario: {} if instead is None else dict.fromkeys((1, 2), instead)})
    if scenario in ("inspection", "gradients", "precision"):
        return replace(evidence, **{scenario: instead})
    traces = {
        key: found
        for key, found in evidence.traces.items()
        if key[0].partition(".")[0] != scenario or size not in (None, key[1])
    }
    if instead is not None:
        traces |= {key: instead for key in evidence.traces if key not in traces}
    return replace(evidence, traces=traces)
