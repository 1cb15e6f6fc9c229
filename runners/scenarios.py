"""The scenarios: how a model is put through an engine, and what proves that it really went that way.

A new scenario is one value in `ENGINE_SCENARIOS`. Scenarios with the same engine options share an
engine. A scenario whose proof fails is an error of the harness, never a verdict on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genmodel.runners.evidence import Inspection, Request, Trace
from genmodel.runners.workload import BLOCK_SIZE, shared_workload

LONGEST = 2048
"""Most tokens of a sequence, prompt and generated, whatever longer ones the model can take."""
SMALLEST_KV_CACHE = 64 << 20
"""Bytes; vLLM refuses to start on much less."""
IN_PROCESS_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": LONGEST,  # a whole prompt in one step: chunking is a scenario of its own
    "block_size": BLOCK_SIZE,
    "enable_prefix_caching": False,
}
"""Engine options of every in-process scenario, unless it says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One way through an in-process engine."""

    name: str
    batches: Callable[[Sequence[Request]], list[list[Request]]]
    """The workload as batches of requests that are submitted together."""
    unproven: Callable[[Trace], str]
    """Why a trace does not show the path the scenario is named for; empty if it does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Engine options on top of IN_PROCESS_OPTIONS."""
    score_prompt: bool = True
    """Score the prompt's own tokens too; vLLM does not read its prefix cache then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the inspection of a target says about running it."""

    requests: tuple[Request, ...]
    vocab_size: int
    max_model_len: int
    kv_cache_bytes: int
    """For in-process engines: room for every request at once."""
    deployed_kv_cache_bytes: int
    """For a default engine, which must also hold one sequence of the config's own length."""


def plan(inspection: Inspection, seed: int) -> Plan:
    """The workload for a model, and how much memory it needs."""
    length = min(inspection.max_positions, LONGEST)
    requests = shared_workload(inspection.vocab_size, length, seed)
    per_token = sum(2 * 4 * layer.num_kv_heads * layer.head_dim for layer in inspection.attention)
    workload = len(requests) * (length + BLOCK_SIZE)
    return Plan(
        requests=requests,
        vocab_size=inspection.vocab_size,
        max_model_len=length,
        kv_cache_bytes=max(SMALLEST_KV_CACHE, per_token * workload),
        deployed_kv_cache_bytes=max(SMALLEST_KV_CACHE, per_token * (workload + 2 * inspection.max_positions)),
    )


def _one_batch(requests: Sequence[Request]) -> list[list[Request]]:
    return [list(requests)]


def _one_by_one(requests: Sequence[Request]) -> list[list[Request]]:
    return [[request] for request in requests]


def _ranks_unproven(trace: Trace) -> str:
    proof = trace.proof
    if not proof.world_size == proof.tensor_parallel_size == trace.tensor_parallel_size:
        return f"asked for {trace.tensor_parallel_size} ranks, ran on {proof.world_size}"
    return "" if proof.rank == trace.rank else f"rank {trace.rank} ran as rank {proof.rank}"


def _plain_unproven(trace: Trace) -> str:
    together = max(trace.proof.batch_sizes)
    if together < 2:
        return "no two requests ever ran together"
    return _ranks_unproven(trace)


def _alone_unproven(trace: Trace) -> str:
    together = max(trace.proof.batch_sizes)
    if together > 1:
        return f"{together} requests ran together"
    return _ranks_unproven(trace)


def deployed_unproven(trace: Trace) -> str:
    """Whether a trace comes from what users deploy: spawned workers, one for each rank."""
    proof = trace.proof
    if proof.start_method != "spawn" or proof.pid in proof.worker_pids:
        return f"the workers were not spawned processes: {proof.start_method}, pids {proof.worker_pids}"
    if len(set(proof.worker_pids)) != trace.tensor_parallel_size:
        return f"{len(set(proof.worker_pids))} workers for {trace.tensor_parallel_size} ranks"
    return ""


ENGINE_SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="plain", batches=_one_batch, unproven=_plain_unproven),
        Scenario(name="alone", batches=_one_by_one, unproven=_alone_unproven),
    )
}
"""By name, in the order they are run in."""

SCENARIOS = ("inspection", "gradients", "reference", *ENGINE_SCENARIOS, "deployed")
"""Everything a check can ask for."""
