"""Load the coded checkpoint into a poisoned model in vLLM's own worker, and see what is where."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from genmodel.modeling import _vllm
from genmodel.modeling.loading import loadable
from genmodel.modeling.wrapper import CallableModelWrapper
from genmodel.runners import coding
from genmodel.runners.evidence import (
    CodedTensor,
    LoadProbes,
    Misfit,
    Omission,
    Reload,
    WeightAudit,
    kind,
)
from genmodel.runners.inspection import attention_layers, same

Tensors = Iterator[tuple[str, torch.Tensor]]
Change = Callable[[Tensors], Tensors]
Order = Callable[[list[str]], list[str]]
Remade = Callable[[torch.Tensor], torch.Tensor]

KINDS = 32
"""Most kinds of tensors that are left out of the checkpoint, or do not fit, in turn."""
TRANSPOSED = "transposed"
RESHAPED = "of the same elements in twice as many rows"


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


def _shuffled(names: list[str]) -> list[str]:
    return random.Random(0).sample(names, len(names))


ORDERS: Mapping[str, Order | None] = {"as before": None, "reversed": lambda names: names[::-1], "shuffled": _shuffled}
"""Reversed, parts of a fused tensor come the other way round; shuffled, those of one layer come far apart."""


def audit(
    directory: str,
    codes: Mapping[str, CodedTensor],
    *,
    tensor_parallel_size: int,
    rank: int,
    probe: bool,
    meet: Callable[[int], None] = lambda _: None,
) -> WeightAudit:
    """What this rank holds of a checkpoint.

    For every digit of the codes a model is built and loaded, so that no model has to be loaded twice.

    Args:
        directory: the checkpoint; its tensors are read, and replaced by codes on their way to the model.
        codes: of every tensor.
        tensor_parallel_size: number of ranks, of which each has to call this.
        rank: this one.
        probe: also try checkpoints that do not fit.
        meet: called with each digit before its model is built, for the ranks to meet anew.

    Raises:
        Exception: whatever building the model or loading the right checkpoint raises.
    """
    seen: list[WeightAudit] = []
    held: list[dict[str, torch.Tensor]] = []
    digits = coding.digits(codes)

    def watch(model: nn.Module, load: _vllm.Load) -> None:
        loading = _Loading(model, load, codes)
        held.append(loading.held(digits[len(held)]))
        if len(held) < len(digits):
            return
        found = WeightAudit(
            tensor_parallel_size=tensor_parallel_size,
            rank=rank,
            world_size=0,
            codes=coding.joined(held),
            tied=_sharing(loading.parameters),
            attention=tuple(attention_layers(loading.model)),
            probes=None,
            reloads=tuple(_reload(loading, held[0])),
            buffers=tuple(name for name in held[0] if name in loading.buffers),
            changed_arguments=_changed_arguments(loading),
        )
        seen.append(replace(found, probes=_probe(loading, found, held[0])) if probe else found)

    world = 0
    for digit in digits:
        meet(digit)
        world = _vllm.load_in_worker(directory, watch, tensor_parallel_size=tensor_parallel_size, dtype="float32")
    return replace(seen[0], world_size=world)


class _Loading:
    """A built model that can be loaded again and again, each time from poison."""

    def __init__(self, model: nn.Module, load: _vllm.Load, codes: Mapping[str, CodedTensor]) -> None:
        wrapped = isinstance(model, CallableModelWrapper)
        self.model: nn.Module = model.model if isinstance(model, CallableModelWrapper) else model
        self.parameters, self.buffers = loadable(self.model)
        self.codes = codes
        self.unguarded = {name.removeprefix("model.") if wrapped else name for name in _vllm.unguarded(model)}
        self._load = load

    def held(self, digit: int = 0) -> dict[str, torch.Tensor]:
        """Load a digit, and what is then in every parameter, and in the buffers that loading is to change or did."""
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}
        self.load_codes(digit=digit)
        changed = {name: now for name, now in self.buffers.items() if not torch.equal(now, before[name])}
        return coding.decoded({**self.parameters, **changed})

    def load_codes(self, change: Change = _unchanged, order: Order | None = None, digit: int = 0) -> None:
        """Load a digit of the coded checkpoint, in another order or changed; raises what loading raises."""
        self.load(lambda tensors: change(coding.recoded(tensors, self.codes, digit, order)))

    def load(self, change: Change) -> None:
        """Load the checkpoint as it is but for the change, which is quicker; raises what loading raises."""
        named = [buffer for name, buffer in self.buffers.items() if name in self.codes]
        coding.poison([*self.parameters.values(), *named])
        self._load(change)

    def untouched(self) -> tuple[str, ...]:
        """Parameters that nothing was loaded into."""
        return tuple(name for name, p in self.parameters.items() if p.numel() and bool(coding.local(p).isnan().all()))

    def everything(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers."""
        return {**self.parameters, **self.buffers}

    def different(self, lowest: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """What holds other elements than after the first load, by the lowest digit."""
        now = self.everything()
        return tuple(name for name, codes in lowest.items() if not torch.equal(coding.decode(now[name]), codes))


def _refusal(load: Callable[[], None]) -> str | None:
    """What loading raised, in one line; None if nothing."""
    try:
        load()
    except Exception as error:  # noqa: BLE001 - to refuse is to raise, whatever it is
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
    return None


def _changed_arguments(loading: _Loading) -> tuple[str, ...]:
    """Tensors of the checkpoint that loading it changes, whenever it does: a loader may keep some until the last.

    Of the real values, for codes are large and positive: `abs_` and `clamp_` would leave them as they are.
    """
    given: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            given.append((name, tensor, tensor.clone()))
            yield name, tensor

    _refusal(lambda: loading.load(keep))  # one that cannot be loaded twice changed what it changed
    return tuple(name for name, tensor, before in given if not same(tensor, before))


def _reload(loading: _Loading, lowest: Mapping[str, torch.Tensor]) -> Iterator[Reload]:
    """Load the same checkpoint again, and with its tensors in other orders, as other files have them."""
    for name, order in ORDERS.items():
        refused = _refusal(lambda order=order: loading.load_codes(order=order))  # type: ignore[misc]
        different = loading.different(lowest) if refused is None else ()
        yield Reload(order=name, refused=refused, different=different)
        if order is None and refused is not None:
            return


def _probe(loading: _Loading, found: WeightAudit, lowest: Mapping[str, torch.Tensor]) -> LoadProbes:
    """Load checkpoints that have a tensor too many, one too few, or one that does not fit."""
    if (trouble := found.reloads[0].refused) is not None:
        return LoadProbes(unrepeatable=trouble)
    unknown, tensor = _unknown(loading.codes)

    def one_more(tensors: Tensors) -> Tensors:
        yield from tensors
        yield unknown, tensor

    refused = _refusal(lambda: loading.load(one_more))
    exempt = _exempt(loading, found.codes)
    kinds = _one_of_each_kind(loading.codes)
    omissions = []
    for name in kinds[:KINDS]:
        raised = _refusal(lambda name=name: loading.load(_without(name)))  # type: ignore[misc]
        left = loading.untouched() if raised is None else ()
        omissions.append(Omission(tensor=name, refused=raised, left=left, exempt=name in exempt))
    return LoadProbes(
        unrepeatable="",
        unknown=unknown,
        unknown_refused=refused,
        omissions=tuple(omissions),
        misfits=tuple(
            misfit for name in kinds[:KINDS] if name not in exempt for misfit in _misfits(loading, name, lowest)
        ),
        integers=tuple(_inert(loading)),
        untried=max(0, len(kinds) - KINDS),
    )


def _misfits(loading: _Loading, name: str, lowest: Mapping[str, torch.Tensor]) -> Iterator[Misfit]:
    for misfit, remade in _ill_fitting(name, loading.codes[name].shape):
        made = _with(name, remade)
        refused = _refusal(lambda made=made: loading.load(made))  # type: ignore[misc]
        if refused is None and misfit.change in (TRANSPOSED, RESHAPED):
            loading.load_codes(made)
            if not loading.different(lowest):
                continue  # a loader that finds out how a matrix is stored, and reads it as it is, has understood
        yield replace(misfit, refused=refused)


def _ill_fitting(name: str, shape: tuple[int, ...]) -> Iterator[tuple[Misfit, Remade]]:
    """Tensors that a model has no room for, and how each is made of the right one."""
    if not math.prod(shape):
        return
    found = Misfit(tensor=name, change="", refused=None)
    if not shape:
        yield replace(found, change="of two elements"), lambda tensor: torch.stack([tensor, tensor])
    for dim, size in enumerate(shape):
        yield replace(found, change=f"one longer along dimension {dim}", dimension=dim), _lengthened(dim)
        if size > 2:
            yield replace(found, change=f"one shorter along dimension {dim}"), _cut(dim, size - 1)
        if size > 1:
            yield replace(found, change=f"of one element along dimension {dim}", converts=True), _cut(dim, 1)
    if len(shape) == 2 and shape[0] != shape[1]:
        yield replace(found, change=TRANSPOSED), lambda tensor: tensor.T.contiguous()
    if len(shape) == 2 and shape[1] % 2 == 0 and shape[0] * 2 != shape[1]:
        yield replace(found, change=RESHAPED), lambda tensor: tensor.reshape(2 * shape[0], -1)
    yield replace(found, change="of integers", converts=True), lambda tensor: tensor.to(torch.int64)


def _lengthened(dim: int) -> Remade:
    return lambda tensor: torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)


def _cut(dim: int, size: int) -> Remade:
    return lambda tensor: tensor.narrow(dim, 0, size).contiguous()


def _inert(loading: _Loading) -> Iterator[str]:
    """Kinds of integer tensors whose values make no difference to what the model holds afterwards."""
    integers: list[str] = []

    def look(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
                integers.append(name)
            yield name, tensor

    loading.load(look)
    for name in _one_of_each_kind(integers)[:KINDS]:
        loading.load(_unchanged)
        before = {key: coding.local(value).clone() for key, value in loading.everything().items()}
        refused = _refusal(lambda name=name: loading.load(_with(name, _other_integers)))  # type: ignore[misc]
        if refused is None and all(
            torch.equal(coding.local(value).nan_to_num(), before[key].nan_to_num())
            for key, value in loading.everything().items()
        ):
            yield name


def _other_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Every value another one that the dtype has."""
    return tensor.logical_not() if tensor.dtype == torch.bool else 1 - tensor


def _with(name: str, remade: Remade) -> Change:
    return lambda tensors: ((key, remade(tensor) if key == name else tensor) for key, tensor in tensors)


def _without(name: str) -> Change:
    return lambda tensors: (pair for pair in tensors if pair[0] != name)


def _unknown(codes: Mapping[str, CodedTensor]) -> tuple[str, torch.Tensor]:
    """A tensor whose name is like that of a real one, as deep inside the model as there is one, and is not one."""
    like = max(codes, key=lambda name: name.count("."))
    *parents, _, leaf = ["", "", *like.split(".")]
    return ".".join([*filter(None, parents), "genmodel_unknown", leaf]), coding.values(codes[like])


def _one_of_each_kind(names: Iterable[str]) -> list[str]:
    """The first of all names that differ in a number only, such as a layer's."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(kind(name), name)
    return list(kinds.values())


def _exempt(loading: _Loading, held: Mapping[str, torch.Tensor]) -> set[str]:
    """Checkpoint tensors that vLLM's guard does not miss: what its own layers hold."""
    unguarded = {code for name in loading.unguarded & held.keys() for code in held[name].unique().tolist()}
    return {name for name, tensor in loading.codes.items() if tensor.first_code in unguarded}


def _sharing(parameters: Mapping[str, nn.Parameter]) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose values lie in the same memory."""
    places: dict[tuple[int, int], list[str]] = {}
    for name, parameter in parameters.items():
        held = coding.local(parameter)
        if held.numel():
            places.setdefault((held.data_ptr(), held.numel()), []).append(name)
    return tuple(tuple(names) for names in places.values() if len(names) > 1)
