"""Run a model in training mode so that every pass is the same one: random numbers, buffers and dropout held fixed."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from genmodel.runners import coding, derivatives
from genmodel.runners.evidence import Derivative, TrainingMode

GROUP = 16
"""Parameters to a direction: a derivative along all of a large model's would drown the error of one of them."""
LEAST = 1e-3
"""Share of the largest gradient below which a parameter gets no longer step, however small its own is."""
SAME = 1e-9
"""Relative difference between two passes that are the same: far more than rounding, and less than a dropout mask."""


def seed(number: int) -> None:
    """Of every generator that dropout may draw from: torch's, Python's and numpy's."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - what models draw from without a generator of their own


@contextlib.contextmanager
def passes(model: nn.Module) -> Iterator[Callable[[bool, int], None]]:
    """Yields `begin(training, seed)`, to call before each pass; the model's mode and all state end as they began.

    Training mode may change buffers (running means, the loads of experts), and each pass begins with the same ones.
    """
    # By module and name, for a conversion to another dtype makes new buffers.
    buffers = {
        (module, name): coding.local(buffer).clone()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    }
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - as in `seed`

    def restore() -> None:
        for (module, name), value in buffers.items():
            held = coding.local(getattr(module, name))
            # Backward refuses what was written to since, even if it is the same.
            if not torch.equal(held, value.to(held.dtype)):
                held.copy_(value)

    def begin(training: bool, number: int) -> None:
        restore()
        model.train(training)
        seed(number)

    with torch.random.fork_rng(devices=[]):
        try:
            yield begin
        finally:
            restore()
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002 - as in `seed`
            for module, training in modes.items():
                module.training = training


class NoDropout(TorchFunctionMode):
    """Entered around a pass: no dropout of torch's drops anything, whatever its rate."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        if func is F.scaled_dot_product_attention and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        if name.rstrip("_").endswith("dropout") or name.startswith("dropout"):
            if len(args) > 1:
                args = (args[0], 0.0, *args[2:])
            else:
                kwargs["p"] = 0.0
        return func(*args, **kwargs)


def backward(value: torch.Tensor) -> None:
    """`value.backward()` in which modes entered around it are active.

    A tensor's backward is handed to them as a call like any other, and while a mode handles one it is off: reentrant
    checkpointing would compute its activations without it. That of an edge of the graph is not.
    """
    torch.autograd.backward(get_gradient_edge(value), torch.ones_like(value))


def gradients_of(
    loss: Callable[[], torch.Tensor], trainable: Mapping[str, nn.Parameter]
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """The loss and its gradients by backward, None where it leaves none."""
    for parameter in trainable.values():
        parameter.grad = None
    value = loss()
    if value.requires_grad:
        backward(value)
    found = {name: None if p.grad is None else coding.local(p.grad).clone() for name, p in trainable.items()}
    for parameter in trainable.values():
        parameter.grad = None
    return float(value.detach()), found


def measure(
    loss: Callable[[], torch.Tensor],
    trainable: Mapping[str, nn.Parameter],
    guides: Mapping[str, torch.Tensor | None],
    lengths: tuple[int, ...],
    generator: torch.Generator,
) -> TrainingMode:
    """Analytic against numeric derivatives of a loss, along directions through a group of parameters each.

    Args:
        loss: one pass, the same each time.
        trainable: the parameters.
        guides: gradients that those of `loss` should resemble, for what is missing of these shows best along them.
        lengths: tokens of the sequences.
        generator: of the directions.
    """
    with torch.no_grad():
        plain, again = float(loss()), float(loss())
    if not abs(plain - again) <= SAME * max(1.0, abs(plain)):
        return TrainingMode(
            reason=f"two passes in training mode under one seed differ, {plain:.8g} and {again:.8g}: "
            "they draw from a generator that is none of torch's, Python's or numpy's"
        )
    value, found = gradients_of(loss, trainable)
    largest = max((_length(g) for g in (*found.values(), *guides.values())), default=0.0)

    def moved() -> torch.Tensor:
        with elsewhere(trainable.values()):
            return loss()

    names = list(trainable)
    groups = -(-len(names) // GROUP)
    made = []
    for group in (names[start::groups] for start in range(groups)):
        along = {}
        for name in group:
            both = (guides.get(name), found[name])
            own = derivatives.direction(coding.local(trainable[name]).shape, both, generator)
            # With steps of these lengths each parameter has about the same share in the derivative.
            along[name] = own / max(*map(_length, both), LEAST * largest, _TINY)
        made.append(_along(moved, {name: trainable[name] for name in group}, found, along, value))
    return TrainingMode(derivatives=tuple(made), lengths=lengths, loss=value, recording_difference=abs(value - plain))


@contextlib.contextmanager
def elsewhere(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Around passes of a model whose parameters were moved by hand, and not by loading weights.

    A model may keep what it derived from them, such as a folded matrix, until weights are loaded or gradients are
    asked for. So autograd is on, as in training, where parameters move; it finds nothing to record.
    """
    required = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reentrant checkpointing, that nothing requires a gradient
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


_TINY = 1e-30  # so that nothing is divided by zero where there is no gradient at all


def _length(gradient: torch.Tensor | None) -> float:
    """Of a gradient, if it has one."""
    length = 0.0 if gradient is None else float(gradient.norm())
    return length if length < torch.inf else 0.0


@torch.no_grad()
def _along(
    loss: Callable[[], torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor | None],
    along: Mapping[str, torch.Tensor],
    value: float,
) -> Derivative:
    whole = torch.stack([step.norm() for step in along.values()]).norm()
    steps = {name: step / whole for name, step in along.items()}
    originals = {name: coding.local(p).clone() for name, p in parameters.items()}
    analytic = 0.0
    for name, step in steps.items():
        gradient = gradients[name]
        analytic += 0.0 if gradient is None else float((gradient * step).sum())

    def move(by: float) -> None:
        for name, parameter in parameters.items():
            coding.local(parameter).copy_(originals[name] + by * steps[name])

    def at(by: float) -> float:
        move(by)
        return float(loss())

    numeric, noise = derivatives.by_differences(at, value)
    for name, parameter in parameters.items():
        coding.local(parameter).copy_(originals[name])
    return Derivative(analytic=analytic, numeric=numeric, noise=noise, parameters=len(parameters))
