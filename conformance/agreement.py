"""The laws of agreement between logits, and how close is close enough.

Every number is computed on whole tensors: Python objects exist per request, never per logit.
Shapes: N positions, K candidates the engine scored, V vocabulary.

The tolerance is flash-attention's own test rule lifted to logits. Its tests (tests/test_flash_attn.py in
Dao-AILab/flash-attention) ask that the largest error against a higher-precision reference be at most a small
multiple of that of plain PyTorch in the tested dtype. Here, at each position,

    delta = NOISE_FACTOR * noise + ULP_FACTOR * eps(dtype) * max |logit|

where noise is how far the reference in the tested dtype is from the reference in a higher one: at this position, or
at the phase's median position where that is more, so that one position's lucky small floor does not cry wolf.

A model that chooses, such as a mixture of experts between its experts, jumps where rounding turns a choice. How far
the reference itself jumps at a position is measured (`genmodel.runners.choices`), and delta is at least TURN_FACTOR
times that: nothing at nearly all positions in float32. What the tolerance is then worth, `undecided` tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from genmodel.conformance.alignment import Aligned, Phase, Rows, common_length, gather, with_reference
from genmodel.conformance.verdict import Measurement, violations
from genmodel.runners import choices
from genmodel.runners.evidence import Continuation, ReferenceRun, Trace

NOISE_FACTOR = choices.NOISE_FACTOR
"""Noise floors an error may be. An engine adds up in another order than the reference and so makes other rounding
errors of the same size: the largest over a vocabulary exceeds the other by a small factor, bugs by orders.
docs/calibration.md has the distributions it was chosen from."""

ULP_FACTOR = choices.ULP_FACTOR
"""Units in the last place (tested dtype, largest logit) allowed on top: where the noise floor happens to be zero,
one more rounding of the result is no error."""

TURN_FACTOR = 2.0
"""Turns of the reference an error may be: where several choices are nearly tied, not every combination was tried."""

MOST_UNDECIDED = 0.5
"""Share of the positions that may hang on near-tied choices: the others must tell right from wrong.

In float32 the workload has none, or a good part of a prompt's if a token early in it is nearly tied.
"""

MOST_UNDECIDED_IN_HALF = 0.9
"""The same in bfloat16 and float16, where a few layers of choices are enough for one of them to be nearly tied."""

Law = Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]
"""From rows to what is measured at each position, [N] float, and the token it concerns, [N] int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Limits for one phase, position by position; NaN, which nothing meets, where a noise floor is not finite."""

    typical_max: float
    """The phase's median of the noise floor's maximum over V."""
    typical_mean: float
    """The same of its mean over V."""
    rounding: float
    """The ulp term."""
    scale: float
    """Largest finite |logit| expected."""

    def max(self, rows: Rows) -> torch.Tensor:
        """On any one logit, [N]: delta."""
        return torch.maximum(self.steady(rows), TURN_FACTOR * rows.turn_max.double())

    def steady(self, rows: Rows) -> torch.Tensor:
        """The same where no choice turns, [N]."""
        return NOISE_FACTOR * rows.noise_max.double().clamp(min=self.typical_max) + self.rounding

    def mean(self, rows: Rows) -> torch.Tensor:
        """On the mean over a position's candidates, [N]: the same rule with the mean noise."""
        steady = NOISE_FACTOR * rows.noise_mean.double().clamp(min=self.typical_mean) + self.rounding
        return torch.maximum(steady, TURN_FACTOR * rows.turn_mean.double())

    def tie(self, rows: Rows) -> torch.Tensor:
        """Tokens whose logits are this close may swap, [N]: each may be off by `max`."""
        return 2 * self.max(rows)

    def kl(self, rows: Rows) -> torch.Tensor:
        """On KL(reference || engine), in nats, [N]: delta² / 2, plus the rounding of its computation in float64.

        KL between softmax(r) and softmax(e) is the Bregman divergence of log-sum-exp (Banerjee et al. 2005,
        section 4), so by Taylor's theorem it is half the variance of d = e - r under some softmax between the two.
        Where |d| <= delta that variance is at most delta² (Popoviciu), whatever the size of the vocabulary.
        """
        candidates = rows.ids.shape[1]
        rounding = 16 * torch.finfo(torch.float64).eps * (1 + self.scale + math.log(candidates))
        return self.max(rows).square() / 2 + rounding


Limit = Callable[[Tolerance, Rows], torch.Tensor]
"""From a phase's tolerance and rows to what is allowed at each position, [N] float64."""


def tolerance(aligned: Aligned) -> Tolerance:
    """The rule at the top of this module, for one phase that has rows."""
    scale = max(float(rows.expected.nan_to_num(0, 0, 0).abs().max()) for rows in aligned.rows)
    return Tolerance(
        typical_max=_median(rows.noise_max for rows in aligned.rows),
        typical_mean=_median(rows.noise_mean for rows in aligned.rows),
        rounding=ULP_FACTOR * torch.finfo(aligned.dtype).eps * scale,
        scale=scale,
    )


def _median(parts: Iterable[torch.Tensor]) -> float:
    """The median over all positions; NaN if any is not finite."""
    together = torch.cat(list(parts))
    return float(together.median()) if bool(together.isfinite().all()) else math.nan


def max_difference(aligned: Aligned) -> Iterator[Measurement]:
    """Largest |logit difference| over all positions and candidates."""

    def law(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        worst, at = (rows.values - rows.expected).abs().max(dim=1)
        return worst, _pick(rows.ids, at)

    yield from _judge(aligned, "max |logit difference|", law, Tolerance.max)


def mean_difference(aligned: Aligned) -> Iterator[Measurement]:
    """Mean |logit difference| over a position's candidates, at the worst position.

    Where K < V this is the mean over the best-scored tokens, against a noise floor that is the mean over all.
    """

    def law(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return (rows.values - rows.expected).abs().mean(dim=1), rows.ids[:, 0]

    yield from _judge(aligned, "mean |logit difference|", law, Tolerance.mean)


def divergence(aligned: Aligned) -> Iterator[Measurement]:
    """KL(reference || engine) in nats, at the worst position.

    Over the whole vocabulary where the engine scored all of it, else over its K candidates with both sides
    renormalised to those; the bound of `Tolerance.kl` holds for either.
    """

    def law(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = rows.expected.double().log_softmax(dim=1)
        log_q = rows.values.double().log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1), rows.ids[:, 0]

    count = aligned.candidates if aligned.rows else 0
    whole = all(rows.ids.shape[1] == rows.reference.shape[1] for rows in aligned.rows)
    over = "the vocabulary" if whole else f"the {count} candidates"
    yield from _judge(aligned, f"KL(reference || engine) over {over}", law, Tolerance.kl)


def top_k(aligned: Aligned, k: int) -> Iterator[Measurement]:
    """How far the engine's i-th token is from the reference's i-th best logit, worst over i = 1 .. k.

    A token with reference logit r holds the ranks from 1 + #{v: r_v > r + tie} to #{v: r_v >= r - tie}. With the
    reference's logits in order, s_1 >= s_2 >= ..., rank i is among them exactly if |s_i - r| <= tie: so the
    intervals need not be counted out, and tokens within tolerance of each other may swap.

    Raises:
        ValueError: if the engine scored fewer than k candidates of a larger vocabulary.
    """

    def law(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        count = min(k, rows.reference.shape[1])
        if rows.ids.shape[1] < count:
            raise ValueError(f"top-{k} needs {count} candidates; request {rows.request} has {rows.ids.shape[1]}")
        worst, at = (best_values(rows.reference, count) - rows.expected[:, :count]).abs().max(dim=1)
        return worst, _pick(rows.ids, at)

    yield from _judge(aligned, f"logit gap to the reference's top-{k} order", law, Tolerance.tie)


def greedy_rank(aligned: Aligned) -> Iterator[Measurement]:
    """How many tokens the reference ranks above the engine's greedy one; ties within tolerance share a rank."""
    limits = tolerance(aligned) if aligned.rows else None

    def law(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        assert limits is not None
        limit = gather(rows.reference, rows.greedy[:, None]) + limits.tie(rows)[:, None]
        # "not at most" instead of "more than": NaN on either side must not make a token the best
        above = ~(rows.reference.amax(dim=1, keepdim=True) <= limit)[:, 0]
        count = above.long()
        if above.any():  # counting costs thirty times as much as finding that there is nothing to count
            count[above] = (~(rows.reference[above] <= limit[above])).sum(dim=1)
        return count, rows.greedy

    yield from _judge(aligned, "tokens the reference ranks above the greedy one", law, _none)


def _none(_: Tolerance, rows: Rows) -> torch.Tensor:
    return torch.zeros(len(rows.ids), dtype=torch.float64)


def parting(reference: ReferenceRun, ours: Trace, theirs: Trace) -> Iterator[Measurement]:
    """Where two engines' greedy tokens part: the gap between the two tokens, which has to be a near tie.

    The gap is taken in the logits of `ours`. A token outside its candidates is infinitely far.
    """
    other = {continuation.request.name: continuation for continuation in theirs.continuations}
    for phase in (Phase.FIRST, Phase.DECODE):
        aligned = with_reference(reference, ours, phase)
        if not aligned.rows:
            continue
        limits = tolerance(aligned)
        rows = {found.request: found for found in aligned.rows}
        worst = (0.0, float(limits.tie(aligned.rows[0])[0]), "")
        for continuation in ours.continuations:
            counterpart = other.get(continuation.request.name)
            if counterpart is None or continuation.request.temperature > 0 or continuation.request.name not in rows:
                continue
            at = common_length(continuation, counterpart)
            ended = at >= min(len(continuation.generated), len(counterpart.generated))
            if ended or (at == 0) != (phase is Phase.FIRST):
                continue
            gap, detail = _gap_between_tokens(continuation, counterpart, at)
            row = max(0, at - 1)  # the phase's rows begin with its first token
            allowed = float(limits.tie(rows[continuation.request.name])[row])
            worst = max(worst, (gap, allowed, detail), key=lambda found: _ratio(found[0], found[1]))
        yield Measurement(
            what=f"{phase}: logit gap between tokens where generation parts",
            where=aligned.where,
            measured=worst[0],
            allowed=worst[1],
            detail=worst[2],
        )


def resolution(aligned: Aligned, k: int) -> Iterator[Measurement]:
    """How wide a near tie is, as a share of how far apart the reference's k best are, at the median position.

    Rounding alone: what turned choices add to that, `undecided` counts.
    """
    if not aligned.rows:
        return
    limits = tolerance(aligned)
    shares = torch.cat([2 * limits.steady(rows) / _spread(rows.reference, k) for rows in aligned.blocks()])
    yield Measurement(
        what=f"{aligned.phase}: width of a near tie as a share of the top {k}'s spread, at the median position",
        where=aligned.where,
        measured=float(shares.median()),
        allowed=1.0,
    )


def undecided(phases: Sequence[Aligned]) -> Iterator[Measurement]:
    """Share of one trace's positions that hang on near ties: turning the reference's choices outweighs rounding."""
    scored = [aligned for aligned in phases if aligned.rows]
    if not scored:
        return
    limits = {aligned.phase: tolerance(aligned) for aligned in scored}
    hanging = torch.cat([x.turn_max > limits[aligned.phase].steady(x) for aligned in scored for x in aligned.rows])
    yield Measurement(
        what="share of the positions that hang on near-tied choices",
        where=scored[0].where,
        measured=float(hanging.double().mean()),
        allowed=MOST_UNDECIDED if scored[0].dtype.itemsize > 2 else MOST_UNDECIDED_IN_HALF,
        detail=f"{int(hanging.sum())} of {len(hanging)} positions, judged within what either choice gives",
    )


def usable(aligned: Aligned) -> Iterator[Measurement]:
    """Positions that were not scored, or in a way that nothing can be compared with."""
    yield _unscored(aligned)
    where, phase = aligned.where, aligned.phase
    not_finite = _positions(aligned, lambda rows: ~rows.values.isfinite().all(dim=1))
    yield violations(f"{phase}: positions with NaN or infinite logits", not_finite, where)
    twice = _positions(aligned, lambda rows: (rows.ids.sort(dim=1).values.diff(dim=1) == 0).any(dim=1))
    yield violations(f"{phase}: positions that score a token twice", twice, where)


def usable_reference(reference: ReferenceRun) -> Measurement:
    """Sequences whose reference logits, or their noise floor, are not finite."""
    broken = [
        f"a sequence of {len(sequence)} tokens"
        for sequence, logits in reference.logits.items()
        if not all(
            bool(x.isfinite().all())
            for x in (
                *logits.aminmax(),
                reference.noise_max[sequence],
                reference.turn_max.get(sequence, torch.zeros(1)),
            )
        )
    ]
    return violations("sequences with NaN or infinite reference logits", broken)


def best_values(logits: torch.Tensor, k: int, width: int = 128) -> torch.Tensor:
    """The k largest values of every row, best first: [N, V] to [N, k].

    Several times faster than torch.topk for large V: the k largest values lie in the k pieces of `width` values
    with the largest maxima, so that all but one plain pass runs on little.
    """
    count = logits.shape[1] // width
    if count < 2 * k:
        return logits.topk(k, dim=1).values
    pieces = logits[:, : count * width].unflatten(1, (count, width))
    best = pieces.amax(dim=2).topk(k, dim=1).indices
    kept = pieces.gather(1, best[:, :, None].expand(-1, -1, width)).flatten(1)
    return torch.cat([kept, logits[:, count * width :]], dim=1).topk(k, dim=1).values


def _judge(aligned: Aligned, what: str, law: Law, allowed: Limit) -> Iterator[Measurement]:
    """The position that is worst by its limit under `law`; positions that were not scored break every law."""
    if aligned.gaps:
        yield _unscored(aligned)
    if aligned.rows:
        limits = tolerance(aligned)
        found = (_worst(rows, law, allowed(limits, rows)) for rows in aligned.blocks())
        measured, limit, detail = max(found, key=lambda worst: _ratio(worst[0], worst[1]))
        yield Measurement(
            what=f"{aligned.phase}: {what}", where=aligned.where, measured=measured, allowed=limit, detail=detail
        )


def _worst(rows: Rows, law: Law, allowed: torch.Tensor) -> tuple[float, float, str]:
    measured, tokens = law(rows)
    ratios = torch.where(measured == 0, 0.0, measured.double() / allowed)
    at = int(ratios.argmax())  # the first NaN, if there is any
    detail = f"request {rows.request}, position {rows.first + at}, token {int(tokens[at])}"
    return float(measured[at]), float(allowed[at]), detail


def _ratio(measured: float, allowed: float) -> tuple[bool, float]:
    """Sort key by measured / allowed that puts NaN above everything."""
    if math.isnan(measured) or math.isnan(allowed):
        return True, math.inf
    if measured == 0:
        return False, 0.0
    return False, measured / allowed if allowed else math.inf


def _pick(ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return ids.gather(1, at[:, None])[:, 0]


def _unscored(aligned: Aligned) -> Measurement:
    return violations(f"{aligned.phase}: requests not scored at each position", aligned.gaps, aligned.where)


def _positions(aligned: Aligned, condition: Callable[[Rows], torch.Tensor]) -> list[str]:
    """Where `condition`, from rows to [N] bool, holds."""
    return [
        f"request {rows.request}, position {rows.first + i}"
        for rows in aligned.rows
        for i in condition(rows).nonzero()[:, 0].tolist()
    ]


def _spread(logits: torch.Tensor, k: int) -> torch.Tensor:
    best = best_values(logits, min(max(k, 2), logits.shape[1]))
    return best[:, 0] - best[:, -1]


def _gap_between_tokens(ours: Continuation, theirs: Continuation, at: int) -> tuple[float, str]:
    ids, values = ours.step_scores.ids[at], ours.step_scores.values[at]
    mine, other = ours.generated[at], theirs.generated[at]
    found = [values[ids == token] for token in (mine, other)]
    gap = float((found[0] - found[1]).abs()) if all(len(value) == 1 for value in found) else math.inf
    return gap, f"request {ours.request.name}, position {ours.step_scores.first + at}, tokens {mine} and {other}"
