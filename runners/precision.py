"""In which dtype every module computes, and how large the values are that it takes and gives."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from genmodel.modeling import _vllm
from genmodel.modeling.wrapper import CallableModelWrapper
from genmodel.runners import checkpoint, standalone, training_modes
from genmodel.runners.evidence import Precision
from genmodel.runners.modules import COMPUTE_LOGITS, tensors_in

TESTED = torch.bfloat16
CALLS = 4
"""Calls of a module that are looked at: prefill and some decoding."""
OPAQUE = {
    F.softmax,
    F.log_softmax,
    torch.softmax,
    torch.log_softmax,
    torch.Tensor.softmax,
    torch.Tensor.log_softmax,
    F.rms_norm,
    F.layer_norm,
    F.group_norm,
    F.scaled_dot_product_attention,
}
"""Functions that compute in float32 inside, whatever they are given and give."""


_unseen = torch._C.DisableTorchFunction  # noqa: SLF001 - no public name; entered, functions are not seen by any mode


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """Where a tensor came from."""

    call: object
    """The call of a module that computed it; None for parameters, buffers and what the model was given."""
    dtype: torch.dtype | None
    """What it takes to hold its values; None for what a submodule gave."""
    parents: tuple[_Made | None, ...]
    """What it was computed from; None for a tensor that nobody saw being made."""
    live: bool
    """Whether it depends on the embedded tokens. Tables of positions do not, nor do weights made of weights."""


class Seen:
    """What `watched` saw, by module in order of execution; "" is the model itself."""

    def __init__(self, kept: Iterable[torch.Tensor] = ()) -> None:
        self.dtypes: dict[str, str] = {}
        """The widest dtype of what a module gave, such as "bfloat16"."""
        self.inside: dict[str, str] = {}
        """The widest dtype of what it computes on the way to that, submodules apart; only if all of it can be seen."""
        self.largest: dict[str, float] = {}
        """The largest finite |value| that it was given or gave."""
        self.opaque: set[str] = set()
        """Modules that nobody can look into."""
        self._calls: Counter[str] = Counter()
        self._running: list[tuple[str, object]] = []
        self._made = WeakIdKeyDictionary()
        for tensor in kept:
            self._made[tensor] = _Made(None, None, (), live=False)

    def begin(self, name: str, arguments: Any) -> None:
        """A module is called."""
        outermost = name in ("", COMPUTE_LOGITS)
        if outermost:
            self._running.clear()
        for tensor in _floating(arguments):
            if outermost or tensor not in self._made:
                self._made[tensor] = _Made(None, None, (), live=outermost)
        self._running.append((name, object()))
        self._calls[name] += 1
        self._measure(name, arguments)

    def end(self, name: str, arguments: Any, output: Any) -> None:
        """A module gave something."""
        _, call = self._running.pop()
        found = self._measure(name, output)
        if self._calls[name] > CALLS:
            return
        _widen(self.dtypes, name, map(significant, found))
        self._look_inside(name, call, [self._made.get(tensor) for tensor in _floating(output)])
        around = self._running[-1][1] if self._running else None
        parents = tuple(self._made.get(tensor) for tensor in _floating(arguments))
        live = not parents or any(made is not None and made.live for made in parents)  # it was given tokens, or states
        for tensor in _floating(output):
            self._made[tensor] = _Made(around, None, parents, live)

    def computed(self, function: Any, arguments: Any, output: Any) -> None:
        """A function of torch was called."""
        if not self._running:
            return
        name, call = self._running[-1]
        given = [*_tensors(arguments)]
        rows = any(tensor.dtype in (torch.int32, torch.int64) for tensor in given)
        looked_up = rows and any(isinstance(tensor, nn.Parameter) for tensor in given)
        parents = tuple(self._made.get(tensor) for tensor in _floating(arguments))
        live = looked_up or any(made is not None and made.live for made in parents)
        if live and (function in OPAQUE or _namespace(function) not in ("", "aten")):
            self.opaque.add(name)
        written = arguments[:1] if function is torch.Tensor.__setitem__ else output
        for tensor in _floating(written):
            self._made[tensor] = _Made(call, significant(tensor) if live else None, parents, live)

    def _look_inside(self, name: str, call: object, given: Sequence[_Made | None]) -> None:
        """Keep the dtypes of all that this call computed on the way to what it gave."""
        todo, known = [*given], set[int]()
        while todo:
            made = todo.pop()
            if made is None:
                self.opaque.add(name)
            elif made.call is call and id(made) not in known:
                known.add(id(made))
                todo += made.parents
                if made.dtype is not None:
                    _widen(self.inside, name, [made.dtype])

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


class _Functions(TorchFunctionMode):
    """Entered around a model's forward: sees each function of torch that the model calls, and none that those call.

    What the model has compiled runs as it is written meanwhile: code compiled within a mode computes wrong numbers.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._calls = 0
        self._entered = contextlib.ExitStack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._seen.computed(func, [*args, *(kwargs or {}).values()], output)
        return output

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Be entered in the first calls of the model, whatever they raise."""
        return [
            model.register_forward_pre_hook(lambda *_: self.begin()),
            model.register_forward_hook(lambda *_: self.end(), always_call=True),
        ]

    def begin(self) -> None:
        """A call begins."""
        self._calls += 1
        if self._calls <= CALLS:
            self._entered.enter_context(torch.compiler.set_stance("force_eager"))
            self._entered.enter_context(self)

    def end(self) -> None:
        """It has ended."""
        self._entered.close()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (tensor for _, tensor in tensors_in([(None, values)]))


def _floating(values: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(values) if tensor.is_floating_point() or tensor.is_complex()]


def _namespace(function: Any) -> str:
    """Of an operator that is called by `torch.ops`; empty for all other functions."""
    name = getattr(function, "_qualified_op_name", None) or getattr(function, "name", str)()
    return str(name).partition("::")[0] if "::" in str(name) else ""


def _widen(dtypes: dict[str, str], name: str, found: Iterable[torch.dtype]) -> None:
    """Let the dtype under a name be as wide as the widest of some."""
    held = [*found, *([getattr(torch, dtypes[name])] if name in dtypes else [])]
    if held:
        dtypes[name] = str(max(held, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Seen]:
    """See what the modules of a model do, and its `compute_logits`.

    Args:
        model: the author's model, or vLLM's class around it.
    """
    inner: nn.Module = model.model if isinstance(model, CallableModelWrapper) else model
    seen = Seen([*inner.parameters(), *inner.buffers()])
    functions, in_logits = _Functions(seen), _Functions(seen)
    handles = []
    for name, module in inner.named_modules():
        if _is_opaque(module):
            seen.opaque.add(name)

        def before(_: nn.Module, arguments: Any, keywords: Any, name: str = name) -> None:
            with _unseen():
                seen.begin(name, [*arguments, *keywords.values()])

        def after(_: nn.Module, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
            with _unseen():
                seen.end(name, [*arguments, *keywords.values()], output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    handles += functions.watch(inner)
    compute = model.compute_logits

    def watched_logits(hidden: torch.Tensor, *arguments: Any) -> Any:
        seen.begin(COMPUTE_LOGITS, [hidden])
        in_logits.begin()
        try:
            logits = compute(hidden, *arguments)
        finally:
            in_logits.end()
        seen.end(COMPUTE_LOGITS, [hidden], logits)
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
    for name in seen.opaque:
        seen.inside.pop(name, None)


def _is_opaque(module: nn.Module) -> bool:
    """Whether a module is one of vLLM's, which compute outside the functions of torch."""
    return any(base.__module__.startswith("vllm.") for base in type(module).__mro__)


def significant(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that it takes to hold the values: a float32 copy of what was computed in bfloat16 is bfloat16."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
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
        inside=rounded.inside,
        largest=largest,
        declared=declared,
    )
