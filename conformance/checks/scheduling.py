"""scheduling.*: the answer does not depend on which way a scheduler takes to it."""

from __future__ import annotations

from collections.abc import Iterator

from genmodel.conformance import agreement
from genmodel.conformance.access import every_size, inspection, rank_zero, reference_of
from genmodel.conformance.alignment import Phase, with_reference
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import Measurement, row, violations
from genmodel.runners.evidence import Evidence
from genmodel.runners.scenarios import LONGEST

GENERATED = (Phase.FIRST, Phase.DECODE)
WHOLE = (Phase.PROMPT, *GENERATED)


@check(needs=("reference", "chunked"))
def chunked_prefill(evidence: Evidence) -> Iterator[Measurement]:
    """A prompt computed in chunks gives the reference's values, before and after the chunk boundary.

    Usual causes:
        The first chunk is exact and later ones are not: `positions` are counted from 0 in each step; a
        mask, a convolution or a recurrence is built from the rows of this step alone; attention does
        not go through vLLM's KV cache.
    How to fix:
        Use the `positions` that forward gets; let nothing but `TrainableAttention` (or vLLM's
        Attention) look at other tokens.
    Reports:
        #52909 #26042
    """
    yield from _path(evidence, "chunked", *WHOLE, Phase.AFTER_CHUNK)


@check(needs=("reference", "cached"))
def prefix_cache(evidence: Evidence) -> Iterator[Measurement]:
    """A prompt whose beginning comes from the prefix cache is continued as the reference continues it.

    Usual causes:
        Something besides attention keeps state per token (a convolution, a running mean), which the
        cache does not bring back; two layers share a KV cache; keys depend on more than the tokens
        before them.
    How to fix:
        Keep per-token state in vLLM's caches only; give each attention layer its own prefix.
    Reports:
        #5543 #22103
    """
    yield from _path(evidence, "cached", *GENERATED, Phase.AFTER_HIT)


@check(needs=("reference", "preempted"))
def preemption(evidence: Evidence) -> Iterator[Measurement]:
    """A request that loses its cache and is computed again goes on as if nothing had happened.

    Usual causes:
        State kept in the module is lost, or advanced twice, when prompt and generated tokens are
        computed again together; decode computes something else than prefill does for the same token.
    How to fix:
        Treat each token's row alike in prefill and decode; keep nothing on `self` during forward.
    Reports:
        NeMo-RL#2141 #16832
    """
    yield from _path(evidence, "preempted", *GENERATED, Phase.AFTER_PREEMPTION)


@check(needs=("reference", "arrivals"))
def arrival_order(evidence: Evidence) -> Iterator[Measurement]:
    """Requests in another order, joining while others are being decoded, get the reference's answers.

    Usual causes:
        Rows of prefill and decode in one batch are mixed up: a norm or a mean over the token dimension,
        a branch on the number of rows, positions computed from the row number; state that leaks from
        one request to the next.
    How to fix:
        Treat every row alone outside attention, whatever else is in the batch.
    Reports:
        #43631 transformers#46634
    """
    yield from _path(evidence, "arrivals", *WHOLE)


@check(needs=("inspection", "plain"))
def max_model_len(evidence: Evidence) -> Iterator[Measurement]:
    """Generation reaches the longest sequence the model takes, and stays within it.

    Usual causes:
        A table of positions, or a rotary cache, that is one row too short; a limit read from another
        setting than max_position_embeddings.
    How to fix:
        Size position tables by `config.max_position_embeddings`.
    Reports:
        mlx-vlm#1983
    """
    limit = min(inspection(evidence).max_positions, LONGEST)
    for size in every_size(evidence, "plain"):
        answers = rank_zero(evidence, "plain", size).continuations
        lengths = {c.request.name: len(c.request.prompt) + len(c.generated) for c in answers}
        beyond = [f"{name}: {length} tokens of {limit}" for name, length in lengths.items() if length > limit]
        yield violations("requests longer than the model takes", beyond, row(size))
        short = [] if limit in lengths.values() else [f"the longest has {max(lengths.values(), default=0)} of {limit}"]
        yield violations("longest sequences not reached", short, row(size))


def _path(evidence: Evidence, scenario: str, *phases: Phase) -> Iterator[Measurement]:
    """The scenario against the reference, phase by phase, in values and in order."""
    for size in every_size(evidence, scenario):
        trace = rank_zero(evidence, scenario, size)
        for phase in phases:
            aligned = with_reference(reference_of(evidence, trace), trace, phase)
            yield from agreement.max_difference(aligned)
            yield from agreement.top_k(aligned, evidence.target.top_k)
