"""The coded checkpoint: every element has a number of its own, which tells after loading where it is from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from genmodel.runners.checkpoint import weight_files
from genmodel.runners.evidence import CHANGED, MOST_DIGITS, PADDING, UNLOADED, CodedTensor

LARGEST = 1 << 23
"""How many numbers one load can tell apart: number d is the value 2 d - 1, and float32 counts to 2^24.

Odd values only: a weight that loading scales by two, shifts by one or negates is then no other number but none. A
checkpoint of more elements is loaded once for each digit of their codes, in the base LARGEST.
"""


class Uncodable(Exception):
    """The checkpoint has nothing to code; the message is one line."""


def coded(directory: Path) -> dict[str, CodedTensor]:
    """Codes for the floating-point tensors of a checkpoint directory, the same ones in every process.

    Raises:
        Uncodable: if there are no elements.
    """
    shapes = dict(sorted(_shapes(directory)))
    if not any(map(math.prod, shapes.values())):
        raise Uncodable("the checkpoint has no weights")
    originals = _originals(directory, shapes)
    codes: dict[str, CodedTensor] = {}
    following = 1
    for name, shape in shapes.items():
        if name in originals:
            codes[name] = codes[originals[name]]
        else:
            codes[name] = CodedTensor(shape=shape, first_code=following)
            following += math.prod(shape)
    return codes


def digits(codes: Mapping[str, CodedTensor]) -> range:
    """The digits of the codes, lowest first, for each of which the checkpoint has to be loaded; at most MOST_DIGITS."""
    last = max((tensor.first_code + math.prod(tensor.shape) - 1 for tensor in codes.values()), default=0)
    return range(1 if last <= LARGEST else MOST_DIGITS)


def values(tensor: CodedTensor, digit: int = 0) -> torch.Tensor:
    """The tensor to load for one digit of its codes, float32."""
    count = math.prod(tensor.shape)
    if tensor.first_code + count - 1 <= LARGEST:  # the general case, in fewer steps
        first = 2 * tensor.first_code - 1
        low = digit == 0
        return (torch.arange(first, first + 2 * count, 2) if low else torch.ones(count)).float().reshape(tensor.shape)
    codes = torch.arange(tensor.first_code - 1, tensor.first_code - 1 + count)
    number = codes.div_(LARGEST**digit, rounding_mode="floor").remainder_(LARGEST)
    return number.to(torch.float32).mul_(2).add_(1).reshape(tensor.shape)


def recoded(
    weights: Iterable[tuple[str, torch.Tensor]],
    codes: Mapping[str, CodedTensor],
    digit: int = 0,
    order: Callable[[list[str]], list[str]] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors with a digit of their codes for values, in another order if one is given.

    What has no codes stays as it is. Only such tensors are kept while others are waited for.
    """
    if order is None:
        for name, tensor in weights:
            yield name, values(codes[name], digit) if name in codes else tensor
        return
    kept = {name: None if name in codes else tensor for name, tensor in weights}
    for name in order(list(kept)):
        other = kept[name]
        yield name, values(codes[name], digit) if other is None else other


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, which for all but a DTensor is the parameter itself."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


def decode(tensor: torch.Tensor) -> torch.Tensor:
    """What one digit of the codes is, in this rank's part of a parameter.

    int32: PADDING for 0, UNLOADED for NaN, CHANGED for all else that is no number.
    """
    found = local(tensor).to("cpu", torch.float64)
    number = (found + 1) / 2
    known = (number == number.round()) & (number >= 1) & (number <= LARGEST)
    numbers = torch.where(known, number, CHANGED)
    numbers = torch.where(found == 0, PADDING, numbers)
    return torch.where(found.isnan(), UNLOADED, numbers).to(torch.int32)


def decoded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`decode` by name; a tensor of several names is decoded once."""
    codes = {id(tensor): decode(tensor) for tensor in tensors.values()}
    return {name: codes[id(tensor)] for name, tensor in tensors.items()}


def joined(found: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The codes of all digits, lowest first, by names that all of them have; what shared a tensor shares it again.

    int32, or int64 where there are codes that take it.
    """
    lowest, *higher = found
    whole: dict[int, torch.Tensor] = {}
    names = [name for name in lowest if all(name in digit for digit in higher)]
    for name in names:
        if id(lowest[name]) not in whole:
            whole[id(lowest[name])] = _join([digit[name] for digit in found])
    return {name: whole[id(lowest[name])] for name in names}


def _join(found: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elements that are no number in one digit have to be the same in all, or the value was changed."""
    codes, *higher = found
    for digit, numbers in enumerate(higher, start=1):
        both = (codes > 0) & (numbers > 0)
        known = codes + (numbers.long() - 1) * LARGEST**digit
        codes = torch.where(both, known, torch.where(codes == numbers, codes, CHANGED))
    large = bool(codes.numel()) and int(codes.max()) > torch.iinfo(torch.int32).max
    return codes if large else codes.to(torch.int32)


@torch.no_grad()
def poison(tensors: Iterable[torch.Tensor]) -> None:
    """Fill floating-point tensors with NaN, so that what is not loaded shows."""
    for tensor in tensors:
        if tensor.is_floating_point():
            local(tensor).fill_(torch.nan)


def _shapes(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found = file.get_slice(name)
                if found.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    yield name, tuple(found.get_shape())


def _originals(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name: earlier name} of matrices that repeat another one, as a redundant copy of a tied head does."""
    begin: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, first in _read(
        directory, {name for name, shape in shapes.items() if len(shape) > 1 and all(shape)}, rows=1
    ):
        begin.setdefault((shapes[name], first.numpy().tobytes()), []).append(name)
    alike = {name for names in begin.values() if len(names) > 1 for name in names}
    names_of: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, tensor in _read(directory, alike):
        if not bool((tensor == tensor.flatten()[:1]).all()):  # a constant one repeats others by accident
            names_of.setdefault((shapes[name], sha256(tensor.numpy().tobytes()).digest()), []).append(name)
    return {name: min(names) for names in names_of.values() for name in names if name != min(names)}


def _read(directory: Path, names: set[str], rows: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors, float64, one after the other, or the first rows of each."""
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            for name in sorted(names & set(file.keys())):
                yield name, file.get_slice(name)[:rows].to(torch.float64)
