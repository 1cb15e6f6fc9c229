"""Where the elements of a coded checkpoint are: each rank's slices, derived from the codes alone.

The model at TP=1 says what belongs in each parameter and in which order, whatever its layout. What a rank
holds of a parameter is right if it is a part of that along each dimension, in the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from genmodel.runners.evidence import CHANGED, CodedTensor

Codes = Mapping[str, torch.Tensor]

_NO_WEIGHTS = re.compile(r"\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")
"""Tables that older checkpoints carry along, and that models compute."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's part of a parameter, seen from the whole parameter at TP=1."""

    positions: torch.Tensor
    """int64, of the local shape: flat index in the whole; -1 for what the whole does not have."""
    foreign: int
    """Elements of the checkpoint that the whole does not have."""
    ordered: bool
    """Whether it is a slice: an ascending choice of indices along each dimension."""


def place(part: torch.Tensor, whole: torch.Tensor) -> Place:
    """Find a part's elements in the whole; the two need not have the same number of dimensions."""
    values, order = whole.flatten().sort()
    index = torch.searchsorted(values, part.contiguous()).clamp(max=max(0, len(values) - 1))
    found = (part > 0) & (values[index] == part) if len(values) else torch.zeros_like(part, dtype=torch.bool)
    positions = torch.where(found, order[index], -1) if len(values) else torch.full_like(part, -1)
    repeats = bool(((values[1:] == values[:-1]) & (values[1:] > 0)).any())
    # Where the whole itself repeats elements (heads expanded at load), order cannot be told.
    ordered = repeats or _ascending(positions, whole.shape)
    return Place(positions, int(((part > 0) & ~found).sum()), ordered)


def _ascending(positions: torch.Tensor, shape: torch.Size) -> bool:
    found = positions >= 0
    if not bool(found.any()):
        return True
    if positions.dim() != len(shape) or not shape:
        return bool((positions[found].diff() > 0).all())
    for dim, size in enumerate(shape):
        index = positions // math.prod(shape[dim + 1 :]) % size
        others = [d for d in range(len(shape)) if d != dim]
        highest = torch.where(found, index, -1)
        lowest = torch.where(found, index, size)
        if others:
            highest, lowest = highest.amax(others), lowest.amin(others)
        known = highest >= 0  # other rows are padding
        if not torch.equal(highest[known], lowest[known]) or not bool((highest[known].diff() > 0).all()):
            return False
    return True


def homes(codes: Codes, whole: Codes) -> dict[str, str]:
    """{parameter of a rank: parameter at TP=1 that it is a part of}.

    The names are the same, but for models that spread whole modules over the ranks (experts) and number
    their own ones anew: there the elements tell.
    """
    if codes.keys() >= whole.keys():
        return {name: name for name in codes if name in whole}
    owners = {int(first): name for name, tensor in whole.items() for first in tensor[tensor > 0][:1]}
    found = {}
    for name, tensor in codes.items():
        first = next((int(code) for code in tensor[tensor > 0][:1]), 0)
        if name in whole and bool((whole[name] == first).any()):
            found[name] = name
        elif first in owners:
            found[name] = owners[first]
    return found


def distinct(codes: Codes) -> dict[str, torch.Tensor]:
    """Every parameter by its first name: tied ones have several."""
    names: dict[int, str] = {}
    for name, tensor in codes.items():
        names.setdefault(id(tensor), name)
    return {name: codes[name] for name in names.values()}


class Checkpoint:
    """The coded tensors, and what ranks hold of them."""

    def __init__(self, tensors: Mapping[str, CodedTensor]) -> None:
        self.tensors = dict(sorted(tensors.items(), key=lambda item: item[1].first_code))
        self._first = torch.tensor([tensor.first_code for tensor in self.tensors.values()])
        self.total = max((t.first_code + math.prod(t.shape) for t in self.tensors.values()), default=1) - 1

    def absent(self, ranks: Iterable[Codes]) -> dict[str, int]:
        """By tensor, how many of its elements no rank holds; only tensors that lack some."""
        held = torch.zeros(self.total + 1, dtype=torch.bool)
        for codes in ranks:
            for tensor in codes.values():
                held[tensor[(tensor > 0) & (tensor <= self.total)].long()] = True
        missing = {
            name: int((~held[t.first_code : t.first_code + math.prod(t.shape)]).sum())
            for name, t in self.tensors.items()
            if not _NO_WEIGHTS.search(name)
        }
        return {name: count for name, count in missing.items() if count}

    def followed(self, whole: Codes) -> set[str]:
        """The tensors whose values loading keeps.

        The others are nowhere in the model at TP=1, and a parameter has as many values that are no codes:
        an offset or a scale that load_weights folds in.
        """
        changed = sorted((int((tensor == CHANGED).sum()) for tensor in distinct(whole).values()), reverse=True)
        lost = [name for name, count in self.absent([whole]).items() if count == math.prod(self.tensors[name].shape)]
        excused = set()
        for name in sorted(lost, key=lambda name: -math.prod(self.tensors[name].shape)):
            size = math.prod(self.tensors[name].shape)
            room = next((i for i, count in enumerate(changed) if count >= size), None)
            if room is not None:
                changed[room] -= size
                excused.add(name)
        return set(self.tensors) - excused

    def parts(self, tensor: torch.Tensor) -> list[str]:
        """Names of the checkpoint tensors that a parameter has elements of."""
        codes = tensor[tensor > 0].unique()
        index = (torch.searchsorted(self._first, codes.long(), right=True) - 1).unique().tolist()
        names = list(self.tensors)
        return [names[i] for i in index]
