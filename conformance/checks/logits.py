"""logits.*: engines compute the same function as the reference, at every position."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from genmodel.conformance import agreement
from genmodel.conformance.access import (
    every_size,
    precision,
    rank_zero,
    ranks,
    reference,
    reference_of,
    sizes,
)
from genmodel.conformance.alignment import Aligned, Phase, with_engine, with_reference
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import REFERENCE, Level, Measurement, NotApplicable, row, violations
from genmodel.runners.evidence import Evidence, Scores, Trace

JUDGED = (Phase.PROMPT, Phase.FIRST, Phase.DECODE)
"""Every position, once."""

FLOAT16_RESERVE = 4.0
"""How much larger other prompts' values may be than the workload's before they leave float16's range."""


@check(needs=("reference", "plain"))
def complete(evidence: Evidence) -> Iterator[Measurement]:
    """Every prompt token and every generated token has finite scores, from the engine and from the reference.

    Usual causes:
        NaN in the weights, or a norm or softmax that overflows in the tested dtype; generation that
        stops early; a model that returns fewer rows than it got tokens.
    How to fix:
        Look for the first layer with a NaN: `torch.isnan(x).any()` after each; compute norms and
        softmax in float32.
    Reports:
        #10327
    """
    known = reference(evidence)
    yield agreement.usable_reference(known)
    for size in every_size(evidence, "plain"):
        answered = {c.request.name for c in rank_zero(evidence, "plain", size).continuations}
        lost = [request.name for request in evidence.requests if request.name not in answered]
        yield violations("requests without an answer", lost, row(size))
    for aligned in _plain(evidence, *Phase):
        yield from agreement.usable(aligned)


@check(needs=("reference", "plain"))
def resolution(evidence: Evidence) -> Iterator[Measurement]:
    """The tolerance can tell right from wrong: it is smaller than the spread of the best logits, at steady positions.

    A position is steady unless it hangs on a choice of the reference, such as a router's between two experts, that
    is so nearly tied that rounding alone may turn it. One that does is judged within what either choice gives.

    Usual causes:
        Logits that are nearly constant (weights at zero, a norm weight of zero), or so ill-conditioned
        that the tested dtype keeps no digit of them; a router whose scores are equal, or so many choices
        in half precision that rounding always turns one. Comparisons of logits would pass whatever the
        model computes.
    How to fix:
        Let genmodel make its adversarial weights (no --genmodel-weights), give a reference that can
        tell, or test in --genmodel-dtype=float32.
    Reports:
        #52158
    """
    known = reference(evidence)
    for size in every_size(evidence, "plain"):
        phases = [with_reference(known, rank_zero(evidence, "plain", size), phase) for phase in JUDGED]
        for aligned in phases:
            yield from agreement.resolution(aligned, evidence.target.top_k)
        yield from agreement.undecided(phases)


@check(needs=("reference", "plain"))
def prefill_top_k(evidence: Evidence) -> Iterator[Measurement]:
    """At every prompt position, the engine's top-K tokens are the reference's, in order, but for near ties.

    Usual causes:
        Weights that are not loaded, or sharded wrongly (TP=2 alone fails); rotary of the other style; a
        wrong attention scale; a causal mask or sliding window that is off by one.
    How to fix:
        If TP=1 fails too, compare layer by layer in plain PyTorch. If only TP=2 fails, look at how
        fused weights (qkv, gate and up) are split, and at all-reduces: each part of a fused weight is
        sharded on its own.
    Reports:
        #10327 #42803 #3775 #36637 vllm-ascend#4641 #51049 Liger-Kernel#74
    """
    for aligned in _plain(evidence, Phase.PROMPT):
        yield from agreement.top_k(aligned, evidence.target.top_k)


@check(needs=("reference", "plain"))
def first_token(evidence: Evidence) -> Iterator[Measurement]:
    """The first generated token comes from the reference's top-K, in order, but for near ties.

    Usual causes:
        If logits.prefill_top_k fails too, look there first. If only this one does, compute_logits is
        given the wrong rows, or treats a single row differently.
    How to fix:
        compute_logits must treat each row alone: no mixing of rows, no dependence on how many there
        are.
    Reports:
        #20843 #46835
    """
    for aligned in _plain(evidence, Phase.FIRST):
        yield from agreement.top_k(aligned, evidence.target.top_k)


@check(needs=("reference", "plain"))
def decode_top_k(evidence: Evidence) -> Iterator[Measurement]:
    """At every generated token, the engine's top-K tokens are the reference's, in order, but for near ties.

    Usual causes:
        If prefill agrees and this does not: `positions` are ignored or start again at 0, two layers
        share a KV cache, or state is kept in the module from one step to the next.
    How to fix:
        Use the `positions` that forward gets, never `torch.arange(len(x))`; give each attention layer
        its own prefix; keep nothing on `self` during forward.
    Reports:
        mlx-vlm#1983 NeMo-RL#2141 #16832 #43631 vllm-ascend#4603
    """
    for aligned in _plain(evidence, Phase.DECODE):
        yield from agreement.top_k(aligned, evidence.target.top_k)


@check(needs=("reference", "plain"))
def values(evidence: Evidence) -> Iterator[Measurement]:
    """The engine's raw logits are the reference's: the largest and the mean difference are rounding.

    Usual causes:
        All argmaxes can be right while this fails: a logit scale or soft cap dropped, a bias of the
        head dropped or added once per rank, a norm's epsilon or +1 offset.
    How to fix:
        Compare `compute_logits` with the reference's head on the same hidden states, then the last
        norm, then upwards.
    Reports:
        #52158 #46835 text-generation-inference#1036 Liger-Kernel#74 vllm-metal#659
    """
    for aligned in _plain(evidence, *Phase):
        yield from agreement.max_difference(aligned)
        yield from agreement.mean_difference(aligned)


@check(needs=("reference", "plain"))
def greedy_rank(evidence: Evidence) -> Iterator[Measurement]:
    """The token the engine chooses greedily is the reference's best one, or tied with it.

    Usual causes:
        Those of logits.prefill_top_k and logits.decode_top_k; look at these first. A vocabulary whose
        padding is not cut off gives tokens that the reference does not have.
    How to fix:
        Cut the logits to the vocabulary: `logits[..., :vocab_size]`, after gathering the shards.
    Reports:
        #20843 SpecForge#284
    """
    for aligned in _plain(evidence, *Phase):
        yield from agreement.greedy_rank(aligned)


@check(needs=("reference", "plain"))
def kl(evidence: Evidence) -> Iterator[Measurement]:
    """The engine samples from the reference's distribution: KL(reference || engine) is rounding.

    Usual causes:
        A scale or temperature on the logits, or those of logits.values. If logits.values fails and this
        passes, the logits are off by a constant per position, which sampling does not see.
    How to fix:
        Apply the config's logit scale and soft cap in compute_logits, once.
    Reports:
        #52158
    """
    for aligned in _plain(evidence, *Phase):
        yield from agreement.divergence(aligned)


@check(needs=("reference", "plain"), tensor_parallel=2)
def tensor_parallel(evidence: Evidence) -> Iterator[Measurement]:
    """Engines of different tensor-parallel sizes agree with each other, logits and tokens.

    Usual causes:
        A fused weight split as one plain block, every rank loading shard 0, a missing all-reduce, a
        row-parallel bias added on each rank, the global head count given to attention, a norm across
        heads that sees only its rank's.
    How to fix:
        Build on ColumnParallelLinear, RowParallelLinear, QKVParallelLinear and VocabParallelEmbedding
        of genmodel; add a row-parallel bias after the all-reduce.
    Reports:
        #42803 #3775 vllm-gguf-plugin#103 text-generation-inference#1036 #39707 #16311 #35932 transformers#48307
    """
    if len(sizes(evidence)) < 2:
        raise NotApplicable(f"only one tensor-parallel size was asked for: {sizes(evidence)[0]}")
    smallest: Trace | None = None
    for size in every_size(evidence, "plain"):
        trace = rank_zero(evidence, "plain", size)
        if smallest is None:
            smallest = trace
        else:
            yield from _engines_agree(evidence, trace, smallest)


@check(needs=("plain",), tensor_parallel=2)
def ranks_agree(evidence: Evidence) -> Iterator[Measurement]:
    """All ranks of an engine end up with the same logits, to the last bit, and the same tokens.

    Usual causes:
        A missing all-reduce or all-gather; a random choice that ranks make on their own; a replicated
        parameter that one rank did not load.
    How to fix:
        Gather the logits on all ranks; load replicated parameters on every rank from the same
        checkpoint entry.
    Reports:
        #3775 vllm-gguf-plugin#103 Megatron-LM#1446
    """
    for size in every_size(evidence, "plain"):
        if size > 1:
            yield from _ranks_agree(ranks(evidence, "plain", size), size)


@check(needs=("reference", "plain", "alone"))
def batching(evidence: Evidence) -> Iterator[Measurement]:
    """A prompt gets the same answer alone as in a batch with others.

    Usual causes:
        Rows of the flattened batch are mixed (a norm, a softmax or a mean over the token dimension);
        state kept in the module leaks from one request to the next; positions computed from the row
        number.
    How to fix:
        Treat every token's row alone outside attention; take positions from the argument; keep nothing
        on `self`.
    Reports:
        #43631 transformers#46634
    """
    for size in every_size(evidence, "plain", "alone"):
        yield from _engines_agree(evidence, rank_zero(evidence, "alone", size), rank_zero(evidence, "plain", size))


@check(needs=("reference", "bfloat16"))
def bfloat16(evidence: Evidence) -> Iterator[Measurement]:
    """In bfloat16 the logits are the float32 reference's, but for bfloat16's own noise.

    Usual causes:
        A softmax, norm, rotary table or logit computed in bfloat16 where the reference uses float32; a
        cast of weights that happens on one side only.
    How to fix:
        Compute statistics of norms, softmax and rotary angles in float32 and cast back.
    Reports:
        #52158
    """
    if evidence.target.dtype != "float32":
        raise NotApplicable(f"the whole run is in {evidence.target.dtype}")
    traces = [rank_zero(evidence, "bfloat16", size) for size in every_size(evidence, "bfloat16")]
    found = [[with_reference(reference_of(evidence, trace), trace, phase) for phase in JUDGED] for trace in traces]
    if not all(share.ok for aligned in found for share in agreement.undecided(aligned)):
        raise NotApplicable("nearly all positions hang on choices that rounding turns in bfloat16")
    for aligned in (aligned for each in found for aligned in each):
        yield from agreement.max_difference(aligned)
        yield from agreement.mean_difference(aligned)


@check(needs=("inspection", "precision", "bfloat16"))
def module_dtypes(evidence: Evidence) -> Iterator[Measurement]:
    """In bfloat16 every module computes in the same dtype in the engine as in training.

    What counts is the dtype that the values take, not the one they are kept in: a copy in float32 of what was
    computed in bfloat16 is no difference. A model that computes parts of itself in float32 on both sides is right.
    Compared are the outputs of modules and, where only functions of torch are called, what they compute inside.

    Usual causes:
        A residual stream, a router, a norm's output or a head kept in float32 on one side only: a branch
        on whether the model runs inside vLLM, on `self.training` or on `torch.is_grad_enabled()`, or a cast
        in the trainer that the engine does not have.
        Rewards and importance ratios then drift, by less than bfloat16's own noise in any one logit.
    How to fix:
        Write the cast into the model's own forward, so that both sides run it.
    Reports:
        #19925 #48390 trl#4303 NeMo-RL#3936
    """
    trained = precision(evidence)
    sides = [(size, rank_zero(evidence, "bfloat16", size)) for size in every_size(evidence, "bfloat16")]
    if not any(trained.modules.keys() & served.modules.keys() for _, served in sides):
        raise NotApplicable("no module of the engine has the name of one in training")
    for size, served in sides:
        common = [name for name in trained.modules if name in served.modules]
        # The work of a submodule that only one side calls is done by those around it on the other.
        apart = trained.modules.keys() ^ served.modules.keys()
        pairs = [(name, "", trained.modules[name], served.modules[name]) for name in common]
        pairs += [
            (name, "inside ", dtype, served.inside[name])
            for name, dtype in trained.inside.items()
            if name in served.inside and not any(other.startswith(f"{name}." if name else "") for other in apart)
        ]
        different = [
            f"{where}{name or 'the model'}: {ours} in training, {theirs} in the engine"
            for name, where, ours, theirs in pairs
            if ours != theirs
        ]
        yield violations(f"modules of {len(common)} that compute in another dtype", different, row(size))


@check(needs=("inspection", "precision"), level=Level.RECOMMENDED)
def float16_range(evidence: Evidence) -> Iterator[Measurement]:
    """Nothing that goes into or comes out of a module comes near float16's largest number.

    vLLM runs models whose config names float16, and on devices without bfloat16 those of float32, in float16. A model
    whose config names bfloat16 is not meant to be.

    Usual causes:
        A residual stream that grows from layer to layer, embeddings scaled up, a gated activation: fine in
        bfloat16, infinite in float16.
    How to fix:
        Name bfloat16 in the config (`"torch_dtype": "bfloat16"`), keep the residual stream in float32,
        or scale it down.
    Reports:
        transformers#9295 transformers#39972
    """
    found = precision(evidence)
    if found.declared not in (None, "auto", "float16", "float32"):
        raise NotApplicable(f"the model's config names {found.declared}")
    largest = float(torch.finfo(torch.float16).max)
    worst = max(found.largest, key=lambda name: found.largest[name], default="")
    yield Measurement(
        what="largest |value| into or out of a module, with float32's range",
        where=REFERENCE,
        measured=found.largest.get(worst, math.nan),
        allowed=largest / FLOAT16_RESERVE,
        detail=worst or "the model",
    )


def _plain(evidence: Evidence, *phases: Phase) -> Iterator[Aligned]:
    """The plain scenario against the reference, by size and phase."""
    known = reference(evidence)
    for size in every_size(evidence, "plain"):
        trace = rank_zero(evidence, "plain", size)
        for phase in phases:
            yield with_reference(known, trace, phase)


def _engines_agree(evidence: Evidence, ours: Trace, theirs: Trace) -> Iterator[Measurement]:
    known = reference(evidence)
    for phase in Phase:
        yield from agreement.max_difference(with_engine(known, ours, theirs, phase))
    yield from agreement.parting(known, ours, theirs)


def _ranks_agree(traces: tuple[Trace, ...], size: int) -> Iterator[Measurement]:
    first = traces[0]
    absent = sorted(set(range(size)) - {trace.rank for trace in traces})
    yield violations("ranks without a trace", [f"rank {rank}" for rank in absent], row(size))
    different = [where for trace in traces[1:] for where in _differences(first, trace)]
    yield violations(f"requests that differ from rank {first.rank}", different, row(size))


def _differences(ours: Trace, theirs: Trace) -> list[str]:
    if [c.request for c in ours.continuations] != [c.request for c in theirs.continuations]:
        return [f"rank {theirs.rank} ran other requests"]
    return [
        f"rank {theirs.rank}, request {one.request.name}"
        for one, other in zip(ours.continuations, theirs.continuations, strict=True)
        if one.generated != other.generated
        or not _same(one.prompt_scores, other.prompt_scores)
        or not _same(one.step_scores, other.step_scores)
    ]


def _same(ours: Scores | None, theirs: Scores | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    # torch.equal is False for NaN, which no rank may have
    return torch.equal(ours.ids, theirs.ids) and torch.equal(ours.values, theirs.values)
