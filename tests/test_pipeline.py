"""A model in two pipeline stages, with one and with two tensor-parallel ranks in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from evidence_samples import clean
from genmodel.conformance import catalogue
from genmodel.conformance.replay import diagnosis_of
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Failure, Trace
from genmodel.runners.scenarios import Asked, pipeline_unproven
from genmodel.runners.session import Session, TargetOptions

CHECK = catalogue.get("deployment.pipeline")
RIGHT = TargetOptions(spec="genmodel.reference_models.vllm_layers:VllmDense", tensor_parallel_sizes=(1, 2))
TOLD = {
    "ResidualNone": 'stage 0 sends intermediate tensor "residual" as NoneType; every value must be a tensor',
    "ResidualMissing": 'stage 0 sends intermediate tensors "hidden_states", and stage 1 expects "hidden_states", '
    '"residual", as make_empty_intermediate_tensors has them',
    "ResidualNarrow": 'stage 0 sends intermediate tensor "residual" as [',
    "BareTensor": "stage 0 returns a Tensor; all but the last of 2 return IntermediateTensors",
}
"""What is said of models that send what they must not."""
WRONG = {name: TargetOptions(spec=f"mutants.pipeline_mutants:{name}", tensor_parallel_sizes=(1,)) for name in TOLD}
PLACED = {
    name: TargetOptions(
        spec=f"mutants.pipeline_mutants:{name}",
        reference="genmodel.reference_models.dense:factory",
        tensor_parallel_sizes=(size,),
    )
    for name, size in (("LayersNumberedByStage", 1), ("ResidualForgotten", 2))
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session([RIGHT, *WRONG.values(), *PLACED.values()]) as running:
        yield running


def test_two_stages_of_one_and_of_two_ranks(session: Session) -> None:
    """Four workers, two in each stage, and the reference's answers."""
    evidence = session.collect(RIGHT, CHECK.needs)
    traces = {size: found for (name, size), found in evidence.traces.items() if name == "pipeline"}
    assert sorted(traces) == [1, 2]
    for size, found in traces.items():
        assert not isinstance(found, Failure), found
        assert len(set(found[0].proof.worker_pids)) == 2 * size
        assert sorted(found[0].proof.stages) == sorted([0, 1] * size)
    verdict = catalogue.judge(CHECK, evidence)
    assert verdict.status is Status.PASSED, verdict


@pytest.mark.parametrize("name", PLACED)
def test_the_stage_is_named(session: Session, name: str) -> None:
    """And the module; what the stage is handed on is said to be a cause where it may be one."""
    verdict = catalogue.judge(CHECK, session.collect(PLACED[name], CHECK.needs))
    assert verdict.status is Status.FAILED, verdict
    said = diagnosis_of(session, PLACED[name]).of(CHECK, verdict).diagnosis
    assert said.startswith("First to differ: layers.2."), said
    assert " in stage 1 of the pipeline" in said
    assert "what stage 0 sends may be wrong" in said
    assert ("on every rank" in said) == (name == "ResidualForgotten")


@pytest.mark.parametrize("name", TOLD)
def test_what_a_stage_sends_is_told(session: Session, name: str) -> None:
    """Stage, key and type, where vLLM says "see stack trace above", or nothing."""
    evidence = session.collect(WRONG[name], CHECK.needs)
    found: Any = evidence.traces["pipeline", 1]
    assert isinstance(found, Failure)
    assert TOLD[name] in found.message
    assert found.kind == "raised"
    verdict = catalogue.judge(CHECK, evidence)
    assert verdict.status is Status.FAILED
    assert TOLD[name] in verdict.reason


def test_the_proof_of_a_pipeline() -> None:
    """As many workers as ranks, as many of them in each stage, all of them fresh processes."""
    evidence = clean()
    (trace,) = evidence.traces["pipeline", 2]  # type: ignore[misc]
    assert isinstance(trace, Trace)
    asked = Asked(inspection=evidence.inspection, dtype="float32", tensor_parallel_size=2)  # type: ignore[arg-type]
    assert pipeline_unproven([trace], asked) == ""
    for change, said in (
        ({"stages": (0, 0, 0, 1)}, "the ranks were in stages 0, 0, 0, 1"),
        ({"world_size": 2}, "asked for 4 ranks in two stages, ran on 2"),
        ({"worker_pids": (200, 200, 201, 201)}, "2 workers for 4 ranks"),
        ({"start_method": "fork"}, "not fresh processes: fork"),
    ):
        assert said in pipeline_unproven([replace(trace, proof=replace(trace.proof, **change))], asked)  # type: ignore[arg-type]
