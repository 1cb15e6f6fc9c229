"""In which dtype every module computes, and how large the values are that it takes and gives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genmodel.modeling import _vllm
from genmodel.modeling.wrapper import CallableModelWrapper
from genmodel.runners import checkpoint, standalone, training_modes
from genmodel.runners.evidence import Precision
from genmodel.runners.modules import COMPUTE_LOGITS, tensors_in

TESTED = torch.bfloat16
CALLS = 4
"""Calls of a module that are looked at: prefill and some decoding."""


class Seen:
    """What `watched` saw, by module in order of execution; "" is the model itself."""

    def __init__(self) -> None:
        self.dtypes: dict[str, str] = {}
        """The widest dtype of what a module gave, such as "bfloat16"."""
        self.largest: dict[str, float] = {}
        """The largest finite |value| that it was given or gave."""
        self._calls: Counter[str] = Counter()

    def begin(self, name: str, arguments: Any) -> None:
        """A module is called."""
        self._calls[name] += 1
        self._measure(name, arguments)

    def end(self, name: str, output: Any) -> None:
        """A module gave something."""
        found = self._measure(name, output)
        if self._calls[name] <= CALLS:
            held = [*map(significant, found), *([getattr(torch, self.dtypes[name])] if name in self.dtypes else [])]
            if held:
                self.dtypes[name] = str(max(held, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")

    def _measure(self, name: str, values: Any) -> list[torch.Tensor]:
        if self._calls[name] > CALLS:
            return []
        found = [t.detach() for _, t in tensors_in([(None, values)]) if t.is_floating_point() and t.numel()]
        for tensor in found:
            usual = tensor.abs()
            usual = usual[usual < torch.finfo(tensor.dtype).max]  # beyond any value: masks
            if usual.numel():
                self.largest[name] = max(self.largest.get(name, 0.0), float(usual.max()))
        return found


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Seen]:
    """See what the modules of a model do, and its `compute_logits`.

    Args:
        model: the author's model, or vLLM's class around it.
    """
    inner: nn.Module = model.model if isinstance(model, CallableModelWrapper) else model
    seen = Seen()
    handles = []
    for name, module in inner.named_modules():

        def before(_: nn.Module, arguments: Any, keywords: Any, name: str = name) -> None:
            seen.begin(name, [*arguments, *keywords.values()])

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            seen.end(name, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    compute = model.compute_logits

    def watched_logits(hidden: torch.Tensor, *arguments: Any) -> Any:
        seen.begin(COMPUTE_LOGITS, [hidden])
        logits = compute(hidden, *arguments)
        seen.end(COMPUTE_LOGITS, logits)
        return logits

    own = vars(model).get("compute_logits")
    model.compute_logits = watched_logits
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if own is None:
            del model.compute_logits
        else:
            model.compute_logits = own


def significant(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that it takes to hold the values: a float32 copy of what was computed in bfloat16 is bfloat16."""
    if tensor.dtype.itemsize > TESTED.itemsize and torch.equal(tensor.to(TESTED).to(tensor.dtype), tensor):
        return TESTED
    return tensor.dtype


def measure(target: Any, directory: str, prompts: Sequence[tuple[int, ...]], declared: str | None) -> Precision:
    """Run a target outside any engine: trained as it is built for bfloat16, and in float32 for the size of its values.

    Training is training mode while autograd records, without dropout: a model may ask for either.

    Args:
        target: the factory or class.
        directory: of the checkpoint.
        prompts: token sequences.
        declared: the dtype that the model's config names.
    """
    config = _vllm.model_config(directory, "float32")
    weights = checkpoint.read_weights(Path(directory))
    with standalone.build(target, config, TESTED, cast=False) as built:
        standalone.load(built, weights)
        with training_modes.passes(built.model) as begin, training_modes.NoDropout(), watched(built.model) as rounded:
            for prompt in prompts[:CALLS]:
                begin(True, 0)
                built.logits(torch.tensor(prompt))
    with standalone.build(target, config, torch.float32) as built, torch.no_grad():
        standalone.load(built, weights)
        largest: dict[str, float] = {}
        for prompt in prompts:
            with watched(built.model) as exact:
                built.logits(torch.tensor(prompt))
            largest = {name: max(value, largest.get(name, 0.0)) for name, value in exact.largest.items()}
    return Precision(
        dtype=str(TESTED).removeprefix("torch."),
        modules=rounded.dtypes,
        largest=largest,
        declared=declared,
    )
