"""The scenarios: how a model is put through an engine, and what proves that it really went that way.

A new scenario is one value in `ENGINE_SCENARIOS`. Scenarios with the same engine options share an
engine. A scenario whose proof fails is an error of the harness, never a verdict on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from genmodel.runners.evidence import Inspection, Request, Trace
from genmodel.runners.workload import BLOCK_SIZE, GENERATED, shared_workload

LONGEST = 2048
"""Most tokens of a sequence, prompt and generated, whatever longer ones the model can take."""
SMALLEST_KV_CACHE = 64 << 20
"""Bytes; vLLM refuses to start on much less."""
CROWD = 4
"""Requests that compete for too few cache blocks."""
IN_PROCESS_OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": LONGEST,  # a whole prompt in one step: chunking is a scenario of its own
    "block_size": BLOCK_SIZE,
}
"""Engine options of every in-process scenario, unless it says otherwise."""


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


Batches = list[list[Request]]
"""Requests of one batch are submitted together, and batch after batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One way of putting requests through a running engine; gives one trace."""

    name: str
    batches: Callable[[Plan], Batches]
    weights: str = ""
    """Weights to load into the running engine first, "initial" or "refit"; empty for none."""
    score_prompt: bool = True
    """Score the prompt's own tokens too; vLLM does not read its prefix cache then."""
    stagger: int = 0
    """Scheduler steps between the arrivals of two requests of a batch; 0 means all at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One configuration of an in-process engine, what it is put through, and the proof of it."""

    name: str
    passes: tuple[Pass, ...]
    unproven: Callable[[Sequence[Trace]], str]
    """Why one rank's traces, one per pass, do not show the path the scenario is named for; empty if they do."""
    options: Callable[[Plan], Mapping[str, Any]] = lambda plan: {}
    """Engine options on top of IN_PROCESS_OPTIONS."""


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


def _named(plan: Plan, *names: str) -> list[Request]:
    return [request for request in plan.requests if request.name in names]


def _together(plan: Plan) -> Batches:
    return [list(plan.requests)]


def _one_by_one(plan: Plan) -> Batches:
    return [[request] for request in plan.requests]


def _in_chunks(plan: Plan) -> Batches:
    """Long prompts with each step to themselves, then all requests together: chunks beside others' decoding."""
    return [*([_again(request)] for request in _named(plan, "long_prefix_a", "longest")), list(plan.requests)]


def _backwards(plan: Plan) -> Batches:
    return [list(reversed(plan.requests))]


def _same_prefix(plan: Plan) -> Batches:
    first, second, *_ = _named(plan, "long_prefix_a", "long_prefix_b")
    return [[first], [second, *_named(plan, "short")], [_again(first)]]


def _again(request: Request) -> Request:
    return replace(request, name=f"{request.name}.again")


def _crowd(plan: Plan) -> Batches:
    """Prompts that just fit the cache together, and no longer do once each has grown by a block."""
    length = 2 * BLOCK_SIZE - 4
    source = max((request.prompt for request in plan.requests), key=len)
    prompts = [(source[i:] + source)[:length] for i in range(CROWD)]
    return [[Request(name=f"crowd_{i}", prompt=p, max_tokens=GENERATED) for i, p in enumerate(prompts)]]


def _few_blocks(plan: Plan) -> dict[str, Any]:
    # Room for every prompt (two blocks each) and for one sequence of the longest kind, and vLLM's null block.
    blocks = max(2 * CROWD, -(-_crowd_length(plan) // BLOCK_SIZE)) + 2
    return {
        "num_gpu_blocks_override": blocks,
        "max_model_len": _crowd_length(plan),
        "enable_prefix_caching": False,  # else what was computed before is not computed again
        # Else layers with and without a window draw on the blocks in groups of their own, as many as vLLM sees fit.
        "disable_hybrid_kv_cache_manager": True,
    }


def _crowd_length(plan: Plan) -> int:
    return min(plan.max_model_len, 4 * BLOCK_SIZE)


def _few(plan: Plan) -> Batches:
    """A few requests, twice: the second time, whole blocks of the prompts come from the prefix cache."""
    named = _named(plan, "short", "long_prefix_a", "long_prefix_b", "block_filling")
    few = [replace(request, max_tokens=min(8, request.max_tokens)) for request in named]
    return [few, [_again(request) for request in few]]


def reads_cache(scenario: Scenario) -> bool:
    """Whether some of its requests read vLLM's prefix cache, which those whose prompts are scored do not."""
    return any(not through.score_prompt for through in scenario.passes)


def _ranks_unproven(trace: Trace) -> str:
    proof = trace.proof
    if not proof.world_size == proof.tensor_parallel_size == trace.tensor_parallel_size:
        return f"asked for {trace.tensor_parallel_size} ranks, ran on {proof.world_size}"
    return "" if proof.rank == trace.rank else f"rank {trace.rank} ran as rank {proof.rank}"


def _plain_unproven(traces: Sequence[Trace]) -> str:
    if max(traces[0].proof.batch_sizes) < 2:
        return "no two requests ever ran together"
    return _ranks_unproven(traces[0])


def _alone_unproven(traces: Sequence[Trace]) -> str:
    together = max(traces[0].proof.batch_sizes)
    if together > 1:
        return f"{together} requests ran together"
    return _ranks_unproven(traces[0])


def _arrivals_unproven(traces: Sequence[Trace]) -> str:
    late = [c for c in traces[0].continuations if c.joined > 0]
    return _ranks_unproven(traces[0]) if late else "no request joined others that were already running"


def _chunked_unproven(traces: Sequence[Trace]) -> str:
    split = [c for c in traces[0].continuations if c.chunk_boundary is not None]
    return _ranks_unproven(traces[0]) if split else "no prompt was computed in more than one step"


def _cached_unproven(traces: Sequence[Trace]) -> str:
    hits = [c for c in traces[0].continuations if c.cached_tokens]
    return _ranks_unproven(traces[0]) if hits else "no prompt token was taken from the prefix cache"


def _preempted_unproven(traces: Sequence[Trace]) -> str:
    resumed = [c for c in traces[0].continuations if c.resumed_at]
    return _ranks_unproven(traces[0]) if resumed else "no request was preempted"


def _refit_unproven(traces: Sequence[Trace]) -> str:
    if not any(c.cached_tokens for c in traces[0].continuations):
        return "the prefix cache was never read, so nothing stale could show"
    return _ranks_unproven(traces[0])


def _compiled_unproven(traces: Sequence[Trace]) -> str:
    return "the engine ran eagerly" if traces[0].proof.eager else _ranks_unproven(traces[0])


def _bfloat16_unproven(traces: Sequence[Trace]) -> str:
    dtype = traces[0].proof.dtype
    return f"the model's parameters are {dtype}" if dtype != "bfloat16" else _ranks_unproven(traces[0])


FRESH_START_METHODS = ("spawn", "forkserver")
"""Of these multiprocessing's processes have nothing of the one that started them but what they were sent."""


def deployed_unproven(traces: Sequence[Trace]) -> str:
    """Whether a trace comes from what users deploy: fresh worker processes, one for each rank."""
    (trace,) = traces
    proof = trace.proof
    if proof.start_method not in FRESH_START_METHODS or proof.pid in proof.worker_pids:
        return f"the workers were not fresh processes: {proof.start_method}, pids {proof.worker_pids}"
    if len(set(proof.worker_pids)) != trace.tensor_parallel_size:
        return f"{len(set(proof.worker_pids))} workers for {trace.tensor_parallel_size} ranks"
    return ""


DEPLOYED = Pass(name="deployed", batches=_together)


def pipeline_unproven(traces: Sequence[Trace]) -> str:
    """Whether a trace comes from two fresh worker processes with half of the layers each."""
    (trace,) = traces
    proof = trace.proof
    if proof.world_size != 2 or proof.tensor_parallel_size != 1 or len(set(proof.worker_pids)) != 2:
        return f"world size {proof.world_size}, {len(set(proof.worker_pids))} workers"
    fresh = proof.start_method in FRESH_START_METHODS
    return "" if fresh else f"the workers were not fresh processes: {proof.start_method}"


def _refit_pass(name: str, weights: str) -> Pass:
    return Pass(name=f"refit.{name}", batches=_few, weights=weights, score_prompt=False)


ENGINE_SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="plain", passes=(Pass(name="plain", batches=_together),), unproven=_plain_unproven),
        Scenario(name="alone", passes=(Pass(name="alone", batches=_one_by_one),), unproven=_alone_unproven),
        Scenario(
            name="arrivals",
            passes=(Pass(name="arrivals", batches=_backwards, stagger=2),),
            unproven=_arrivals_unproven,
        ),
        Scenario(
            name="cached",
            passes=(Pass(name="cached", batches=_same_prefix, score_prompt=False),),
            unproven=_cached_unproven,
        ),
        Scenario(
            name="refit",
            passes=(
                _refit_pass("before", ""),
                _refit_pass("identity", "initial"),
                _refit_pass("changed", "refit"),
                _refit_pass("restored", "initial"),
                _refit_pass("again", "refit"),
            ),
            unproven=_refit_unproven,
        ),
        Scenario(
            name="chunked",
            passes=(Pass(name="chunked", batches=_in_chunks),),
            unproven=_chunked_unproven,
            # Not a multiple of the block size, so that a chunk ends inside a block.
            options=lambda plan: {"max_num_batched_tokens": 2 * BLOCK_SIZE - 13, "enable_chunked_prefill": True},
        ),
        Scenario(
            name="preempted",
            passes=(Pass(name="preempted", batches=_crowd, score_prompt=False),),
            unproven=_preempted_unproven,
            options=_few_blocks,
        ),
        Scenario(
            name="compiled",
            passes=(Pass(name="compiled", batches=_together),),
            unproven=_compiled_unproven,
            options=lambda plan: {"enforce_eager": False},
        ),
        Scenario(
            name="bfloat16",
            passes=(Pass(name="bfloat16", batches=_together),),
            unproven=_bfloat16_unproven,
            options=lambda plan: {"dtype": "bfloat16"},
        ),
    )
}
"""By name, in the order they are run in: neighbours with the same options share an engine."""

SCENARIOS = (
    "inspection",
    "gradients",
    "parallel_gradients",
    "weights",
    "reference",
    *ENGINE_SCENARIOS,
    "deployed",
    "pipeline",
)
"""Everything a check can ask for."""
