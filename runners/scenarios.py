"""The scenarios: how a model is put through an engine, and what proves that it really went that way.

A new scenario is one value in `ENGINE_SCENARIOS` or `DEPLOYMENTS`. Neighbours with the same engine options share
an engine, and every engine has a process of its own, in which no model was ever built: vLLM keeps objects of models
in caches, such as rotary tables, and an engine would take those of the run before. A scenario whose proof fails is
an error of the harness, never a verdict on the model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from genmodel.runners.evidence import Inspection, Proof, Request, Trace
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
    scarce: bool = False
    """Take the free blocks of the KV cache away once all requests are being continued, until one is preempted."""
    random_state: int | None = None
    """What PyTorch's random number generators are seeded with first; None leaves them as they are."""
    embedded: bool = False
    """Hand prompts over as the embeddings of their tokens, and not as token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One configuration of an in-process engine, what it is put through, and the proof of it."""

    name: str
    passes: tuple[Pass, ...]
    unproven: Callable[[Sequence[Trace], Asked], str]
    """Why one rank's traces, one per pass, do not show the path the scenario is named for; empty if they do."""
    options: Callable[[Plan], Mapping[str, Any]] = lambda plan: {}
    """Engine options on top of IN_PROCESS_OPTIONS."""
    inapplicable: Callable[[Inspection], str] = lambda inspection: ""
    """Why a model cannot be run in this way; empty if it can."""


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
    """Prompts that each need another block soon after they begin to be continued."""
    length = 2 * BLOCK_SIZE - 4
    source = max((request.prompt for request in plan.requests), key=len)
    prompts = [(source[i:] + source)[:length] for i in range(CROWD)]
    return [[Request(name=f"crowd_{i}", prompt=p, max_tokens=GENERATED) for i, p in enumerate(prompts)]]


def _nothing_cached(plan: Plan) -> dict[str, Any]:  # noqa: ARG001 - as all options
    return {"enable_prefix_caching": False}  # else what was computed before is not computed again


def _few(plan: Plan) -> Batches:
    """A few requests, twice: the second time, whole blocks of the prompts come from the prefix cache."""
    named = _named(plan, "short", "long_prefix_a", "long_prefix_b", "block_filling")
    few = [replace(request, max_tokens=min(8, request.max_tokens)) for request in named]
    return [few, [_again(request) for request in few]]


def _few_short(plan: Plan) -> Batches:
    named = _named(plan, "one_token", "vocabulary_edges", "short", "block_crossing")
    return [[replace(request, max_tokens=min(4, request.max_tokens)) for request in named]]


def reads_cache(scenario: Scenario) -> bool:
    """Whether some of its requests read vLLM's prefix cache, which those whose prompts are scored do not."""
    return any(not through.score_prompt and not through.embedded for through in scenario.passes)


def engines(names: Sequence[str], plan: Plan) -> list[list[str]]:
    """Engine scenarios by the engine they run in: neighbours with the same options share one."""
    groups = itertools.groupby(names, key=lambda name: ENGINE_SCENARIOS[name].options(plan))
    return [list(group) for _, group in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a scenario was asked to be, which its proof is held against."""

    inspection: Inspection
    dtype: str
    tensor_parallel_size: int
    backend: str = ""
    """The attention backend of the target's first engine in this dtype; empty before there is one."""


def _engine_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    """What is the same for every engine: its ranks, its dtype, and vLLM's attention on the backend of all others."""
    return next((reason for trace in traces if (reason := _astray(trace.proof, trace.rank, asked))), "")


def _astray(proof: Proof, rank: int, asked: Asked) -> str:
    if not proof.world_size == proof.tensor_parallel_size == asked.tensor_parallel_size:
        return f"asked for {asked.tensor_parallel_size} ranks, ran on {proof.world_size}"
    if proof.rank != rank:
        return f"rank {rank} ran as rank {proof.rank}"
    return _other_engine(proof, asked)


def _other_engine(proof: Proof, asked: Asked) -> str:
    if proof.dtype != asked.dtype:
        return f"asked for {asked.dtype}, ran in {proof.dtype}"
    if asked.inspection.attention and not proof.attention_backend:
        return "no attention layer of vLLM's ran, so nothing used the KV cache"
    if asked.backend and proof.attention_backend != asked.backend:
        return f"attention ran on {proof.attention_backend}, and on {asked.backend} in other engines of this model"
    return ""


def _eager_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    proof = traces[0].proof
    compiles = not proof.eager or proof.compiled_models or proof.captured_graphs
    return "the engine compiled the model" if compiles else _engine_unproven(traces, asked)


def _plain_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    if max(traces[0].proof.batch_sizes) < 2:
        return "no two requests ever ran together"
    return _eager_unproven(traces, asked)


def _alone_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    together = max(traces[0].proof.batch_sizes)
    return f"{together} requests ran together" if together > 1 else _eager_unproven(traces, asked)


def _arrivals_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    late = [c for c in traces[0].continuations if c.joined > 0]
    return _eager_unproven(traces, asked) if late else "no request joined others that were already running"


def _chunked_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    split = [c for c in traces[0].continuations if c.chunk_boundary is not None]
    return _eager_unproven(traces, asked) if split else "no prompt was computed in more than one step"


def _cached_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    hits = [c for c in traces[0].continuations if c.cached_tokens]
    return _eager_unproven(traces, asked) if hits else "no prompt token was taken from the prefix cache"


def _preempted_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    resumed = [c for c in traces[0].continuations if c.resumed_at]
    return _eager_unproven(traces, asked) if resumed else "no request was preempted"


def _repeated_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    states = [trace.proof.random_state for trace in traces]
    if len(set(states)) < len(traces):
        return f"the random number generators began at the same state: {states}"
    return _eager_unproven(traces, asked)


def _embedded_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    (trace,) = traces
    tokens = sum(len(c.request.prompt) for c in trace.continuations)
    if trace.proof.embedded_tokens < tokens:
        return f"of {tokens} prompt tokens, the model was given {trace.proof.embedded_tokens} as embeddings alone"
    return _eager_unproven(traces, asked)


def _refit_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    cached = any(c.cached_tokens for c in traces[0].continuations)
    # Without a cache nothing in it can be stale, and whatever else the old weights left behind shows all the same.
    if not cached and not asked.inspection.no_prefix_caching:
        return "the prefix cache was never read, so nothing stale could show"
    return _eager_unproven(traces, asked)


def _compiled_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    return _uncompiled(traces[0].proof, asked.inspection) or _engine_unproven(traces, asked)


def _uncompiled(proof: Proof, inspection: Inspection) -> str:
    """Why this engine is not one whose every rank ran what vLLM compiles or captures of the model; empty if it is."""
    if proof.eager:
        return "the engine ran eagerly"
    if inspection.compiles and not proof.compiled_models:
        return "vLLM saw no model that it compiles"
    if inspection.compiles and not proof.compiled_graphs:
        return "vLLM compiled no graph on some rank"
    return "vLLM captured no CUDA graph on some rank" if inspection.captures and not proof.captured_graphs else ""


def compiles_nothing(inspection: Inspection) -> str:
    """Why a compiled engine of this model is an eager one; empty if it is not: on CUDA vLLM captures graphs of any."""
    if inspection.compiles or inspection.captures:
        return ""
    return "vLLM compiles nothing of this model: no class in it is decorated with vLLM's @support_torch_compile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One way in which users deploy: a default executor with fresh worker processes, and the proof of it."""

    name: str
    about: str
    """The call that starts it, as a user writes it; {size} is the tensor-parallel size."""
    unproven: Callable[[Sequence[Trace], Asked], str]
    """Why its one trace, of the driver, does not show that; empty if it does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Engine options on top of the default ones, but for the tensor-parallel size."""
    stages: int = 1
    """Pipeline-parallel size."""
    inapplicable: Callable[[Inspection], str] = lambda inspection: ""
    """Why a model cannot be deployed in this way; empty if it can."""


FRESH_START_METHODS = ("spawn", "forkserver")
"""Of these multiprocessing's processes have nothing of the one that started them but what they were sent."""


def _fresh_workers_unproven(trace: Trace, ranks: int) -> str:
    proof = trace.proof
    if proof.start_method not in FRESH_START_METHODS or proof.pid in proof.worker_pids:
        return f"the workers were not fresh processes: {proof.start_method}, pids {proof.worker_pids}"
    if len(set(proof.worker_pids)) != ranks:
        return f"{len(set(proof.worker_pids))} workers for {ranks} ranks"
    return ""


def deployed_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    """Whether a trace comes from what users deploy: fresh worker processes, one for each rank, that compiled it."""
    (trace,) = traces
    uncompiled = "" if compiles_nothing(asked.inspection) else _uncompiled(trace.proof, asked.inspection)
    return _fresh_workers_unproven(trace, asked.tensor_parallel_size) or uncompiled or _engine_unproven(traces, asked)


def deployed_eagerly_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    """Whether a trace comes from fresh worker processes, one for each rank, that compiled nothing."""
    (trace,) = traces
    return _fresh_workers_unproven(trace, asked.tensor_parallel_size) or _eager_unproven(traces, asked)


def pipeline_unproven(traces: Sequence[Trace], asked: Asked) -> str:
    """Whether a trace comes from fresh worker processes, with half of the layers each."""
    (trace,) = traces
    proof, ranks = trace.proof, 2 * asked.tensor_parallel_size
    if (proof.world_size, proof.tensor_parallel_size) != (ranks, asked.tensor_parallel_size):
        return f"asked for {ranks} ranks in two stages, ran on {proof.world_size}"
    if Counter(proof.stages) != dict.fromkeys((0, 1), asked.tensor_parallel_size):
        return f"the ranks were in stages {', '.join(map(str, proof.stages))}"
    return _fresh_workers_unproven(trace, ranks) or _other_engine(proof, asked)


DEPLOYMENTS = {
    deployment.name: deployment
    for deployment in (
        Deployment(
            name="deployed",
            about="LLM(tensor_parallel_size={size})",
            unproven=deployed_unproven,
        ),
        Deployment(
            name="deployed_eager",
            about="LLM(tensor_parallel_size={size}, enforce_eager=True)",
            unproven=deployed_eagerly_unproven,
            options={"enforce_eager": True},
            inapplicable=lambda inspection: (
                compiles_nothing(inspection)
                and f"{compiles_nothing(inspection)}, and so the deployed scenario is an eager one"
            ),
        ),
        Deployment(
            name="pipeline",
            about="LLM(tensor_parallel_size={size}, pipeline_parallel_size=2)",
            unproven=pipeline_unproven,
            stages=2,
            inapplicable=lambda inspection: (
                "" if inspection.supports_pipeline else "the model does not declare pipeline parallelism (SupportsPP)"
            ),
        ),
    )
}
"""By name, in the order they are run in; all with default options, and the plain scenario's requests."""


def _refit_pass(name: str, weights: str) -> Pass:
    return Pass(name=f"refit.{name}", batches=_few, weights=weights, score_prompt=False)


ENGINE_SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="plain", passes=(Pass(name="plain", batches=_together),), unproven=_plain_unproven),
        Scenario(name="alone", passes=(Pass(name="alone", batches=_one_by_one),), unproven=_alone_unproven),
        Scenario(
            name="repeated",
            passes=(
                Pass(name="repeated.first", batches=_few_short, random_state=1),
                Pass(name="repeated.second", batches=_few_short, random_state=2),
            ),
            unproven=_repeated_unproven,
        ),
        Scenario(
            name="arrivals",
            passes=(Pass(name="arrivals", batches=_backwards, stagger=2),),
            unproven=_arrivals_unproven,
        ),
        Scenario(
            name="cached",
            passes=(Pass(name="cached", batches=_same_prefix, score_prompt=False),),
            unproven=_cached_unproven,
            inapplicable=lambda inspection: inspection.no_prefix_caching,
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
            inapplicable=lambda inspection: inspection.no_chunked_prefill,
        ),
        Scenario(
            name="preempted",
            passes=(Pass(name="preempted", batches=_crowd, score_prompt=False, scarce=True),),
            unproven=_preempted_unproven,
            options=_nothing_cached,
        ),
        Scenario(
            name="embeds",
            passes=(Pass(name="embeds", batches=_few_short, score_prompt=False, embedded=True),),
            unproven=_embedded_unproven,
            options=lambda plan: {"enable_prompt_embeds": True, "enable_prefix_caching": False},
            inapplicable=lambda inspection: (
                "" if inspection.takes_embeddings else "the model's forward has no argument inputs_embeds"
            ),
        ),
        Scenario(
            name="compiled",
            passes=(Pass(name="compiled", batches=_together),),
            unproven=_compiled_unproven,
            options=lambda plan: {"enforce_eager": False},
            inapplicable=compiles_nothing,
        ),
        Scenario(
            name="bfloat16",
            passes=(Pass(name="bfloat16", batches=_together),),
            unproven=_eager_unproven,
            options=lambda plan: {"dtype": "bfloat16"},
        ),
    )
}
"""By name, in the order they are run in: neighbours with the same options share an engine."""

SCENARIOS = (
    "inspection",
    "gradients",
    "precision",
    "parallel_gradients",
    "weights",
    "reference",
    *ENGINE_SCENARIOS,
    *DEPLOYMENTS,
)
"""Everything a check can ask for."""
