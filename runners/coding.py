"""The coded checkpoint: every element is a number of its own, which tells after loading where it is from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from genmodel.runners.evidence import CHANGED, PADDING, UNLOADED, CodedTensor

LARGEST = 1 << 23
"""Most elements of a checkpoint that can be coded: code c is the value 2 c - 1, and float32 counts to 2^24.

Odd values only: a weight that loading scales by two, shifts by one or negates is then no other code but none.
"""


class Uncodable(Exception):
    """The checkpoint has nothing to code, or more elements than there are codes; the message is one line."""


def coded(directory: Path) -> dict[str, CodedTensor]:
    """Codes for the floating-point tensors of a checkpoint directory, the same ones in every process.

    Raises:
        Uncodable: if there are no elements, or more than LARGEST.
    """
    shapes = dict(sorted(_shapes(directory)))
    total = sum(map(math.prod, shapes.values()))
    if not total:
        raise Uncodable("the checkpoint has no weights")
    if total > LARGEST:
        raise Uncodable(f"the checkpoint has {total:,} elements, and at most {LARGEST:,} can be told apart in float32")
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


def values(tensor: CodedTensor) -> torch.Tensor:
    """The tensor to load, float32."""
    count = math.prod(tensor.shape)
    codes = torch.arange(tensor.first_code, tensor.first_code + count, dtype=torch.float32)
    return (2 * codes - 1).reshape(tensor.shape)


def recoded(
    weights: Iterable[tuple[str, torch.Tensor]], codes: Mapping[str, CodedTensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors with codes for values; what has no codes stays as it is."""
    for name, tensor in weights:
        yield name, values(codes[name]) if name in codes else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, which for all but a DTensor is the parameter itself."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach()


def decode(tensor: torch.Tensor) -> torch.Tensor:
    """The codes of this rank's part of a parameter, int32: PADDING for 0, UNLOADED for NaN, CHANGED for all else."""
    found = local(tensor).to("cpu", torch.float64)
    code = (found + 1) / 2
    known = (code == code.round()) & (code >= 1) & (code <= LARGEST)
    codes = torch.where(known, code, CHANGED)
    codes = torch.where(found == 0, PADDING, codes)
    return torch.where(found.isnan(), UNLOADED, codes).to(torch.int32)


def decoded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`decode` by name; a tensor of several names is decoded once."""
    codes = {id(tensor): decode(tensor) for tensor in tensors.values()}
    return {name: codes[id(tensor)] for name, tensor in tensors.items()}


@torch.no_grad()
def poison(tensors: Iterable[torch.Tensor]) -> None:
    """Fill floating-point tensors with NaN, so that what is not loaded shows."""
    for tensor in tensors:
        if tensor.is_floating_point():
            local(tensor).fill_(torch.nan)


def _shapes(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found = file.get_slice(name)
                if found.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    yield name, tuple(found.get_shape())


def _originals(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{name: earlier name} of matrices that repeat another one, as a redundant copy of a tied head does."""
    alike = Counter(shapes.values())
    names_of: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in set(file.keys()) & shapes.keys():
                if len(shapes[name]) < 2 or alike[shapes[name]] < 2:
                    continue
                tensor = file.get_tensor(name).to(torch.float64)
                if not bool((tensor == tensor.flatten()[:1]).all()):  # a constant one repeats others by accident
                    names_of.setdefault((shapes[name], sha256(tensor.numpy().tobytes()).digest()), []).append(name)
    return {name: min(names) for names in names_of.values() for name in names if name != min(names)}
