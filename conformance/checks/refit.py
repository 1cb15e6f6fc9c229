"""refit.*: weights that change in a running engine are the weights it computes with, all of them, at once."""

from __future__ import annotations

from collections.abc import Iterator

from genmodel.conformance import agreement
from genmodel.conformance.access import every_size, rank_zero, reference_of
from genmodel.conformance.alignment import Phase, with_engine, with_reference
from genmodel.conformance.catalogue import check
from genmodel.conformance.verdict import Measurement, row, violations
from genmodel.runners.evidence import Evidence, Trace

GENERATED = (Phase.FIRST, Phase.DECODE, Phase.AFTER_HIT)


@check(needs=("reference", "refit"))
def changed_weights(evidence: Evidence) -> Iterator[Measurement]:
    """After new weights are loaded into the running engine, its answers are those of the new weights.

    Usual causes:
        A copy derived from the old weights lives on: fused or transposed matrices, a cached head, a
        rotary or bias buffer made in `load_weights` or on first use; `load_weights` that works only
        once; the prefix cache still holds keys of the old weights.
    How to fix:
        Derive nothing from weights that `load_weights` does not derive again; copy into parameters in
        place, `param.data.copy_(...)`, rather than replace them.
    Reports:
        prime-rl#1650
    """
    for size in every_size(evidence, "refit.before", "refit.changed"):
        before, changed = (rank_zero(evidence, f"refit.{name}", size) for name in ("before", "changed"))
        for trace in (before, changed):
            for phase in GENERATED:
                yield from agreement.max_difference(with_reference(reference_of(evidence, trace), trace, phase))
        same = [] if _scores_differ(before, changed) else ["the engine gives the same scores as before"]
        yield violations("refits without an effect", same, row(size))


@check(needs=("reference", "refit"))
def identity(evidence: Evidence) -> Iterator[Measurement]:
    """Loading the weights that are there already changes nothing.

    Usual causes:
        `load_weights` adds to what is there instead of replacing it, or applies a scale, an offset or a
        transpose to parameters it has already converted.
    How to fix:
        Convert the checkpoint's tensor, then copy it over the parameter.
    Reports:
        prime-rl#1650
    """
    yield from _equal(evidence, "refit.identity", "refit.before")


@check(needs=("reference", "refit"))
def no_drift(evidence: Evidence) -> Iterator[Measurement]:
    """After several refits, the same weights give the same answers as the first time.

    Usual causes:
        Something accumulates over refits: a folded scale, a buffer that is updated in place, a cache
        that is never dropped.
    How to fix:
        Make `load_weights` depend on the checkpoint alone, not on what was loaded before.
    Reports:
        prime-rl#1650
    """
    yield from _equal(evidence, "refit.restored", "refit.before")
    yield from _equal(evidence, "refit.again", "refit.changed")


def _equal(evidence: Evidence, ours: str, theirs: str) -> Iterator[Measurement]:
    for size in every_size(evidence, ours, theirs):
        trace, other = rank_zero(evidence, ours, size), rank_zero(evidence, theirs, size)
        for phase in GENERATED:
            yield from agreement.max_difference(with_engine(reference_of(evidence, trace), trace, other, phase))


def _scores_differ(ours: Trace, theirs: Trace) -> bool:
    pairs = zip(ours.continuations, theirs.continuations, strict=False)
    return any(float((one.step_scores.values - other.step_scores.values).abs().max()) > 0 for one, other in pairs)
