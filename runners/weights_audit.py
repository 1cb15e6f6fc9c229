"""Load the coded checkpoint into a poisoned model in vLLM's own worker, and see what is where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from genmodel.modeling import _vllm
from genmodel.modeling.loading import loadable
from genmodel.modeling.wrapper import CallableModelWrapper
from genmodel.runners import coding
from genmodel.runners.evidence import CodedTensor, LoadProbes, Omission, WeightAudit
from genmodel.runners.inspection import attention_layers

Tensors = Iterator[tuple[str, torch.Tensor]]
Change = Callable[[Tensors], Tensors]

KINDS = 32
"""Most kinds of tensors that are left out of the checkpoint in turn."""


def audit(
    directory: str, codes: Mapping[str, CodedTensor], *, tensor_parallel_size: int, rank: int, probe: bool
) -> WeightAudit:
    """What this rank holds of a checkpoint.

    Args:
        directory: the checkpoint; its tensors are read, and replaced by codes on their way to the model.
        codes: of every tensor.
        tensor_parallel_size: number of ranks, of which each has to call this.
        rank: this one.
        probe: also try checkpoints that do not fit.

    Raises:
        Exception: whatever building the model or loading the right checkpoint raises.
    """
    seen: list[WeightAudit] = []

    def watch(model: nn.Module, load: _vllm.Load) -> None:
        loading = _Loading(model, load, codes)
        held = loading.held()
        found = WeightAudit(
            tensor_parallel_size=tensor_parallel_size,
            rank=rank,
            world_size=0,
            codes=held,
            tied=_sharing(loading.parameters),
            attention=tuple(attention_layers(loading.model)),
            probes=_probe(loading, held) if probe else None,
        )
        seen.append(found)

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

    def held(self) -> dict[str, torch.Tensor]:
        """Load, and what is then in every parameter and in the buffers that loading changed, as codes."""
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}
        self.run()
        changed = {name: now for name, now in self.buffers.items() if not torch.equal(now, before[name])}
        return coding.decoded({**self.parameters, **changed})

    def run(self, change: Change = lambda tensors: tensors) -> None:
        """Load the coded checkpoint, changed; raises what loading raises."""
        coding.poison(self.parameters.values())
        self._load(lambda tensors: change(coding.recoded(tensors, self.codes)))

    def refused(self, change: Change = lambda tensors: tensors) -> str | None:
        """What loading raised, in one line; None if nothing."""
        try:
            self.run(change)
        except Exception as error:  # noqa: BLE001 - to refuse is to raise, whatever it is
            said = str(error).strip().splitlines()
            return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        return None

    def untouched(self) -> tuple[str, ...]:
        """Parameters that nothing was loaded into."""
        return tuple(name for name, p in self.parameters.items() if p.numel() and bool(coding.local(p).isnan().all()))


def _probe(loading: _Loading, held: Mapping[str, torch.Tensor]) -> LoadProbes:
    """Load checkpoints that have a tensor too many, or one too few."""
    trouble = loading.refused()
    if trouble is not None:
        return LoadProbes(unrepeatable=trouble)
    unknown, tensor = _unknown(loading.codes)

    def one_more(tensors: Tensors) -> Tensors:
        yield from tensors
        yield unknown, tensor

    refused = loading.refused(one_more)
    exempt = _exempt(loading, held)
    omissions = []
    for name in _one_of_each_kind(loading.codes):
        raised = loading.refused(_without(name))
        left = loading.untouched() if raised is None else ()
        omissions.append(Omission(tensor=name, refused=raised, left=left, exempt=name in exempt))
    return LoadProbes(unrepeatable="", unknown=unknown, unknown_refused=refused, omissions=tuple(omissions))


def _without(name: str) -> Change:
    return lambda tensors: (pair for pair in tensors if pair[0] != name)


def _unknown(codes: Mapping[str, CodedTensor]) -> tuple[str, torch.Tensor]:
    """A tensor whose name is like that of a real one, as deep inside the model as there is one, and is not one."""
    like = max(codes, key=lambda name: name.count("."))
    *parents, _, leaf = ["", "", *like.split(".")]
    return ".".join([*filter(None, parents), "genmodel_unknown", leaf]), coding.values(codes[like])


def _one_of_each_kind(codes: Mapping[str, CodedTensor]) -> list[str]:
    """The first of all names that differ in a number only, such as a layer's."""
    kinds: dict[str, str] = {}
    for name in codes:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    return list(kinds.values())[:KINDS]


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
