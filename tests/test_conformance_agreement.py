"""The numerics of agreement: what tolerance forgives, and that nothing slips through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from evidence_samples import (
    VOCABULARY,
    change_reference,
    change_scores,
    change_traces,
    clean,
    scaled,
    shifted,
    spoiled,
    swapped,
)
from genmodel.conformance import agreement
from genmodel.conformance.alignment import Aligned, Phase, Rows, common_length, with_engine, with_reference
from genmodel.conformance.catalogue import get, judge
from genmodel.conformance.verdict import Measurement, Status
from genmodel.runners.evidence import Evidence, ReferenceRun, Scores, Trace

COMPARISONS = [
    "logits.prefill_top_k",
    "logits.first_token",
    "logits.decode_top_k",
    "logits.values",
    "logits.greedy_rank",
    "logits.kl",
    "logits.tensor_parallel",
    "logits.batching",
    "deployment.multiprocess",
]
VALUE_LAWS: list[Callable[[Aligned], Iterator[Measurement]]] = [
    agreement.max_difference,
    agreement.mean_difference,
    agreement.divergence,
    agreement.greedy_rank,
    lambda aligned: agreement.top_k(aligned, 10),
]


@pytest.mark.parametrize("candidates", [None, 16])
@pytest.mark.parametrize("seed", range(25))
def test_noise_at_the_noise_floor_never_fails(seed: int, candidates: int | None) -> None:
    evidence = clean(seed=seed, candidates=candidates)
    for check_id in COMPARISONS:
        verdict = judge(get(check_id), evidence)
        assert verdict.status is Status.PASSED, verdict


@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_is_judged_by_its_own_noise(seed: int) -> None:
    evidence = clean(seed=seed, noise=0.02, dtype="bfloat16")
    assert all(judge(get(check_id), evidence).status is Status.PASSED for check_id in COMPARISONS)


def test_near_ties_may_swap_and_others_may_not() -> None:
    """Two tokens one tie apart, ranked the other way round by the engine."""
    for share, holds in ((0.9, True), (1.1, False)):
        aligned = two_tokens(gap=share)
        (ranks,) = agreement.top_k(aligned, 2)
        (above,) = agreement.greedy_rank(aligned)
        assert ranks.ok == above.ok == holds
        assert ranks.ratio == pytest.approx(share, rel=1e-3)
        assert above.measured == (0 if holds else 1)


@pytest.mark.parametrize(("share", "holds"), [(0.98, True), (1.02, False)])
def test_values_are_judged_exactly_at_the_tolerance(share: float, holds: bool) -> None:
    aligned = exact(vocabulary=8)
    (row,) = aligned.rows
    delta = float(agreement.tolerance(aligned).max(row)[0])
    values = row.values.clone()
    values[0, 3] += share * delta
    (largest,) = agreement.max_difference(replace(aligned, rows=(replace(row, values=values),)))
    assert largest.ok == holds
    assert f"token {int(row.ids[0, 3])}" in largest.detail
    assert "position 5" in largest.detail


def test_the_mean_sees_what_the_maximum_forgives() -> None:
    """A shift of all logits by half of what is allowed on any one."""
    evidence = clean(noise=1e-4)
    moved = change_scores(evidence, shifted(6e-4))
    for phase in Phase:
        before, after = (with_reference(reference(e), trace(e), phase) for e in (evidence, moved))
        assert all(m.ok for m in agreement.max_difference(after))
        assert all(m.ok for m in agreement.mean_difference(before))
        assert not any(m.ok for m in agreement.mean_difference(after))


def test_a_constant_shift_fails_values_and_only_values() -> None:
    """Softmax does not see it, so that sampling stays right; the raw logits are still not the model's."""
    moved = change_scores(clean(), shifted(0.5))
    failed = {check_id for check_id in COMPARISONS[:6] if judge(get(check_id), moved).status is Status.FAILED}
    assert failed == {"logits.values"}


def test_a_scale_leaves_every_argmax_right_and_fails_values_and_kl() -> None:
    scaled_down = change_scores(clean(), scaled(0.5))
    failed = {check_id for check_id in COMPARISONS[:6] if judge(get(check_id), scaled_down).status is Status.FAILED}
    assert failed == {"logits.values", "logits.kl"}


@pytest.mark.parametrize("phase", [Phase.PROMPT, Phase.FIRST, Phase.DECODE])
def test_phases_are_judged_apart(phase: Phase) -> None:
    wrong = change_scores(clean(), shifted(0.5), phases=(phase,), sizes=(2,))
    verdict = judge(get("logits.values"), wrong)
    broken = {(m.where, m.what.partition(":")[0]) for m in verdict.measurements if not m.ok}
    assert broken == {("TP=2", str(phase))}


def test_the_swapped_position_is_named() -> None:
    wrong = change_scores(clean(), swapped(0, 1), phases=(Phase.DECODE,), requests=("sampled",), sizes=(1,))
    verdict = judge(get("logits.decode_top_k"), wrong)
    (broken,) = (m for m in verdict.measurements if not m.ok)
    assert broken.where == "TP=1"
    assert "request sampled, position" in broken.detail


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["engine", "reference", "noise"])
@pytest.mark.parametrize("law", VALUE_LAWS[:3])
def test_what_is_not_finite_never_passes(
    law: Callable[[Aligned], Iterable[Measurement]], side: str, value: float
) -> None:
    aligned = exact(vocabulary=8)
    (row,) = aligned.rows
    if side == "engine":
        row = replace(row, values=spoil(row.values, value))
    elif side == "reference":
        row = replace(row, expected=spoil(row.expected, value), reference=spoil(row.reference, value))
    else:
        row = replace(
            row, noise_max=torch.full_like(row.noise_max, value), noise_mean=torch.full_like(row.noise_mean, value)
        )
    assert not all(m.ok for m in law(replace(aligned, rows=(row,))))


def test_a_single_nan_in_the_reference_breaks_ranks() -> None:
    aligned = exact(vocabulary=8)
    (row,) = aligned.rows
    row = replace(row, reference=spoil(row.reference, math.nan))
    for law in VALUE_LAWS[3:]:
        assert not any(m.ok for m in law(replace(aligned, rows=(row,))))


@pytest.mark.parametrize("law", VALUE_LAWS)
@pytest.mark.parametrize("what", ["position", "generated token", "request", "offset"])
def test_no_law_passes_with_positions_missing(law: Callable[[Aligned], Iterable[Measurement]], what: str) -> None:
    def change(t: Trace) -> Trace:
        first, *others = t.continuations
        scores = first.step_scores
        if what == "position":
            first = replace(first, step_scores=replace(scores, ids=scores.ids[:-1], values=scores.values[:-1]))
        elif what == "generated token":
            first = replace(first, request=replace(first.request, max_tokens=first.request.max_tokens + 1))
        elif what == "offset":
            first = replace(first, step_scores=replace(scores, first=scores.first + 1))
        else:
            return replace(t, continuations=())
        return replace(t, continuations=(first, *others))

    evidence = change_traces(clean(), change)
    assert not all(m.ok for m in law(with_reference(reference(evidence), trace(evidence), Phase.DECODE)))


def test_lengths_that_differ_between_engines_fail() -> None:
    """3 tokens against 1 is no agreement, though their common prefix agrees."""

    def cut(t: Trace) -> Trace:
        return replace(t, continuations=tuple(replace(c, generated=c.generated[:2]) for c in t.continuations))

    evidence = change_traces(clean(), cut, scenario="alone")
    known = reference(evidence)
    known = replace(
        known,
        **{
            name: getattr(known, name) | {s[: len(s) - 5]: x[:-5] for s, x in getattr(known, name).items()}
            for name in ("logits", "noise_max", "noise_mean")
        },
    )
    assert judge(get("logits.batching"), replace(evidence, reference=known)).status is Status.FAILED


@pytest.mark.parametrize("candidates", [None, 16])
def test_a_tie_sends_generation_apart_and_only_the_common_prefix_is_compared(candidates: int | None) -> None:
    """After the third token the engines computed on different tokens: other logits, and no disagreement."""
    evidence = clean(candidates=candidates)
    second = trace(evidence, 2).continuations[0].step_scores.ids[2, 1].item()

    def part(t: Trace) -> Trace:
        first, *others = t.continuations
        values = first.step_scores.values.clone()
        values[3:] += 1.0
        first = replace(
            first,
            generated=(*first.generated[:2], second, *first.generated[3:]),
            step_scores=replace(first.step_scores, values=values),
        )
        return replace(t, continuations=(first, *others))

    parted = change_traces(evidence, part, sizes=(1,))
    known, ours, theirs = reference(evidence), trace(evidence, 2), trace(parted, 1)
    assert common_length(ours.continuations[0], theirs.continuations[0]) == 2
    aligned = with_engine(known, ours, theirs, Phase.DECODE)
    assert [len(rows.ids) for rows in aligned.rows if rows.request == "one_token"] == [2, 2]
    assert all(m.ok for m in agreement.max_difference(aligned))
    _, decode = agreement.parting(known, ours, theirs)
    assert decode.measured == pytest.approx(gap_of(ours, 2), rel=1e-6)
    assert not decode.ok  # clean logits are half a logit apart: no tie


def test_engines_with_other_candidates_agree_as_far_as_can_be_known() -> None:
    """Of K = 2, each side knows one token that the other does not."""
    aligned = exact(vocabulary=4)
    (row,) = aligned.rows
    ours = Scores(first=5, ids=torch.tensor([[0, 1]]), values=torch.tensor([[2.0, 1.0]]))
    for other, holds in ((1.0 + 1e-7, True), (1.5, False)):
        theirs = Scores(first=5, ids=torch.tensor([[0, 2]]), values=torch.tensor([[2.0, other]]))
        measured = [
            m.ok
            for mine, its in itertools.permutations((ours, theirs))
            for m in agreement.max_difference(replace(aligned, rows=(looked_up(row, mine, its),)))
        ]
        assert all(measured) == holds


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("vocabulary", [2, 10, 1000])
def test_the_kl_bound_holds_for_any_error_within_delta_and_is_tight(size: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    limits = agreement.Tolerance(typical_max=0.0, typical_mean=0.0, rounding=0.0, scale=9.0)
    (row,) = exact(vocabulary=vocabulary).rows
    floor = torch.full_like(row.noise_max, size / agreement.NOISE_FACTOR)
    bound = float(limits.kl(replace(row, noise_max=floor))[0])
    worst = 0.0
    for _ in range(200):
        logits = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
        signs = torch.randint(0, 2, (vocabulary,), generator=generator) * 2 - 1
        p, q = logits.log_softmax(0), (logits + size * signs).log_softmax(0)
        worst = max(worst, float((p.exp() * (p - q)).sum()))
    assert bound / 10 < worst <= bound


@pytest.mark.parametrize(("vocabulary", "k"), [(10, 10), (203, 10), (5000, 10), (5001, 3), (40_000, 64)])
def test_best_values_are_those_of_topk(vocabulary: int, k: int) -> None:
    logits = torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(k))
    assert torch.equal(agreement.best_values(logits, k), logits.topk(k).values)
    logits[3, vocabulary // 2] = torch.nan
    assert agreement.best_values(logits, k)[3, 0].isnan()


def test_top_k_needs_k_candidates() -> None:
    verdict = judge(get("logits.prefill_top_k"), clean(candidates=5))
    assert verdict.status is Status.ERROR
    assert "top-10 needs 10 candidates" in verdict.reason


def test_blocks_cover_every_position_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = clean()
    whole = [
        m
        for phase in Phase
        for m in agreement.max_difference(with_reference(reference(evidence), trace(evidence), phase))
    ]
    monkeypatch.setattr("genmodel.conformance.alignment._BLOCK_ELEMENTS", 3 * VOCABULARY)
    pieces = [
        m
        for phase in Phase
        for m in agreement.max_difference(with_reference(reference(evidence), trace(evidence), phase))
    ]
    assert whole == pieces


def test_candidates_say_so_in_the_kl() -> None:
    evidence = clean(candidates=16)
    (measured,) = agreement.divergence(with_reference(reference(evidence), trace(evidence), Phase.PROMPT))
    assert "over the 16 candidates" in measured.what


def test_the_limit_is_its_own_position_s_noise_floor_but_not_less_than_the_typical_one() -> None:
    evidence = clean()
    known = reference(evidence)
    noisy, quiet = ({s: x.clone() for s, x in known.noise_max.items()} for _ in range(2))
    for sequence in noisy:
        noisy[sequence][-1], quiet[sequence][-1] = 1.0, 0.0

    def limits(noise: dict[tuple[int, ...], torch.Tensor]) -> list[torch.Tensor]:
        changed = reference(change_reference(evidence, noise_max=noise))
        aligned = with_reference(changed, trace(evidence), Phase.DECODE)
        return [agreement.tolerance(aligned).max(rows) for rows in aligned.rows]

    typical = float(torch.cat([x[:-1] for x in limits(known.noise_max)]).median())
    for usual, loud, silent in zip(limits(known.noise_max), limits(noisy), limits(quiet), strict=True):
        assert float(loud[-1]) == pytest.approx(agreement.NOISE_FACTOR, rel=1e-3)
        assert torch.allclose(loud[:-1], usual[:-1], rtol=0.2)
        assert float(silent[-1]) == pytest.approx(typical, rel=0.2)


def turning(largest: float, share: int = 1) -> Evidence:
    """The clean evidence, where turning the reference's choices moves each `share`-th position so far."""
    evidence = clean()
    known = reference(evidence)
    moved = {s: largest * (torch.arange(len(x)) % share == 0).float() for s, x in known.noise_max.items()}
    halves = {s: x / 2 for s, x in moved.items()}
    return change_reference(evidence, turn_max=moved, turn_mean=halves)


def test_where_a_choice_may_turn_the_limit_is_twice_the_turn() -> None:
    """Nothing is added to it, and positions that no choice reaches keep their own."""
    evidence = turning(0.5, share=2)
    aligned = with_reference(reference(evidence), trace(evidence), Phase.PROMPT)
    limits = agreement.tolerance(aligned)
    for rows in aligned.rows:
        turns = rows.turn_max > 0
        assert torch.equal(limits.max(rows)[turns], torch.full_like(limits.max(rows)[turns], 1.0))
        assert torch.equal(limits.mean(rows)[turns], torch.full_like(limits.mean(rows)[turns], 0.5))
        assert torch.equal(limits.max(rows)[~turns], limits.steady(rows)[~turns])
        assert (limits.max(rows)[~turns] < 0.01).all()


def test_a_turn_within_rounding_allows_no_more() -> None:
    """The limit is the greater of the two, not their sum."""
    evidence = turning(1e-9)
    aligned = with_reference(reference(evidence), trace(evidence), Phase.DECODE)
    limits = agreement.tolerance(aligned)
    assert all(torch.equal(limits.max(rows), limits.steady(rows)) for rows in aligned.rows)


@pytest.mark.parametrize(("share", "status"), [(1, Status.FAILED), (3, Status.PASSED)])
def test_too_many_positions_that_hang_on_near_ties_tell_nothing(share: int, status: Status) -> None:
    """A reference that cannot decide excuses anything, and the suite says so instead of passing."""
    verdict = judge(get("logits.resolution"), turning(0.1, share))
    assert verdict.status is status
    worst = max(verdict.measurements, key=lambda m: m.measured / m.allowed)
    assert "hang on near-tied choices" in worst.what
    assert "positions, judged within what either choice gives" in worst.detail


@pytest.mark.parametrize(("share", "status"), [(1, Status.NOT_APPLICABLE), (2, Status.PASSED)])
def test_bfloat16_does_not_apply_where_nearly_all_hangs_on_near_ties(share: int, status: Status) -> None:
    """There, more positions may than in float32; all of them say nothing about the model."""
    evidence = clean()
    half = evidence.references["initial", "bfloat16"]
    assert isinstance(half, ReferenceRun)
    moved = {s: 50.0 * (torch.arange(len(x)) % share == 0).float() for s, x in half.noise_max.items()}
    half = replace(half, turn_max=moved, turn_mean=moved)
    verdict = judge(
        get("logits.bfloat16"), replace(evidence, references={**evidence.references, ("initial", "bfloat16"): half})
    )
    assert verdict.status is status, verdict


def test_a_turn_that_is_not_finite_is_a_broken_reference() -> None:
    """Infinity would allow anything."""
    assert judge(get("logits.complete"), turning(math.inf)).status is Status.FAILED


def reference(evidence: Evidence) -> ReferenceRun:
    assert isinstance(evidence.reference, ReferenceRun)
    return evidence.reference


def trace(evidence: Evidence, size: int = 1) -> Trace:
    found = evidence.traces["plain", size]
    assert isinstance(found, tuple)
    return found[0]


def spoil(x: torch.Tensor, value: float) -> torch.Tensor:
    spoiled_x = x.clone()
    spoiled_x[-1, -1] = value
    return spoiled_x


def exact(vocabulary: int) -> Aligned:
    """One position whose scores are the reference's, with a noise floor of one thousandth."""
    logits = torch.linspace(4, 1, vocabulary)[None]
    ids = torch.arange(vocabulary)[None]
    floor = torch.tensor([1e-3])
    row = Rows(
        request="r",
        first=5,
        ids=ids,
        values=logits.clone(),
        expected=logits.clone(),
        greedy=ids[:, 0],
        reference=logits,
        noise_max=floor,
        noise_mean=floor / 2,
        turn_max=torch.zeros(1),
        turn_mean=torch.zeros(1),
    )
    return Aligned(where="TP=1", phase=Phase.DECODE, dtype=torch.float32, rows=(row,), gaps=())


def two_tokens(gap: float) -> Aligned:
    """The two best tokens of the reference `gap` ties apart, and the engine's the other way round."""
    aligned = exact(vocabulary=8)
    (row,) = aligned.rows
    logits = row.reference.clone()
    logits[0, 0] = logits[0, 1] + gap * float(agreement.tolerance(aligned).tie(row)[0])
    ids = row.ids.clone()
    ids[0, :2] = torch.tensor([1, 0])
    swapped_row = replace(
        row, reference=logits, ids=ids, values=logits.gather(1, ids), expected=logits.gather(1, ids), greedy=ids[:, 0]
    )
    return replace(aligned, rows=(swapped_row,))


def looked_up(row: Rows, mine: Scores, its: Scores) -> Rows:
    from genmodel.conformance.alignment import _look_up

    return replace(row, ids=mine.ids, values=mine.values, expected=_look_up(mine.ids, mine.values, its.ids, its.values))


def gap_of(ours: Trace, step: int) -> float:
    values = ours.continuations[0].step_scores.values[step]
    return float(values[0] - values[1])


def test_spoiled_changes_one_position() -> None:
    """The sample builder itself."""
    before = trace(clean()).continuations[1].step_scores
    assert (spoiled(9.0)(before).values != before.values).sum() == 1
