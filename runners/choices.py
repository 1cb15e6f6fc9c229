"""The choices a model makes by comparing numbers, and where rounding alone could have made them otherwise.

A router gives a token to the k experts that score best. Where the k-th and the next best score are closer than
rounding can tell, two correct implementations may choose differently, and their outputs differ by far more than
rounding: neither is wrong. Such near ties are found in the reference alone. All its choices (torch.topk, argmax and
max) are seen, in the tested dtype and in the higher precision, in anybody's code; how far the scores move between
the two is the noise of those scores, and a margin is a near tie by the rule that holds for logits: each score may be
off by NOISE_FACTOR noise floors and ULP_FACTOR ulp.

Then the reference runs again with near ties decided the other way. How far that moves its logits is the `turn` of
each position: zero unless a near tie reaches it. The program under test has no say in any of this.

Shapes: R rows of scores, n scores to a row, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genmodel.runners import noise

NOISE_FACTOR = 4.0
"""Noise floors that a value may be off."""
ULP_FACTOR = 4.0
"""Units in the last place, at the largest value, that it may be off on top."""
MEDIAN_OF_NORMAL = 0.6745
"""The median of |x| for a standard normal x, which makes a deviation of a median."""
HALVES = 4
"""Ways to split the near ties at random in two halves, of which each is turned without the other."""

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Choice:
    """One call that chose the k best of n scores, in every row."""

    scores: torch.Tensor
    """[R, n], in the order of the call's own rows; negated where the least were chosen."""
    k: int

    def margins(self) -> torch.Tensor:
        """How far the k-th is ahead of the next best, [R]."""
        best = self.scores.topk(self.k + 1, -1).values
        return best[:, -2] - best[:, -1]


Turned = Callable[[int, torch.Tensor], torch.Tensor | None]
"""From a call's number and its margins [R] to the rows to turn, [R] bool; None for none of them."""


class Choices(TorchDispatchMode):
    """Entered around a forward pass: keeps what it chose from, and may make it choose otherwise.

    Args:
        turned: rows in which the next best is chosen instead of the k-th.
    """

    def __init__(self, turned: Turned = lambda call, margins: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Choice] = []
        self._turned = turned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        question = _question(func, args, kwargs)
        if question is None:
            return answer
        made = Choice(question.ranked.flatten(0, -2), question.k)
        rows = self._turned(len(self.made), made.margins())
        self.made.append(made)
        if rows is None or not bool(rows.any()):
            return answer
        return question.turn(answer, rows.view(question.ranked.shape[:-1]).unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class _Question:
    """A call that chooses among numbers."""

    scores: torch.Tensor
    """[.., n]: the dimension chosen along is the last."""
    ranked: torch.Tensor
    """The same, negated where the least are chosen."""
    dim: int
    k: int

    def turn(self, answer: Any, wanted: torch.Tensor) -> Any:
        """The call's answer with the next best in the place of the k-th, where wanted, [.., 1] bool."""
        index = self.ranked.topk(self.k + 1, -1).indices
        last, other = index[..., -2:-1], index[..., -1:]
        parts = answer if isinstance(answer, (tuple, list)) else (answer,)
        kept = parts[0].dim() == self.scores.dim()  # topk keeps the dimension, max and argmax only if told to
        inner = [part.movedim(self.dim, -1) if kept else part.unsqueeze(-1) for part in parts]
        here = wanted & (inner[-1] == last)
        fresh = [self.scores.gather(-1, other), other][-len(inner) :]
        made = [part.where(~here, new) for part, new in zip(inner, fresh, strict=True)]
        outer = [part.movedim(-1, self.dim) if kept else part.squeeze(-1) for part in made]
        return outer[0] if len(outer) == 1 else tuple(outer)


def _question(func: Any, args: Any, kwargs: Any) -> _Question | None:
    """What is asked, if this is a call that chooses among numbers."""

    def argument(index: int, name: str, default: Any) -> Any:
        return args[index] if len(args) > index else kwargs.get(name, default)

    if func is aten.topk.default:
        k, dim, largest = args[1], argument(2, "dim", -1), argument(3, "largest", True)
    elif func in (aten.max.dim, aten.argmax.default):
        k, dim, largest = 1, argument(1, "dim", None), True
    elif func in (aten.min.dim, aten.argmin.default):
        k, dim, largest = 1, argument(1, "dim", None), False
    else:
        return None
    scores = args[0]
    if dim is None or scores.dim() == 0 or not scores.is_floating_point() or not 0 < k < scores.shape[dim]:
        return None
    scores = scores.detach().movedim(dim, -1)
    return _Question(scores, scores if largest else -scores, dim, k)


class SameChoices(TorchDispatchMode):
    """Entered around passes: what the first one chose by comparing numbers, such as experts, the others choose too.

    Rounding may turn a choice, and gradients jump with it: that is neither an error nor noise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[torch.Tensor] = []
        self._call: int | None = None

    @property
    def made(self) -> bool:
        """Whether the first pass chose anything."""
        return bool(self._made)

    def again(self) -> None:
        """The next pass begins."""
        self._call = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if func not in _CHOOSING or not args[0].is_floating_point() or args[0].dim() == 0:
            return answer
        dim = args[_CHOOSING[func]] if len(args) > _CHOOSING[func] else kwargs.get("dim", -1)
        index = answer[1] if isinstance(answer, tuple) else answer
        if self._call is None:
            self._made.append(index.clone())
            return answer
        call, self._call = self._call, self._call + 1
        if dim is None or call >= len(self._made) or self._made[call].shape != index.shape:
            return answer
        chosen = self._made[call]
        if not isinstance(answer, tuple):
            return chosen.clone()
        kept = answer[0].dim() == args[0].dim()
        inner = chosen if kept else chosen.unsqueeze(dim)
        values = args[0].gather(dim, inner)
        return (values if kept else values.squeeze(dim)), chosen.clone()


_CHOOSING = {
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.sort.stable: 3,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
}
"""Where each has its `dim`."""


class TurnedKinks(TorchDispatchMode):
    """Entered around passes: units of relu or leaky relu whose input is nearly zero are on the other side of it.

    Rounding may put them there, and their gradients jump.

    Args:
        share: of the largest input of a call, up to which one is nearly zero.
    """

    def __init__(self, share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._share = share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.relu.default:
            answer = func(*args)
            least = torch.full_like(answer, torch.finfo(answer.dtype).tiny)  # backward asks if the result is above zero
            return torch.where(self._near(args[0]), least * (args[0] <= 0), answer)
        if func is aten.leaky_relu_backward.default:
            gradient, given, *others = args
            return func(gradient, torch.where(self._near(given), -given, given), *others)
        return func(*args, **(kwargs or {}))

    def _near(self, given: torch.Tensor) -> torch.Tensor:
        sizes = given.abs()
        return sizes <= self._share * sizes.max() if sizes.numel() else sizes > 0


def near_ties(
    tested: Sequence[Sequence[Choice]],
    higher: Sequence[Sequence[Choice]],
    moved: Sequence[Sequence[Sequence[Choice]]] = (),
) -> list[dict[int, torch.Tensor]]:
    """Up to which margin rounding can turn a choice, [R] by number of the call, for every sequence with a near tie.

    Args:
        tested: the choices of each sequence's run in the tested dtype.
        higher: the same in the higher precision.
        moved: the same with weights moved, once for each draw of `noise.sizes`.

    Returns:
        One per sequence; empty for a sequence whose margins are all larger. Where the two runs did not make the same
        calls, which a model may do whose code depends on values, nothing is taken for a near tie.
    """
    limits: list[dict[int, torch.Tensor]] = [{} for _ in higher]
    near = [False for _ in higher]
    for call in range(max((len(made) for made in higher), default=0)):
        alike = {
            index: made[call]
            for index, made in enumerate(higher)
            if all(_same_call(run[index], made, call) for run in (tested, *moved))
        }
        errors, *draws = [
            [_margin_errors(run[index][call], theirs) for index, theirs in alike.items()] for run in (tested, *moved)
        ]
        found = noise.sizes(errors, draws)
        typical = torch.cat([*found, torch.zeros(0)]).median() / MEDIAN_OF_NORMAL
        for (index, theirs), error in zip(alike.items(), found, strict=True):
            eps = torch.finfo(tested[index][call].scores.dtype).eps
            rounding = 2 * ULP_FACTOR * eps * _finite(theirs.scores.double()).abs().amax(-1)
            limits[index][call] = NOISE_FACTOR * error.clamp(min=float(typical)) + rounding
            near[index] |= bool((theirs.margins() <= limits[index][call]).any())
    return [found if close else {} for found, close in zip(limits, near, strict=True)]


def _same_call(ours: Sequence[Choice], theirs: Sequence[Choice], call: int) -> bool:
    """Whether two runs over a sequence have a call in common."""
    return len(ours) == len(theirs) > call and ours[call].scores.shape == theirs[call].scores.shape


def _margin_errors(tested: Choice, higher: Choice) -> torch.Tensor:
    """How far the margin between the higher precision's k-th and next best is off in the tested dtype, [R] float64."""
    pair = higher.scores.topk(higher.k + 1, -1).indices[:, -2:]
    ours, theirs = (choice.scores.double().gather(1, pair) for choice in (tested, higher))
    return _finite((ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1])).abs()


def _finite(scores: torch.Tensor) -> torch.Tensor:
    """Scores with zeros where a mask put infinities."""
    return scores.nan_to_num(0.0, 0.0, 0.0)


def turns(
    logits: Callable[[], torch.Tensor], base: torch.Tensor, limits: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far turning near ties moves the logits of each position: largest and mean over V, [T], the most of all runs.

    All near ties are turned together, and halves of them, so that none is always turned with another one. A choice that
    is turned may turn one of a later call, and turning that one too would hide it: so calls are split by the digits of
    their binary numbers as well, which sets any two apart. What is a near tie is asked anew in every run: a choice that
    is turned moves the margins of those after it.

    Args:
        logits: runs the model on one sequence, [T, V].
        base: what that gives without turning anything.
        limits: the sequence's, of `near_ties`.
    """
    largest, mean = (torch.zeros(len(base), dtype=torch.float64) for _ in range(2))
    for half in _halves([*limits]):

        def turned(call: int, margins: torch.Tensor, half: Half = half) -> torch.Tensor | None:
            if call not in limits or limits[call].shape != margins.shape:
                return None
            return (margins <= limits[call]) & half(call, len(margins)).to(margins.device)

        with Choices(turned):
            moved = (logits().double() - base.double()).abs()
        largest = torch.maximum(largest, moved.amax(-1))
        mean = torch.maximum(mean, moved.mean(-1))
    return largest, mean


Half = Callable[[int, int], torch.Tensor]
"""From a call and its number of rows to the rows that are turned if they are near ties, [R] bool."""


def _halves(calls: Sequence[int]) -> Iterator[Half]:
    """All, halves of each call's rows drawn at random, and halves of the calls; each half with its complement."""

    def drawn(draw: int, call: int, rows: int) -> torch.Tensor:
        return torch.rand(rows, generator=torch.Generator().manual_seed(1000 * call + draw)) < 0.5

    def numbered(digit: int, call: int, rows: int) -> torch.Tensor:
        return torch.full((rows,), bool(calls.index(call) >> digit & 1))

    def complement(half: Half, call: int, rows: int) -> torch.Tensor:
        return ~half(call, rows)

    yield lambda _, rows: torch.ones(rows, dtype=torch.bool)
    digits = (len(calls) - 1).bit_length()
    for half in (
        *(partial(drawn, draw) for draw in range(HALVES)),
        *(partial(numbered, digit) for digit in range(digits)),
    ):
        yield half
        yield partial(complement, half)
