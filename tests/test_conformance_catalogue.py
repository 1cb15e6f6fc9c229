"""The catalogue: ids, docstrings, choosing, and judging that never raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from evidence_samples import clean
from genmodel.conformance import api
from genmodel.conformance.catalogue import GROUPS, Check, UnknownCheck, all_checks, check, get, judge, select
from genmodel.conformance.verdict import Level, Measurement, NotApplicable, Status, Verdict
from genmodel.runners.evidence import Evidence, Failure
from genmodel.runners.scenarios import SCENARIOS

REPORT = re.compile(r"([\w-]+)?#\d+")


@pytest.mark.parametrize("found", all_checks(), ids=lambda found: found.id)
def test_every_docstring_tells_claim_causes_fix_and_reports(found: Check) -> None:
    assert found.claim.endswith("."), found.claim
    assert found.causes
    assert found.fix
    assert found.reports
    assert all(REPORT.fullmatch(report) for report in found.reports), found.reports
    assert found.needs <= set(SCENARIOS)


def test_ids_are_group_and_function_in_catalogue_order() -> None:
    found = all_checks()
    assert [GROUPS.index(f.group) for f in found] == sorted(GROUPS.index(f.group) for f in found)
    assert {f.group for f in found} == set(GROUPS)
    assert all(f.id == f"{f.group}.{f.function.__name__}" for f in found)
    assert len({f.id for f in found}) == len(found)


def test_ids_are_frozen() -> None:
    """Users write them in commands and expectation files: they may be added to, never changed."""
    assert [f.id for f in all_checks()] == [
        "interface.builds",
        "interface.signature",
        "interface.embed_input_ids",
        "interface.forward",
        "interface.compute_logits",
        "interface.vllm_accepts",
        "interface.arguments_kept",
        "interface.inputs_embeds",
        "interface.parameters_registered",
        "interface.attention_prefixes",
        "interface.rebuild",
        "interface.random_state",
        "interface.repeatable",
        "interface.prompt_embeddings",
        "interface.reaches_workers",
        "gradients.every_parameter",
        "gradients.attention_inputs",
        "gradients.numeric",
        "gradients.training_mode",
        "gradients.batch",
        "gradients.float32",
        "gradients.bfloat16",
        "gradients.autocast",
        "gradients.causality",
        "gradients.packed_sequences",
        "gradients.train_eval",
        "gradients.dropout",
        "gradients.loss_falls",
        "gradients.parallel",
        "gradients.norm",
        "weights.all_loaded",
        "weights.every_element",
        "weights.local_order",
        "weights.replicated",
        "weights.any_order",
        "weights.arguments_kept",
        "weights.wrong_shape_refused",
        "weights.conversion_refused",
        "weights.unknown_refused",
        "weights.missing_refused",
        "weights.tied",
        "parallelism.local_heads",
        "parallelism.parameters_shrink",
        "parallelism.kv_replication",
        "parallelism.vocabulary",
        "logits.complete",
        "logits.resolution",
        "logits.prefill_top_k",
        "logits.first_token",
        "logits.decode_top_k",
        "logits.values",
        "logits.greedy_rank",
        "logits.kl",
        "logits.tensor_parallel",
        "logits.ranks_agree",
        "logits.batching",
        "logits.bfloat16",
        "logits.module_dtypes",
        "logits.float16_range",
        "scheduling.chunked_prefill",
        "scheduling.prefix_cache",
        "scheduling.preemption",
        "scheduling.arrival_order",
        "scheduling.max_model_len",
        "refit.changed_weights",
        "refit.identity",
        "refit.no_drift",
        "deployment.compiled",
        "deployment.pipeline",
        "deployment.multiprocess",
        "deployment.eager",
    ]


def test_sections_keep_code_as_it_stands() -> None:
    fix = get("interface.forward").fix
    assert fix.startswith("All requests arrive")
    assert "\n    def forward(self, input_ids, positions" in fix


def test_unknown_ids_name_close_ones() -> None:
    with pytest.raises(UnknownCheck, match=r"did you mean logits\.values"):
        get("logits.value")
    with pytest.raises(UnknownCheck, match=r"there are interface\.builds"):
        select(ids=["§"])


def test_selection_by_id_group_and_level() -> None:
    assert [f.id for f in select(ids=["logits.kl", "interface.builds"])] == ["interface.builds", "logits.kl"]
    assert {f.group for f in select(groups=["gradients"])} == {"gradients"}
    required = select(level=Level.REQUIRED)
    assert {f.level for f in required} == {Level.REQUIRED}
    assert len(required) < len(select())


def test_a_check_stays_a_function() -> None:
    from genmodel.conformance.checks import logits

    measurements = list(logits.values(clean()))
    assert measurements
    assert all(m.ok for m in measurements)


def test_needs_must_be_scenarios() -> None:
    with pytest.raises(ValueError, match="no such scenario: wishes"):
        check(needs=("wishes",))


def measuring(*measured: float, then: Exception | None = None) -> Verdict:
    """The verdict of a check that makes these measurements, of which 1 is allowed, and then raises."""

    def function(evidence: Evidence) -> Iterator[Measurement]:
        """A claim."""
        for number in measured:
            yield Measurement(what=evidence.target.name, where="TP=1", measured=number, allowed=1)
        if then is not None:
            raise then

    declared = check(needs=())(function)
    return judge(vars(declared)["__genmodel_check__"], clean())


def test_a_check_that_measured_nothing_is_an_error() -> None:
    assert measuring().status is Status.ERROR


@pytest.mark.parametrize("number", [1.1, float("nan"), float("inf")])
def test_every_measurement_has_to_be_within_its_limit(number: float) -> None:
    assert measuring(0.5, 1.0).status is Status.PASSED
    assert measuring(0.5, number).status is Status.FAILED


def test_an_exception_is_an_error_that_keeps_what_was_measured() -> None:
    verdict = measuring(0.5, then=RuntimeError("oops"))
    assert verdict.status is Status.ERROR
    assert verdict.reason == "the check itself raised RuntimeError: oops"
    assert "in function" in verdict.details
    assert len(verdict.measurements) == 1


def test_not_applicable_carries_its_reason_and_cannot_hide_measurements() -> None:
    assert measuring(then=NotApplicable("no layers")).status is Status.NOT_APPLICABLE
    assert measuring(2.0, then=NotApplicable("no layers")).status is Status.ERROR


@pytest.mark.parametrize(
    ("measured", "allowed", "ok", "ratio"),
    [(0, 0, True, 0.0), (1, 0, False, float("inf")), (1, 2, True, 0.5), (3, 2, False, 1.5), (-1, 2, True, 0.0)],
)
def test_measurements(measured: float, allowed: float, ok: bool, ratio: float) -> None:
    found = Measurement(what="", where="", measured=measured, allowed=allowed)
    assert (found.ok, found.ratio) == (ok, ratio)


@pytest.mark.parametrize(("measured", "allowed"), [(float("nan"), 1), (1, float("nan")), (0, float("inf"))])
def test_limits_that_mean_nothing_are_not_met(measured: float, allowed: float) -> None:
    found = Measurement(what="", where="", measured=measured, allowed=allowed)
    assert not found.ok
    assert found.severity[0]


class RecordingSession:
    """Stands in for the hosts: hands out clean evidence and remembers what it was asked."""

    asked: Any = None

    def __init__(self, _: Any, progress: Any) -> None:
        progress("started")

    def close(self) -> None:
        pass

    def collect(self, options: Any, scenarios: Any) -> Evidence:
        type(self).asked = options, scenarios
        return clean()


def test_check_model_runs_only_what_its_checks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "Session", RecordingSession)
    lines: list[str] = []
    verdicts = api.check_model(measuring, tp=(1,), checks=["interface.builds", "logits.values"], progress=lines.append)
    options, scenarios = RecordingSession.asked
    assert [v.check for v in verdicts] == ["interface.builds", "logits.values"]
    assert not any(v.blocking for v in verdicts)
    assert scenarios == {"inspection", "reference", "plain"}
    assert (options.spec, options.target, options.tensor_parallel_sizes) == (f"{__name__}:measuring", measuring, (1,))
    assert lines == ["started"]


def test_check_model_by_name_runs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "Session", RecordingSession)
    verdicts = api.check_model("my_pkg:factory", config="c.json", weights="w")
    options, scenarios = RecordingSession.asked
    assert len(verdicts) == len(all_checks())
    assert (options.spec, options.target, options.config, str(options.weights)) == (
        "my_pkg:factory",
        None,
        "c.json",
        "w",
    )
    assert scenarios == set(SCENARIOS)


@pytest.mark.parametrize("message", ["the engine's core died while starting the engine", "the engine's core died"])
def test_what_a_process_was_doing_is_said_once(message: str) -> None:
    """Whoever noticed a death has often said it."""
    failure = Failure(kind="died", scenario="deployed", message=message, rank=0, phase="starting the engine")
    verdict = judge(get("deployment.multiprocess"), replace(clean(), traces={("deployed", 1): failure}))
    assert verdict.reason.count("while starting the engine") == 1
