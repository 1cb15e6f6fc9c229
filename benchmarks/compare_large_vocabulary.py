#!/usr/bin/env python
"""Time and memory of judging one engine trace over a vocabulary of 128,000 at 2,048 positions.

    python benchmarks/compare_large_vocabulary.py

The reference is the dense [2048, 128000] float32 it is in real evidence (1.05 GB); the engine scored the best
1,024 tokens of each position. All checks that compare the trace with the reference run; the limits are 2 s and
2 GB, the evidence included. Exits with 1 if either is exceeded.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from genmodel.conformance.catalogue import judge, select
from genmodel.conformance.verdict import Status
from genmodel.runners.evidence import Continuation, Evidence, Proof, ReferenceRun, Request, Scores, TargetInfo, Trace

CHECKS = (
    "logits.complete",
    "logits.resolution",
    "logits.prefill_top_k",
    "logits.first_token",
    "logits.decode_top_k",
    "logits.values",
    "logits.greedy_rank",
    "logits.kl",
)
NOISE = 1e-6
SECONDS, GIGABYTES = 2.0, 2.0


def main() -> int:
    """Build the evidence, run the checks, print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--positions", type=int, default=2_048)
    parser.add_argument("--candidates", type=int, default=1_024)
    options = parser.parse_args()

    # The first operation of each kind costs a library's start; that is not what is measured.
    run(evidence_of(positions=8, vocabulary=4_000, candidates=64))

    before = peak_gigabytes()
    evidence = evidence_of(options.positions, options.vocabulary, options.candidates)
    built = peak_gigabytes()
    began = time.perf_counter()
    by_check = run(evidence)
    seconds = time.perf_counter() - began
    total = peak_gigabytes() - before

    for name, spent in by_check.items():
        print(f"  {name:22} {spent:6.3f} s")
    print(f"all {len(by_check)} checks: {seconds:.2f} s (limit {SECONDS:g} s)")
    print(f"peak memory: {total:.2f} GB (limit {GIGABYTES:g} GB), {built - before:.2f} GB of it the evidence's")
    return 0 if seconds < SECONDS and total < GIGABYTES else 1


def run(evidence: Evidence) -> dict[str, float]:
    """Seconds by check; all of them have to pass."""
    verdicts = [judge(check, evidence) for check in select(ids=CHECKS)]
    failed = [verdict for verdict in verdicts if verdict.status is not Status.PASSED]
    if failed:
        raise SystemExit(f"the evidence is right, and yet: {failed[0]}")
    return {verdict.check: verdict.seconds for verdict in verdicts}


def evidence_of(positions: int, vocabulary: int, candidates: int) -> Evidence:
    """One long request, half prompt and half generated; built row by row so that building peaks at what it leaves."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(positions, vocabulary)
    ids = torch.empty(positions, candidates, dtype=torch.int64)
    values = torch.empty(positions, candidates)
    for start in range(0, positions, 64):
        rows = slice(start, start + 64)
        logits[rows].normal_(0, 3, generator=generator)
        best, ids[rows] = logits[rows].topk(candidates, dim=1)
        values[rows] = best + NOISE * torch.randn(best.shape, generator=generator)

    length = positions // 2
    generated = tuple(ids[length - 1 :, 0].tolist())
    request = Request(name="long", prompt=tuple(range(length)), max_tokens=len(generated))
    continuation = Continuation(
        request=request,
        generated=generated,
        prompt_scores=Scores(first=0, ids=ids[: length - 1], values=values[: length - 1]),
        step_scores=Scores(first=length - 1, ids=ids[length - 1 :], values=values[length - 1 :]),
    )
    sequence = continuation.sequence
    return Evidence(
        target=TargetInfo(
            name="synthetic",
            spec="synthetic",
            tensor_parallel_sizes=(1,),
            dtype="float32",
            top_k=10,
            seed=0,
            weights="none",
            config="none",
        ),
        reference=ReferenceRun(
            description="random numbers",
            independent=True,
            dtype="float32",
            higher_dtype="float64",
            logits={sequence: logits},
            noise_max={sequence: torch.full((positions,), 4 * NOISE)},
            noise_mean={sequence: torch.full((positions,), NOISE)},
        ),
        traces={("plain", 1): (trace_of(continuation),)},
    )


def trace_of(continuation: Continuation) -> Trace:
    """The trace of an engine that ran one request."""
    proof = Proof(
        world_size=1,
        tensor_parallel_size=1,
        rank=0,
        pid=1,
        worker_pids=(1,),
        model_class="synthetic",
        attention_backend="none",
        dtype="float32",
        executor="none",
        eager=True,
        start_method="in-process",
        batch_sizes=(1,),
        block_size=32,
    )
    return Trace(scenario="plain", tensor_parallel_size=1, rank=0, continuations=(continuation,), proof=proof)


def peak_gigabytes() -> float:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
