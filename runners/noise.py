"""How far rounding to the tested dtype moves a number of the reference, wherever it is computed.

One run in the tested dtype is one draw of that, and may by luck be small where the model is sensitive; an engine, which
adds up in another order, then looks wrong. So the reference runs again in the higher precision with every weight moved
by up to half a unit in the last place of the tested dtype. How far that moves a number tells how sensitive the number
is. It does not tell how large rounding is, which depends on how many numbers are added up: over all positions together,
the run in the tested dtype does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from genmodel.runners import coding

DRAWS = 2
"""Runs with weights moved."""


def sizes(errors: Sequence[torch.Tensor], draws: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The size of rounding for every number of every tensor, float64 of the same shape.

    Args:
        errors: how far each number is off in the tested dtype, absolute; the last dimension is the position. The scale
            is common to all positions of all tensors, and separate along the other dimensions.
        draws: how far each moves in every run with weights moved, in the same shapes; none for the errors themselves.

    Returns:
        The error itself, or the root mean square of the draws in the errors' scale, whichever is larger.
    """
    if not draws or not errors:
        return [error.double() for error in errors]
    typical = [torch.stack([*moved]).double().square().mean(0).sqrt() for moved in zip(*draws, strict=True)]
    scale = (_median(errors) / _median(typical)).nan_to_num(0.0, 0.0, 0.0)
    return [error.double().maximum(scale * size) for error, size in zip(errors, typical, strict=True)]


def _median(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Over all positions, with a dimension of one in their place."""
    joined = torch.cat([part.double() for part in parts], -1)
    return joined.nanmedian(-1, keepdim=True).values if joined.shape[-1] else joined.new_zeros(*joined.shape[:-1], 1)


@contextlib.contextmanager
def moved_weights(model: nn.Module, draw: int, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every parameter is moved by up to half a unit in the last place of `dtype`; then it is what it was.

    In place, so that whatever shares a parameter's memory is moved with it, and no code of the author's runs.
    """
    generator = torch.Generator().manual_seed(draw)
    half = torch.finfo(dtype).eps / 2
    parameters = [coding.local(parameter.detach()) for parameter in model.parameters() if parameter.is_floating_point()]
    kept = [parameter.clone() for parameter in parameters]
    try:
        for parameter in parameters:
            step = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
            parameter.mul_(1 + half * step)
        yield
    finally:
        for parameter, was in zip(parameters, kept, strict=True):
            parameter.copy_(was)
