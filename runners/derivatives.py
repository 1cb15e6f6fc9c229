"""Derivatives by differences, along directions in which an error of the analytic ones shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

STEPS = (1e-6, 1e-7, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Lengths of the steps along a direction of length one. If the first finds a kink nearby, the next ones keep clear of
it: wide steps across one kink agree with each other, and are wrong together."""


def direction(shape: torch.Size, guides: Iterable[torch.Tensor | None], generator: torch.Generator) -> torch.Tensor:
    """A float64 direction of length one: half random, half that of the guides, all of them gradients of `shape`.

    A derivative along it is neither lost in rounding nor blind to what a gradient misses. The random part is turned so
    that it never points against the guides: of a single element it is a sign, and could take all of them away.
    """
    found = torch.zeros(shape, dtype=torch.float64)
    for guide in guides:
        length = 0.0 if guide is None else float(guide.norm())
        if guide is not None and 0 < length < torch.inf:
            found += _onto(guide / length, found)
    while not float((random := torch.randn(shape, generator=generator, dtype=torch.float64)).norm()):
        continue
    if float(found.norm()):
        found /= found.norm()
    found += _onto(random / random.norm(), found)
    found /= found.norm()
    return found


def _onto(part: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The part, or what is opposite to it if it would shorten what there is."""
    return -part if float((part * found).sum()) < 0 else part


def by_differences(at: Callable[[float], float], value: float) -> tuple[float, float]:
    """The derivative at 0 of `at`, which is `value` there, and how far rounding and truncation may move it.

    Central differences D at h, 2h and 4h tell their own error: they agree where the function is smooth and exact
    enough, and not where rounding dominates (a model that computes parts of itself in float32 needs wide steps) or a
    kink is near (relu needs narrow ones). The step whose three agree best is used, with Richardson's
    (4 D(h) - D(2h)) / 3.
    """

    def central(step: float) -> float:
        return (at(step) - at(-step)) / (2 * step)

    best = (float("nan"), float("inf"))
    for h in STEPS:
        narrow, middle, wide = central(h), central(2 * h), central(4 * h)
        numeric = (4 * narrow - middle) / 3
        rounding = 8 * torch.finfo(torch.float64).eps * max(1.0, abs(value)) / h
        noise = max(abs(narrow - middle), abs(middle - wide)) + rounding
        if noise < best[1]:
            best = (numeric, noise)
        if noise < 1e-6 * abs(numeric):
            break
    return best
