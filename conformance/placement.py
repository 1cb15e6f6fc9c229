"""Where the elements of a coded checkpoint are: each rank's slices, derived from the codes alone.

The model at TP=1 says what belongs in each parameter and in which order, whatever its layout. What a rank holds of a
parameter is right if it is a choice of indices along each dimension of that, in the same order.

The law of order: rows and columns of a matrix, and unlike matrices that are fused, are in the order of TP=1 on every
rank, for what computes with them takes them in that order. Whole matrices of one kind, such as experts, may be dealt
out in any order that forward knows, and codes cannot tell whether it does: logits.* and gradients.parallel can. So the
order is free along a dimension that stacks matrices (all but the last two, or what tensors of the checkpoint are
stacked along), among joined tensors of the checkpoint that differ in a number only, and where it is the order of
stacked matrices of the same module (one bias for each expert).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from genmodel.runners.evidence import CHANGED, COMPUTED_TABLE, CodedTensor, kind

Codes = Mapping[str, torch.Tensor]
Placement = tuple[int, tuple[int, ...]]
"""How many matrices are stacked, and which of them a rank has, in its order."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's part of a parameter, seen from the whole parameter at TP=1."""

    positions: torch.Tensor
    """int64, of the local shape: flat index in the whole; -1 for what the whole does not have."""
    foreign: int
    """Elements of the checkpoint that the whole does not have."""
    chosen: tuple[torch.Tensor, ...] | None
    """By dimension of the whole, int64: which indices the part has, in its own order, -1 for padding. Of one dimension
    if the two differ in their number of dimensions; None if the part is no choice along each dimension."""

    @property
    def ordered(self) -> bool:
        """Whether it is a slice: an ascending choice of indices along each dimension."""
        return self.chosen is not None and all(map(_ascending, self.chosen))


def place(part: torch.Tensor, whole: torch.Tensor) -> Place:
    """Find a part's elements in the whole; the two need not have the same number of dimensions."""
    positions, repeats = _found(part, whole)
    # Where the whole itself repeats elements (heads expanded at load), order cannot be told.
    chosen = () if repeats else _chosen(positions, whole.shape)
    return Place(positions, int(((part > 0) & (positions < 0)).sum()), chosen)


def _found(part: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(flat index in the whole of each element, -1 for what it does not have; whether the whole repeats any)."""
    flat = whole.flatten()
    where = (flat > 0).nonzero().squeeze(1)
    if not len(where) or not part.numel():
        return torch.full_like(part, -1, dtype=torch.int64), False
    codes = flat[where]
    low, high = (int(bound) for bound in codes.aminmax())
    if high - low < 16 * len(codes):  # a table is quicker than a search, and small
        table = torch.full((high - low + 1,), -1)
        table[(codes - low).long()] = where
        inside = (part >= low) & (part <= high)
        positions = torch.where(inside, table[(part - low).clamp(0, high - low).long()], -1)
        return positions, int((table >= 0).sum()) < len(codes)
    values, order = codes.sort()
    index = torch.searchsorted(values, part.contiguous()).clamp(max=len(values) - 1)
    positions = torch.where(values[index] == part, where[order][index], -1)
    return positions, bool((values[1:] == values[:-1]).any())


def _chosen(positions: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, ...] | None:
    found = positions >= 0
    if positions.dim() != len(shape):
        return (positions.flatten(),)
    chosen = []
    for dim, size in enumerate(shape):
        index = positions // math.prod(shape[dim + 1 :]) % max(1, size)
        others = [d for d in range(len(shape)) if d != dim]
        highest = torch.where(found, index, -1)
        lowest = torch.where(found, index, size)
        if others and found.numel():
            highest, lowest = highest.amax(others), lowest.amin(others)
        elif others:
            highest = lowest = index.new_full((positions.shape[dim],), -1)
        if not torch.equal(highest[highest >= 0], lowest[highest >= 0]):
            return None
        chosen.append(highest)
    return tuple(chosen)


def _ascending(index: torch.Tensor) -> bool:
    return bool((index[index >= 0].diff() > 0).all())


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


def counts(tensors: Iterable[torch.Tensor], among: torch.Tensor) -> torch.Tensor:
    """How many of the tensors have each code that is among those of another; int64, by code from the least one on.

    -1 stands for numbers between that are no code of it.
    """
    codes = among[among > 0].long()
    low, high = (int(bound) for bound in codes.aminmax()) if len(codes) else (1, 0)
    found = torch.full((high - low + 1,), -1)
    found[codes - low] = 0
    for tensor in tensors:
        inside = tensor[(tensor >= low) & (tensor <= high)].long() - low
        held = torch.zeros(len(found), dtype=torch.bool)
        held[inside] = True
        found += held & (found >= 0)
    return found


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
            if not COMPUTED_TABLE.search(name)
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
        codes = tensor[tensor > 0]
        if not len(codes):
            return []
        ends = self._owners(torch.stack(codes.aminmax()))
        owners = ends if bool(ends[0] == ends[1]) else self._owners(codes)
        count = torch.bincount(owners, minlength=len(self.tensors))
        return [name for name, elements in zip(self.tensors, count.tolist(), strict=True) if elements]

    def out_of_order(self, part: torch.Tensor, whole: torch.Tensor, placements: Collection[Placement]) -> bool:
        """Whether a rank's part breaks the law of order.

        Args:
            part: what the rank holds.
            whole: what it is a part of.
            placements: of what the rank holds of the same module.
        """
        chosen = place(part, whole).chosen
        if chosen is None:
            return True
        stacked = self._stacked(part, whole)
        return not all(
            _ascending(index)
            or self._rearranged(index, whole, dim, alike=dim < stacked)
            or (whole.shape[dim], tuple(index.tolist())) in placements
            for dim, index in enumerate(chosen)
        )

    def placements(self, part: torch.Tensor, whole: torch.Tensor) -> Iterator[Placement]:
        """Which matrices a rank has of those that a parameter stacks."""
        if stacked := self._stacked(part, whole):
            chosen = place(part, whole).chosen or ()
            yield from ((whole.shape[dim], tuple(index.tolist())) for dim, index in enumerate(chosen[:stacked]))

    def _stacked(self, part: torch.Tensor, whole: torch.Tensor) -> int:
        """How many leading dimensions of a parameter stack matrices, or tensors of the checkpoint."""
        if part.dim() != whole.dim():
            return 0
        own = max((len(self.tensors[name].shape) for name in self.parts(whole)), default=whole.dim())
        return max(0, whole.dim() - 2, whole.dim() - own)

    def _rearranged(self, index: torch.Tensor, whole: torch.Tensor, dim: int, *, alike: bool) -> bool:
        """Whether the order differs in that of whole tensors of one kind only, or, if `alike`, of whole slices."""
        if whole.dim() == 0 or dim >= whole.dim() or not whole.numel():
            return False
        slices = whole.movedim(dim, 0).flatten(1) if whole.dim() > 1 else whole.unsqueeze(1)
        lowest = torch.where(slices > 0, slices, slices.amax(1, keepdim=True)).amin(1)
        owners, last = self._owners(lowest), self._owners(slices.amax(1))
        if bool((lowest <= 0).any()) or not torch.equal(owners, last):
            return False  # what is joined is joined along another dimension
        there, here = owners.unique_consecutive(), owners[index[index >= 0]].unique_consecutive()
        inside = index[index >= 0]
        inside = inside[torch.argsort(owners[inside], stable=True)]
        together = len(here) == len(here.unique())
        within = bool(((inside.diff() > 0) | (owners[inside].diff() != 0)).all())
        return (alike or (together and within)) and _subsequence(self._kinds(here), self._kinds(there))

    def _owners(self, codes: torch.Tensor) -> torch.Tensor:
        """Of each code the number of the tensor that it is of."""
        return torch.searchsorted(self._first, codes.long().contiguous(), right=True) - 1

    def _kinds(self, owners: torch.Tensor) -> list[str]:
        names = list(self.tensors)
        return [kind(names[owner]) for owner in owners.tolist()]


def _subsequence(part: list[str], whole: list[str]) -> bool:
    """Whether the parts, if of several kinds, follow each other as they do in the whole."""
    left = iter(whole)
    return len(set(part)) <= 1 or all(name in left for name in part)
