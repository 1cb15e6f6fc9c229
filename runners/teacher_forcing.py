"""The reference on given token sequences: its logits, and how far rounding may move them.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from genmodel.runners import choices, noise, standalone

Tokens = tuple[int, ...]
LargestAndMean = dict[Tokens, torch.Tensor]
"""By sequence, [2, T] float64: the largest and the mean over V of a number for every logit."""


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over every sequence."""

    logits: dict[Tokens, torch.Tensor] = field(default_factory=dict)
    """[T, V]."""
    made: list[list[choices.Choice]] = field(default_factory=list)
    """What each sequence's pass chose by comparing numbers."""
    fixed: list[choices.SameChoices] = field(default_factory=list)
    """Which it was, for other runs to choose the same."""


@torch.no_grad()
def run(built: standalone.Standalone, sequences: Sequence[Tokens], like: Run | None = None) -> Run:
    """Run the model on every sequence.

    Args:
        built: the model, with its weights.
        sequences: token ids.
        like: a run over the same sequences, whose choices are made again.
    """
    found = Run()
    for number, sequence in enumerate(sequences):
        same = choices.SameChoices() if like is None else like.fixed[number]
        if like is not None:
            same.again()
        with same, choices.Choices() as seen:
            found.logits[sequence] = built.logits(torch.tensor(sequence))
        found.made.append(seen.made)
        found.fixed.append(same)
    return found


def with_moved_weights(built: standalone.Standalone, exact: Run, dtype: torch.dtype) -> list[Run]:
    """Runs with all weights moved by what rounding to `dtype` may move them, and the choices of the exact run."""
    runs = []
    for draw in range(noise.DRAWS):
        with noise.moved_weights(built.model, draw, dtype):
            runs.append(run(built, [*exact.logits], exact))
    return runs


def noise_floors(tested: Run, exact: Run, moved: Sequence[Run]) -> LargestAndMean:
    """How far rounding to the tested dtype moves the logits of every position."""
    distances = [
        [_over_vocabulary(other.logits[sequence], logits) for sequence, logits in exact.logits.items()]
        for other in (tested, *moved)
    ]
    return dict(zip(exact.logits, noise.sizes(distances[0], distances[1:]), strict=True))


@torch.no_grad()
def turns(
    built: standalone.Standalone,
    exact: Run,
    ties: Sequence[Mapping[int, torch.Tensor]],
    floors: Mapping[Tokens, torch.Tensor],
    free: Run,
) -> LargestAndMean:
    """How far each position moves with the near ties of its sequence; only sequences that have any.

    Args:
        built: the reference in the higher precision.
        exact: what it gave.
        ties: the limits of `choices.near_ties`, by sequence.
        floors: of `noise_floors`.
        free: a run in the tested dtype with choices of its own: where it is off by more than rounding, it turned some.
    """
    found = {}
    for (sequence, logits), limits in zip(exact.logits.items(), ties, strict=True):
        if limits:
            again = partial(built.logits, torch.tensor(sequence))
            turned = _over_vocabulary(free.logits[sequence], logits)
            turned[turned <= choices.NOISE_FACTOR * floors[sequence]] = 0.0
            found[sequence] = torch.stack([*choices.turns(again, logits, limits)]).maximum(turned)
    return found


def _over_vocabulary(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Largest and mean distance over V of two [T, V], as [2, T] float64."""
    distance = (ours.double() - theirs.double()).abs()
    return torch.stack([distance.amax(-1), distance.mean(-1)])
