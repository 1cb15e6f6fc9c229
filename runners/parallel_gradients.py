"""Train the model standalone on several ranks, and keep every rank's gradients with where they belong."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from genmodel.modeling import _vllm
from genmodel.modeling.loading import load_weights
from genmodel.modeling.parallel_context import ParallelContext
from genmodel.runners import checkpoint, coding, gradients, standalone, training_modes
from genmodel.runners.evidence import CodedTensor, RankGradients


def measure(
    target: Any,
    directory: str,
    codes: Mapping[str, CodedTensor],
    *,
    tensor_parallel_size: int,
    rank: int,
    rendezvous: str,
    seed: int,
) -> RankGradients:
    """Loss and gradients of one rank in float64, of the loss that `gradients.measure` takes at TP=1.

    Args:
        target: the factory or class.
        directory: its checkpoint.
        codes: of every checkpoint tensor.
        tensor_parallel_size: number of ranks, of which each has to call this.
        rank: this one.
        rendezvous: URL at which the ranks meet; not used at size 1.
        seed: of the training batch.
    """
    config = _vllm.model_config(directory, "float32")
    with contextlib.ExitStack() as group:
        context = None
        if tensor_parallel_size > 1:
            group.enter_context(_vllm.world(config, rank, tensor_parallel_size, rendezvous))
            context = ParallelContext.from_group(_vllm.parallel_group("tp")[2])
        with standalone.build(target, config, torch.float64, context) as built:
            weights = checkpoint.read_weights(Path(directory))
            trainable = {name: p for name, p in built.model.named_parameters() if p.requires_grad}
            held = _codes(built.model, trainable, weights, codes)
            _load(built.model, weights)
            batch = gradients.training_batch(built, torch.Generator().manual_seed(seed))
            loss = gradients.training_loss(built, batch)
            if loss.requires_grad:
                loss.backward()
            trained, undropped = _training_states(built, batch[0], seed)
            return RankGradients(
                tensor_parallel_size=tensor_parallel_size,
                rank=rank,
                loss=float(loss.detach()),
                codes=held,
                gradients={name: _gradient(p) for name, p in trainable.items()},
                trained=trained,
                undropped=undropped,
            )


@torch.no_grad()
def _training_states(
    built: standalone.Standalone, tokens: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`RankGradients.trained` and `undropped`."""
    with training_modes.passes(built.model) as begin:

        def run(number: int) -> torch.Tensor:
            begin(True, number)
            states = built.hidden(tokens)
            return (states.full_tensor() if isinstance(states, DTensor) else states).clone()

        trained = run(seed)
        with training_modes.NoDropout():
            one, other = run(seed), run(seed + 1)
    still_random = bool((one - other).abs().max() > training_modes.SAME * one.abs().max())
    return trained, None if still_random else one


def _codes(
    model: nn.Module,
    trainable: Mapping[str, nn.Parameter],
    weights: Mapping[str, torch.Tensor],
    codes: Mapping[str, CodedTensor],
) -> dict[str, torch.Tensor]:
    """What belongs where; parameters that loading does not reach end as they began."""
    before = {name: coding.local(p).clone() for name, p in trainable.items()}
    held = []
    for digit in coding.digits(codes):
        coding.poison(trainable.values())
        _load(model, dict(coding.recoded(weights.items(), codes, digit)))
        held.append(coding.decoded(trainable))
    for name, parameter in trainable.items():
        coding.local(parameter).copy_(before[name])
    return coding.joined(held)


def _load(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """By the model's own `load_weights`, which knows how it is sharded, else as its parameters declare."""
    own = getattr(model, "load_weights", None)
    if callable(own):
        own(iter(weights.items()))
    else:
        load_weights(model, weights.items())


def _gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """Of the elements this rank holds."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return coding.local(gradient).clone()
