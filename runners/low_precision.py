"""Gradients in bfloat16 and under autocast against those in float64, and how far rounding alone moves them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from genmodel.runners import coding, training_modes
from genmodel.runners.choices import SameChoices
from genmodel.runners.evidence import LowPrecision, RoundedGradient

T = TypeVar("T")

DRAWS = 3
"""Runs with random rounding, whose root mean square is the noise."""


class Rounded(TorchFunctionMode):
    """Entered around forward and backward: what each operation gives, and its gradient, is rounded, to bfloat16 say.

    The dtype stays what it is, so that code which looks at dtypes takes no other path. Rounding is stochastic, up or
    down by chance, which has twice the variance of rounding to nearest and as many draws as one likes. To bfloat16 only
    what depends on parameters is rounded: tables and masks are computed as they are in any dtype. To float32 tables are
    too, to nearest: many a model makes them of float32 numbers, and their errors count beside those of all else.
    """

    def __init__(self, number: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(number)
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            return self._rounded(out)
        if type(out) in (tuple, list):  # not a named tuple, such as topk's
            return type(out)(self._rounded(part) for part in out)
        return out

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return value
        if not value.is_floating_point():
            return value
        if value.requires_grad and not value.is_leaf:
            return _Round.apply(value, self._generator, self._dtype)  # type: ignore[no-untyped-call]
        if self._dtype == torch.float32 and not value.requires_grad and value._base is None:  # noqa: SLF001 - documented
            return value.to(torch.float32).to(value.dtype)  # what a view shows is rounded already, or written later
        return value


class _Round(torch.autograd.Function):
    """Rounds on the way there and on the way back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        ctx.generator, ctx.dtype = generator, dtype
        return stochastically(value, generator, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return stochastically(gradient, ctx.generator, ctx.dtype), None, None


def stochastically(
    value: torch.Tensor, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The value, in its own dtype, rounded to a neighbour in bfloat16 or float32, each as likely as it is near."""
    if isinstance(value, DTensor):
        held = stochastically(value.to_local(), generator, dtype)
        return DTensor.from_local(
            held, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    if dtype == torch.float32:  # which has 29 bits less than float64
        wide = value.to(torch.float64).view(torch.int64)
        chances = torch.randint(1 << 29, value.shape, generator=generator, dtype=torch.int64)
        return ((wide + chances) & -(1 << 29)).view(torch.float64).to(value.dtype)
    bits = value.to(torch.float32).view(torch.int32)  # bfloat16 is the upper half of float32
    chance = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32)
    return ((bits + chance) & -(1 << 16)).view(torch.float32).to(value.dtype)


def measure(
    model: nn.Module, loss: Callable[[], torch.Tensor], trainable: Mapping[str, nn.Parameter], *, training: bool
) -> dict[str, LowPrecision]:
    """By name of the mode, "bfloat16" and "autocast"; the weights of the float64 model end as they began.

    Args:
        model: in float64.
        loss: one pass.
        trainable: its parameters.
        training: whether in training mode, with no dropout.
    """

    def run(forward: Callable[[], torch.Tensor] = loss) -> dict[str, torch.Tensor | None]:
        begin(training, 0)
        with training_modes.NoDropout():
            return training_modes.gradients_of(forward, trainable)[1]

    def under_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    with weights_in(torch.bfloat16, model), training_modes.passes(model) as begin, SameChoices() as choices:
        exact = run()
        variance = dict.fromkeys(trainable, 0.0)
        try:
            for draw in range(DRAWS):
                choices.again()
                with Rounded(draw):
                    moved = run()
                for name in trainable:
                    variance[name] += distance(moved[name], exact[name]) ** 2 / DRAWS
        except Exception as error:  # noqa: BLE001 - a model may be made of what cannot be watched
            reason = f"the noise of rounding could not be measured: {line(error)}"
            return {mode: LowPrecision(reason=reason) for mode in ("bfloat16", "autocast")}
        found = {}
        for mode, dtype, forward in (("bfloat16", torch.bfloat16, loss), ("autocast", torch.float32, under_autocast)):
            choices.again()
            try:
                low = in_dtype(dtype, model, lambda forward=forward: run(forward))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - built for float64, it need not run in anything else
                found[mode] = LowPrecision(reason=f"the model, built in float64, does not run so: {line(error)}")
                continue
            found[mode] = LowPrecision(
                parameters={
                    name: RoundedGradient(
                        norm=distance(exact[name], None),
                        error=distance(low[name], exact[name]) if distance(low[name], None) else None,
                        noise=math.sqrt(variance[name]),
                        elements=coding.local(parameter).numel(),
                    )
                    for name, parameter in trainable.items()
                }
            )
    return found


def in_dtype(dtype: torch.dtype, model: nn.Module, run: Callable[[], T]) -> T:
    """Run the float64 model in another dtype, which its weights have to be exact in."""
    try:
        model.to(dtype)
        return run()
    finally:
        model.to(torch.float64)


@contextlib.contextmanager
def weights_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Round parameters and buffers to what a dtype has, in float64, for a while."""
    state = {
        (module, name): coding.local(tensor).clone()
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    try:
        model.to(dtype).to(torch.float64)
        yield
    finally:
        model.to(torch.float64)
        with torch.no_grad():
            for (module, name), value in state.items():
                coding.local(getattr(module, name)).copy_(value)


def distance(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    """Between two gradients, of which one that is missing is zero."""
    if one is None or other is None:
        return max((float(gradient.double().norm()) for gradient in (one, other) if gradient is not None), default=0.0)
    return float((one.double() - other.double()).norm())


def line(error: Exception) -> str:
    """What was raised, in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
