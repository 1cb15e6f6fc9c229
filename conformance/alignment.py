"""Line up what an engine scored with what it should have scored, position by position.

Shapes: N consecutive positions of one request, P prompt tokens, K candidates the engine scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from genmodel.conformance.access import NoEvidence
from genmodel.conformance.verdict import REFERENCE, row
from genmodel.runners.evidence import Continuation, ReferenceRun, Scores, Trace

_BLOCK_ELEMENTS = 1 << 22  # logits looked at together: 16 MiB of float32, so that temporaries stay small


class Phase(StrEnum):
    """Kinds of positions, judged apart because they take different paths through an engine."""

    PROMPT = "prompt"
    """All of the prompt but its last token: prefill."""
    FIRST = "first token"
    """The prompt's last token, from which the first token is generated."""
    DECODE = "decode"
    """Generated tokens, one at a time against the KV cache."""
    AFTER_CHUNK = "after a chunk boundary"
    """The prompt's positions from its second chunk on, which attend to keys of an earlier step."""
    AFTER_HIT = "after a cache hit"
    """Generated tokens of requests that took part of their prompt from the prefix cache."""
    AFTER_PREEMPTION = "after preemption"
    """Tokens generated once a request's lost cache had been recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Consecutive positions of one request: what the engine scored, and what it should have."""

    request: str
    first: int
    """Position of row 0 in the token sequence."""
    ids: torch.Tensor
    """[N, K] int64, best first."""
    values: torch.Tensor
    """[N, K] float32, the engine's logits."""
    expected: torch.Tensor
    """[N, K] float32, the other side's logits of the same tokens; NaN for tokens outside its vocabulary."""
    greedy: torch.Tensor
    """[N] int64, the token chosen greedily: the generated one, or the best-scored where sampling chose."""
    reference: torch.Tensor
    """[N, V] float32."""
    noise_max: torch.Tensor
    """[N] float32, the reference's noise floor: its largest error over V."""
    noise_mean: torch.Tensor
    """[N] float32, its mean error over V."""
    turn_max: torch.Tensor
    """[N] float32, how far the reference moves there when choices that rounding could turn are turned: largest over V.

    Zero where no such choice reaches.
    """
    turn_mean: torch.Tensor
    """[N] float32, the mean over V."""

    def cut(self, start: int, stop: int) -> Rows:
        """The positions of rows `start` to `stop`, as views."""
        part = slice(start, stop)
        return replace(
            self,
            first=self.first + start,
            ids=self.ids[part],
            values=self.values[part],
            expected=self.expected[part],
            greedy=self.greedy[part],
            reference=self.reference[part],
            noise_max=self.noise_max[part],
            noise_mean=self.noise_mean[part],
            turn_max=self.turn_max[part],
            turn_mean=self.turn_mean[part],
        )

    def blocks(self) -> Iterator[Rows]:
        """The same positions in pieces whose temporaries take a few tens of megabytes."""
        size = max(1, _BLOCK_ELEMENTS // self.reference.shape[1])
        for start in range(0, len(self.ids), size):
            yield self.cut(start, start + size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """All positions of one phase of one trace."""

    where: str
    """Row of the summary table."""
    phase: Phase
    dtype: torch.dtype
    """What the engine computed in."""
    rows: tuple[Rows, ...]
    gaps: tuple[str, ...]
    """What is missing, or there beyond what was asked for: one entry per request, in words."""

    @property
    def candidates(self) -> int:
        """K: the fewest tokens scored at any position."""
        return min(rows.ids.shape[1] for rows in self.rows)

    def blocks(self) -> Iterator[Rows]:
        """All positions in pieces of bounded size."""
        for rows in self.rows:
            yield from rows.blocks()


def with_reference(reference: ReferenceRun, trace: Trace, phase: Phase) -> Aligned:
    """Line up one engine's scores with the reference teacher-forced on the tokens this engine produced.

    Raises:
        NoEvidence: if the reference was not run on one of those sequences.
    """
    rows: list[Rows] = []
    gaps: list[str] = [] if trace.continuations else ["every request"]
    for continuation in trace.continuations:
        scores = _scores(continuation, phase)
        gaps += _gap(continuation, phase, scores)
        if len(scores.ids):
            rows.append(_rows(reference, continuation, phase, scores))
    return Aligned(
        where=row(trace.tensor_parallel_size),
        phase=phase,
        dtype=getattr(torch, trace.proof.dtype.removeprefix("torch.")),
        rows=tuple(rows),
        gaps=tuple(gaps),
    )


def with_engine(reference: ReferenceRun, ours: Trace, theirs: Trace, phase: Phase) -> Aligned:
    """Line up two engines' scores of the same requests, up to where their generated tokens part.

    `expected` is the other engine's logits. Both directions are lined up, so that each request appears twice: a
    token that only one side counts among its best must be no better than the other side's worst candidate.

    Raises:
        NoEvidence: if the reference, which gives the noise floor, was not run on a sequence of `ours`.
    """
    aligned = with_reference(reference, ours, phase)
    own = {rows.request: rows for rows in aligned.rows}
    other = {continuation.request.name: continuation for continuation in theirs.continuations}
    gaps = list(aligned.gaps)
    gaps += [f"{name}: one engine only" for name in sorted(other.keys() ^ {c.request.name for c in ours.continuations})]
    rows: list[Rows] = []
    for continuation in ours.continuations:
        counterpart = other.get(continuation.request.name)
        if counterpart is None:
            continue
        scores = _scores(counterpart, phase)
        gaps += _gap(counterpart, phase, scores)
        if continuation.request.name in own:
            shared = len(continuation.request.prompt) + common_length(continuation, counterpart)
            rows += _both_directions(own[continuation.request.name], scores, shared)
    return replace(aligned, rows=tuple(rows), gaps=tuple(gaps))


def common_length(ours: Continuation, theirs: Continuation) -> int:
    """How many generated tokens two continuations of one request share from the start."""
    shortest = min(len(ours.generated), len(theirs.generated))
    return next((i for i in range(shortest) if ours.generated[i] != theirs.generated[i]), shortest)


def gather(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[N, V] and [N, K] to [N, K]; ids outside the vocabulary give NaN, which no limit lets pass."""
    vocabulary = logits.shape[1]
    inside = (ids >= 0) & (ids < vocabulary)
    return logits.gather(1, ids.clamp(0, vocabulary - 1)).where(inside, torch.nan)


def _positions(continuation: Continuation, phase: Phase) -> range:
    """The positions that a complete trace scores; empty for a phase that a request has no part in."""
    request = continuation.request
    last = len(request.prompt) - 1
    end = last + request.max_tokens
    boundary, resumed = continuation.chunk_boundary, continuation.resumed_at
    return {
        Phase.PROMPT: range(last),
        Phase.FIRST: range(last, last + min(1, request.max_tokens)),
        Phase.DECODE: range(last + 1, end),
        Phase.AFTER_CHUNK: range(last if boundary is None else min(boundary, last), last),
        Phase.AFTER_HIT: range(last if continuation.cached_tokens else end, end),
        Phase.AFTER_PREEMPTION: range(end if resumed is None else resumed, end),
    }[phase]


def _scores(continuation: Continuation, phase: Phase) -> Scores:
    """The phase's part of what was scored, as far as it starts where it should and there are tokens for it."""
    prompt = phase in (Phase.PROMPT, Phase.AFTER_CHUNK)
    found = continuation.prompt_scores if prompt else continuation.step_scores
    tokens = len(continuation.request.prompt) - 1 if prompt else len(continuation.generated)
    origin = 0 if prompt else len(continuation.request.prompt) - 1
    wanted = _positions(continuation, phase)
    if found is None or found.first != origin:
        nothing = torch.empty(0, 1)
        return Scores(first=wanted.start, ids=nothing.long(), values=nothing)
    part = slice(wanted.start - origin, min(wanted.stop - origin, tokens))
    return Scores(first=wanted.start, ids=found.ids[part], values=found.values[part])


def _gap(continuation: Continuation, phase: Phase, scores: Scores) -> list[str]:
    wanted = len(_positions(continuation, phase))
    return [] if len(scores.ids) == wanted else [f"{continuation.request.name}: {len(scores.ids)} of {wanted}"]


def _rows(reference: ReferenceRun, continuation: Continuation, phase: Phase, scores: Scores) -> Rows:
    sequence = continuation.sequence
    if sequence not in reference.logits:
        raise NoEvidence("reference", REFERENCE, None)
    part = slice(scores.first, scores.first + len(scores.ids))
    logits = reference.logits[sequence][part]
    if len(logits) != len(scores.ids):
        name = continuation.request.name
        raise ValueError(f"the reference of {name} ends {len(scores.ids) - len(logits)} positions before the engine's")
    still = torch.zeros_like(reference.noise_max[sequence])
    return Rows(
        request=continuation.request.name,
        first=scores.first,
        ids=scores.ids,
        values=scores.values,
        expected=gather(logits, scores.ids),
        greedy=_greedy(continuation, phase, scores),
        reference=logits,
        noise_max=reference.noise_max[sequence][part],
        noise_mean=reference.noise_mean[sequence][part],
        turn_max=reference.turn_max.get(sequence, still)[part],
        turn_mean=reference.turn_mean.get(sequence, still)[part],
    )


def _greedy(continuation: Continuation, phase: Phase, scores: Scores) -> torch.Tensor:
    if phase in (Phase.PROMPT, Phase.AFTER_CHUNK) or continuation.request.temperature > 0:
        return scores.ids[:, 0]
    start = scores.first - len(continuation.request.prompt) + 1
    return torch.tensor(continuation.generated[start : start + len(scores.ids)])


def _both_directions(ours: Rows, theirs: Scores, shared: int) -> list[Rows]:
    """Rows of positions below `shared`, seen from each side."""
    count = min(len(ours.ids), len(theirs.ids), shared - ours.first)
    if count <= 0:
        return []
    ours = ours.cut(0, count)
    ids, values = theirs.ids[:count], theirs.values[:count]
    return [
        replace(ours, expected=_look_up(ours.ids, ours.values, ids, values)),
        replace(ours, ids=ids, values=values, expected=_look_up(ids, values, ours.ids, ours.values)),
    ]


def _look_up(
    ids: torch.Tensor, values: torch.Tensor, other_ids: torch.Tensor, other_values: torch.Tensor
) -> torch.Tensor:
    """The other side's logits of `ids`, [N, K].

    Of a token the other side did not score, all that is known is that its logit is at most the least one scored:
    it is taken to agree as far as that allows.
    """
    order = other_ids.argsort(dim=1)
    keys = other_ids.gather(1, order)
    at = torch.searchsorted(keys, ids.contiguous()).clamp(max=keys.shape[1] - 1)
    found = keys.gather(1, at) == ids
    at_most = torch.minimum(values, other_values.amin(dim=1, keepdim=True))
    return other_values.gather(1, order).gather(1, at).where(found, at_most)
