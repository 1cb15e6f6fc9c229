"""Real vLLM engines: start one, put the workload through it, and keep what it scored as evidence."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from genmodel.modeling import _vllm
from genmodel.runners import precision
from genmodel.runners.evidence import Continuation, Proof, Request, Scores, Trace
from genmodel.runners.scenarios import Pass, Plan

FULL_VOCABULARY = 4096
"""Up to this size every logit is kept; beyond it the best CANDIDATES of each position."""
CANDIDATES = 1024
HALF = ("bfloat16", "float16")
DEPLOYED_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # or what stands for it here: see runners/forked.py
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # our own question to the workers travels as a function
}


def candidates(vocab_size: int) -> int:
    """K, the number of scored candidates per position."""
    return vocab_size if vocab_size <= FULL_VOCABULARY else CANDIDATES


def trace(
    llm: Any,
    through: Pass,
    plan: Plan,
    *,
    rank: int,
    weights: str = "initial",
    in_process: bool = True,
) -> Trace:
    """Put one pass's requests through an engine and return what it scored.

    Args:
        llm: a started engine.
        through: which requests, and how.
        plan: what the model can take.
        rank: this process's tensor-parallel rank.
        weights: which weights the model holds.
        in_process: whether the scheduler lives in this process and can be observed.
    """
    with _watched(llm, in_process) as seen:
        found = _trace(llm, through, plan, rank, weights, in_process=in_process)
    return found if seen is None else replace(found, modules=seen.dtypes, inside=seen.inside)


def ask_workers(llm: Any, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(worker, *arguments)` returns in every worker of an engine, by rank.

    Pickled: vLLM's own way of sending makes dicts of dataclasses.
    """
    asked = pickle.dumps((function, arguments))
    return [pickle.loads(answer) for answer in llm.collective_rpc(_answered, args=(asked,))]


def _answered(worker: Any, asked: bytes) -> bytes:
    function, arguments = pickle.loads(asked)
    return pickle.dumps(function(worker, *arguments))


def _watched(llm: Any, in_process: bool) -> contextlib.AbstractContextManager[precision.Seen | None]:
    """See the dtypes of an eager engine in half precision, if its model is in this process."""
    if in_process:
        facts = _vllm.engine_facts(llm)
        if facts["eager"] and facts["workers"][0]["dtype"] in HALF:
            return precision.watched(_vllm.model_of(llm))
    return contextlib.nullcontext()


def _trace(llm: Any, through: Pass, plan: Plan, rank: int, weights: str, *, in_process: bool) -> Trace:
    if through.random_state is not None:
        torch.manual_seed(through.random_state)
    random_state = torch.initial_seed()
    embedded_tokens = 0
    continuations: list[Continuation] = []
    sizes: list[int] = []
    for requests in through.batches(plan):
        prompts = [
            {
                "tokens": r.prompt,
                "max_tokens": r.max_tokens,
                "temperature": r.temperature,
                "seed": r.seed,
                "candidates": candidates(plan.vocab_size),
                "score_prompt": through.score_prompt,
                "embedded": through.embedded,
            }
            for r in requests
        ]
        observed: contextlib.AbstractContextManager[list[dict[str, int]]] = (
            _vllm.observe_schedule(llm) if in_process else contextlib.nullcontext([])
        )
        scarce = _vllm.scarce_cache(llm, len(requests)) if through.scarce else contextlib.nullcontext()
        embeddings: contextlib.AbstractContextManager[list[int]] = (
            _vllm.observe_embeddings(llm) if through.embedded else contextlib.nullcontext([])
        )
        with scarce, observed as steps, embeddings as embedded:
            outputs = _vllm.generate(llm, prompts, through.stagger)
        embedded_tokens += sum(embedded)
        sizes.append(max((len(step) for step in steps), default=0))
        continuations += [_continuation(r, o, steps) for r, o in zip(requests, outputs, strict=True)]
    facts = _vllm.engine_facts(llm)  # now, for vLLM may compile at the first requests
    mine = facts["workers"][0]
    return Trace(
        scenario=through.name,
        tensor_parallel_size=facts["tensor_parallel_size"],
        rank=rank,
        continuations=tuple(continuations),
        weights=weights,
        proof=Proof(
            world_size=facts["world_size"],
            tensor_parallel_size=facts["tensor_parallel_size"],
            rank=rank,
            pid=os.getpid(),
            worker_pids=tuple(w["pid"] for w in facts["workers"]),
            model_class=mine["model_class"],
            attention_backend=mine["backend"],
            dtype=mine["dtype"],
            executor=facts["executor"],
            eager=facts["eager"],
            start_method=mine["start_method"],
            batch_sizes=tuple(sizes) if in_process else (),
            block_size=facts["block_size"],
            compiled_models=min(w["compiled_models"] for w in facts["workers"]),
            compiled_graphs=min(w["compiled_graphs"] for w in facts["workers"]),
            captured_graphs=min(w["captured_graphs"] for w in facts["workers"]),
            random_state=random_state,
            embedded_tokens=embedded_tokens,
            stages=tuple(w["stage"] for w in facts["workers"]),
        ),
    )


def _continuation(request: Request, output: Any, schedule: list[dict[str, int]]) -> Continuation:
    prompt_length = len(request.prompt)
    completion = output.outputs[0]
    return Continuation(
        request=request,
        generated=tuple(completion.token_ids),
        prompt_scores=_scores(output.prompt_logprobs, 0) if output.prompt_logprobs and prompt_length > 1 else None,
        step_scores=_scores(completion.logprobs, prompt_length - 1),
        cached_tokens=output.num_cached_tokens or 0,
        steps=tuple(step[output.request_id] for step in schedule if output.request_id in step),
        joined=next((i for i, step in enumerate(schedule) if output.request_id in step), 0),
    )


def _scores(flat: Any, first: int) -> Scores:
    """vLLM's flat lists, whose rows are the chosen token and then the K best; empty rows are left out."""
    rows = [(start, end) for start, end in zip(flat.start_indices, flat.end_indices, strict=True) if end > start]
    width = rows[0][1] - rows[0][0]
    ids = np.asarray(flat.token_ids, dtype=np.int64).reshape(len(rows), width)[:, 1:]
    values = np.asarray(flat.logprobs, dtype=np.float32).reshape(len(rows), width)[:, 1:]
    return Scores(first=first, ids=torch.from_numpy(ids.copy()), values=torch.from_numpy(values.copy()))


@contextlib.contextmanager
def environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Change environment variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in changes}
    _apply(changes)
    try:
        yield
    finally:
        _apply(before)


def _apply(changes: dict[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
