"""Run a model in every way that training code may, and compare each with evaluation of the sequences one by one.

What is computed must not depend on how sequences are laid out, on what is given in their place, on the mode, nor on
whether autograd records. Bugs hide where two of these meet, so all combinations are tried; dropout is off in each.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genmodel.modeling.attention import TrainableAttention, packed_sequences
from genmodel.modeling.wrapper import accepts, embedding_method
from genmodel.runners import coding, low_precision, training_modes
from genmodel.runners.choices import SameChoices, TurnedKinks
from genmodel.runners.evidence import FEW, Given, Layout, Way, Ways, WorstGradient

BOUNDARIES = "cu_seqlens"
"""The argument of a forward that takes packs of sequences, by flash-attn's name."""
SMALL = 0.1
"""Share of the model's largest gradient that errors are measured by where a parameter's own is smaller."""
KINKS = 4
"""Deviations of rounding at the largest input of a relu, up to which another input may be on either side of zero."""


@dataclass(frozen=True)
class _Found:
    """What one pass gave."""

    outputs: tuple[torch.Tensor, ...]
    """Hidden states, and logits, of all sequences; flat."""
    gradients: Mapping[str, torch.Tensor | None]
    """Empty where there can be none."""


@dataclass(frozen=True)
class _Runner:
    model: Any
    trainable: Mapping[str, nn.Parameter]
    begin: Callable[[bool, int], None]

    def run(self, way: Way, sequences: Sequence[torch.Tensor]) -> _Found:
        """One pass and, where autograd records, a backward pass of the loss that `gradients.training_loss` is.

        Args:
            way: how.
            sequences: token ids [T] each, of which the last one is a target only.

        Raises:
            Exception: whatever the model raises, and ValueError if it gives something of another shape.
        """
        for parameter in self.trainable.values():
            parameter.grad = None
        bounds = list(itertools.accumulate((len(tokens) - 1 for tokens in sequences), initial=0))
        told: contextlib.AbstractContextManager[dict[str, torch.Tensor]] = contextlib.nullcontext({})
        if way.layout == "packed":
            told = packed(self.model, torch.tensor(bounds, dtype=torch.int32))
        # Backward too is inside: checkpointing computes activations there once more.
        with training_modes.NoDropout(), torch.set_grad_enabled(way.recording), told as extra:
            hidden, logits = self._forward(way, sequences, extra)
            losses = [
                F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), tokens[1:])
                for scores, tokens in zip(logits, sequences, strict=True)
            ]
            loss = torch.stack(losses).mean()
            if loss.requires_grad:
                training_modes.backward(loss)
        found = {
            name: None if p.grad is None else coding.local(p.grad).to(torch.float64, copy=True)
            for name, p in self.trainable.items()
        }
        for parameter in self.trainable.values():
            parameter.grad = None
        outputs = tuple(torch.cat([x.detach().flatten() for x in each]).double() for each in (hidden, logits))
        return _Found(outputs, found if way.recording and way.given != "constant inputs_embeds" else {})

    def _forward(
        self, way: Way, sequences: Sequence[torch.Tensor], extra: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Hidden states [T, C] and logits [T, V] of each sequence."""
        inputs = [tokens[:-1] for tokens in sequences]
        positions = [torch.arange(len(tokens)) for tokens in inputs]
        if way.layout == "alone":
            hidden, logits = [], []
            for tokens, where in zip(inputs, positions, strict=True):
                self.begin(way.training, 0)
                hidden.append(self._states(way.given, tokens, where))
                logits.append(self.model.compute_logits(hidden[-1]))
            return hidden, logits
        self.begin(way.training, 0)
        if way.layout == "packed":
            states = self._states(way.given, torch.cat(inputs), torch.cat(positions), **extra)
        else:
            rows = torch.stack(inputs)
            states = self._states(way.given, rows, torch.stack(positions))
            if states.shape[:-1] != rows.shape:
                raise ValueError(f"{list(rows.shape)} tokens give {list(states.shape)}")
            states = states.flatten(0, 1)
        lengths = [len(tokens) for tokens in inputs]
        return list(states.split(lengths)), list(self.model.compute_logits(states).split(lengths))

    def _states(self, given: Given, tokens: torch.Tensor, positions: torch.Tensor, **extra: Any) -> torch.Tensor:
        arguments: dict[str, Any] = {"positions": positions, **extra}
        if given == "input_ids":
            arguments["input_ids"] = tokens
        else:
            embed = embedding_method(self.model)
            assert embed is not None, "asked for by `_givens`"
            embedded = embed(tokens.flatten()).unflatten(0, tokens.shape)
            constant = given == "constant inputs_embeds"
            arguments |= {"input_ids": None, "inputs_embeds": embedded.detach() if constant else embedded}
        states: torch.Tensor = self.model(**arguments)
        return states


def measure(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    groups: Mapping[tuple[Layout, ...], Sequence[torch.Tensor]],
    *,
    training: bool,
) -> tuple[Ways, Ways]:
    """All ways of a float64 model in float64 and, converted, in float32; it ends as it began.

    Args:
        model: the model.
        trainable: its parameters.
        groups: sequences of token ids [T] by the layouts that they are tried in, which begin with "alone".
        training: whether training mode is tried too: where it is no longer random once dropout is off.
    """
    modes = (False, True) if training else (False,)
    with training_modes.passes(model) as begin:
        runner = _Runner(model, trainable, begin)
        wide = tuple(
            way
            for layouts, sequences in groups.items()
            for given in _givens(model)
            for way in _in_float64(runner, layouts, given, sequences, modes)
        )
    narrow: list[Way] = []
    reason = ""
    with low_precision.weights_in(torch.float32, model), training_modes.passes(model) as begin:
        runner = _Runner(model, trainable, begin)
        for layouts, sequences in groups.items():
            try:
                narrow.extend(_in_float32(runner, layouts, sequences, modes))
            except Exception as error:  # noqa: BLE001 - built for float64, it need not run in anything else
                reason = f"the model, built in float64, does not run so: {low_precision.line(error)}"
                break
    return Ways(ways=wide), Ways(ways=() if reason else tuple(narrow), reason=reason)


@contextlib.contextmanager
def packed(model: Any, boundaries: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Tell a model where the sequences of a pack begin; yields the arguments that forward takes for it.

    A model that names `cu_seqlens` has to heed it. One that takes any keyword may pass it on or drop it, so that its
    attention is told as well.

    Args:
        model: the model.
        boundaries: [sequences + 1], int32, from 0 to the number of tokens.
    """
    extra = {BOUNDARIES: boundaries} if accepts(model.forward, BOUNDARIES) else {}
    with contextlib.nullcontext() if _named(model) else packed_sequences(boundaries):
        yield extra


def can_be_packed(model: Any) -> bool:
    """Whether there is a way to tell it where sequences begin."""
    if _named(model) or any(isinstance(m, TrainableAttention) for m in model.modules()):
        return True
    return accepts(model.forward, BOUNDARIES) and not _drops_boundaries(model)


def _named(model: Any) -> bool:
    return BOUNDARIES in inspect.signature(model.forward).parameters


@torch.no_grad()
def _drops_boundaries(model: Any) -> bool:
    """Whether a model that takes any keyword computes the same with this one as without."""
    tokens, positions = torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])
    told = {BOUNDARIES: torch.tensor([0, 1, 3], dtype=torch.int32)}
    one, other = (model(input_ids=tokens, positions=positions, **extra) for extra in ({}, told))
    return torch.equal(one, other)


def _givens(model: nn.Module) -> tuple[Given, ...]:
    if embedding_method(model) is None or not accepts(model.forward, "inputs_embeds"):
        return ("input_ids",)
    return ("input_ids", "inputs_embeds", "constant inputs_embeds")


def _plain(given: Given = "input_ids", *, recording: bool) -> Way:
    """Evaluation of each sequence alone."""
    return Way(layout="alone", given=given, training=False, recording=recording)


def _ways(layouts: Sequence[Layout], given: Given, modes: Sequence[bool]) -> Iterator[Way]:
    for layout, training, recording in itertools.product(layouts, modes, (False, True)):
        if recording or given != "constant inputs_embeds":  # under no_grad all embeddings are constants
            yield Way(layout=layout, given=given, training=training, recording=recording)


def _in_float64(
    runner: _Runner, layouts: Sequence[Layout], given: Given, sequences: Sequence[torch.Tensor], modes: Sequence[bool]
) -> Iterator[Way]:
    """Against evaluation of the same, for that embeddings do what tokens do is a law of its own.

    Gradients are against those of tokens, unless it is broken.
    """
    try:
        plain = runner.run(_plain(given, recording=False), sequences)
        guide = runner.run(_plain(recording=True), sequences)
        if any(difference > training_modes.SAME for difference in _differences(guide, plain)):
            guide = runner.run(_plain(given, recording=True), sequences)
    except Exception as error:
        if given == "input_ids":
            raise
        yield replace(_plain(given, recording=False), reason=low_precision.line(error))
        return
    for way in _ways(layouts, given, modes):
        if way == _plain(given, recording=False):
            continue
        try:
            found = runner.run(way, sequences)
        except Exception as error:  # noqa: BLE001 - a model may refuse what it cannot do, in any way
            yield replace(way, reason=low_precision.line(error))
            continue
        yield replace(
            way,
            difference=max(_differences(found, plain), key=_size),
            gradient=_worst(found, guide.gradients, {}, runner.trainable, 0),
        )


def _in_float32(
    runner: _Runner, layouts: Sequence[Layout], sequences: Sequence[torch.Tensor], modes: Sequence[bool]
) -> Iterator[Way]:
    """Against evaluation in float64, and how far rounding every operation of that to float32 moves it.

    A matrix product is one operation there and a sum of many in float32. Rounding after each of n additions makes
    sqrt(n) times the error of rounding once (Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error
    Analysis", https://doi.org/10.1137/18M1226312), and the noise is that of the longest sum there can be. What rounding
    may put on the other side of a kink is seen by turning it.
    """
    eps = torch.finfo(torch.float32).eps
    sizes = [size for parameter in runner.trainable.values() for size in coding.local(parameter).shape]
    additions = math.sqrt(max(*sizes, *map(len, sequences)))
    plain = _plain(recording=True)
    with SameChoices() as choices:
        exact = runner.run(plain, sequences)
        draws = []
        for draw in range(low_precision.DRAWS):
            choices.again()
            with low_precision.Rounded(draw, torch.float32):
                draws.append(runner.run(plain, sequences))
        noises = [
            additions * _root_mean_square([_differences(draw, exact)[part] for draw in draws])
            for part in range(len(exact.outputs))
        ]
        choices.again()
        with TurnedKinks(KINKS * additions * eps):
            turned = runner.run(plain, sequences).gradients
        noise = {
            name: additions
            * _root_mean_square([low_precision.distance(draw.gradients[name], gradient) for draw in draws])
            + low_precision.distance(turned[name], gradient)
            for name, gradient in exact.gradients.items()
        }
        tried = []
        for given in _givens(runner.model):
            choices.again()
            with contextlib.suppress(Exception):
                again = runner.run(_plain(given, recording=False), sequences)
                if all(difference <= training_modes.SAME for difference in _differences(again, exact)):
                    tried.append(given)

        def converted() -> Iterator[Way]:
            for given in tried:
                # A choice between near equals is made as in float64, which is possible in the same shapes only.
                for way in _ways(layouts[:1] if choices.made else layouts, given, modes):
                    choices.again()
                    try:
                        found = runner.run(way, sequences)
                    except Exception as error:
                        if way == replace(plain, recording=False):
                            raise
                        yield replace(way, reason=low_precision.line(error))
                        continue
                    difference, own = max(
                        zip(_differences(found, exact), noises, strict=True),
                        key=lambda both: _size(both[0] / (both[1] + eps)),
                    )
                    yield replace(
                        way,
                        difference=difference,
                        noise=own,
                        gradient=_worst(found, exact.gradients, noise, runner.trainable, eps),
                    )

        yield from low_precision.in_dtype(torch.float32, runner.model, lambda: list(converted()))


def _differences(found: _Found, exact: _Found) -> list[float]:
    """|found - exact| / |exact| of hidden states and of logits; what is equal, infinities too, does not count."""
    both = zip(found.outputs, exact.outputs, strict=True)
    return [
        float(torch.where(mine == right, 0.0, mine - right).norm()) / (float(right[right.isfinite()].norm()) or 1.0)
        for mine, right in both
    ]


def _worst(
    found: _Found,
    exact: Mapping[str, torch.Tensor | None],
    noise: Mapping[str, float],
    trainable: Mapping[str, nn.Parameter],
    eps: float,
) -> WorstGradient | None:
    """The gradient that is furthest off, by its size or, in low precision, by what rounding may change."""
    if not found.gradients or not exact:
        return None
    norms = {name: low_precision.distance(gradient, None) for name, gradient in exact.items()}
    largest = max(norms.values(), default=0.0)
    compared = [
        WorstGradient(
            parameter=name,
            error=low_precision.distance(found.gradients[name], exact[name]),
            norm=norms[name],
            largest=largest,
            noise=noise.get(name, 0.0),
        )
        for name, parameter in trainable.items()
        if not eps or coding.local(parameter).numel() >= FEW
    ]

    def badness(gradient: WorstGradient) -> float:
        if eps:
            return _size(gradient.error / (gradient.noise + eps * (gradient.norm + SMALL * largest) or 1.0))
        return _size(gradient.error / (gradient.norm + SMALL * largest or 1.0))

    return max(compared, key=badness, default=None)


def _root_mean_square(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())


def _size(value: float) -> float:
    """With NaN beyond anything."""
    return math.inf if math.isnan(value) else value
