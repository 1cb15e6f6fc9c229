"""Dataclasses to plain JSON and back, by their annotations: what is not declared is neither written nor read.

Tensors are kept apart, by content: JSON has a reference to each, such as "6f3a…#0 int64". Whatever shares one
tensor object shares it again after reading, and equal tensors that are two objects stay two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

if TYPE_CHECKING:
    import torch

MAX_INTEGER = 2**63 - 1
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_NARROW = ("int8", "int16", "int32")
_HINTS: dict[Any, Mapping[str, Any]] = {}
_REFERENCE = re.compile(r"(?P<content>[0-9a-f]{32})#(?P<object>\d{1,6}) (?P<dtype>[a-z]+\d*)")


class _ATensor:
    """What stands for torch.Tensor in annotations."""


class Unreadable(ValueError):
    """JSON that is not what the annotations ask for; the message says where, in one line."""


class Tensors:
    """Tensors on their way out, by content."""

    def __init__(self) -> None:
        self.contents: dict[str, torch.Tensor] = {}
        """By the first 32 hexadecimal digits of the SHA-256 of dtype, shape and bytes; contiguous, and narrowed."""
        self._references: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._kept: list[torch.Tensor] = []

    def refer(self, tensor: torch.Tensor) -> str:
        """The reference to a tensor; the same for the same object."""
        if id(tensor) not in self._references:
            self._kept.append(tensor)  # so that its id stays its own
            narrowed = _narrowed(tensor)
            content = content_of(narrowed)
            self.contents[content] = narrowed
            number = self._counts[content] = self._counts.get(content, -1) + 1
            self._references[id(tensor)] = f"{content}#{number} {str(tensor.dtype).removeprefix('torch.')}"
        return self._references[id(tensor)]


def content_of(tensor: torch.Tensor) -> str:
    """What a tensor is known by, whatever holds it."""
    import torch

    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    said = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(said + raw.tobytes()).hexdigest()[:32]


def encode(value: object, kind: Any, tensors: Tensors | None = None) -> Any:
    """JSON of a value of this annotation: dataclasses, tuples, dicts, unions, literals, scalars and tensors.

    Raises:
        TypeError: for a value that the annotation does not allow.
    """
    if value is None:
        return None
    kind, tagged = _member(kind, value)
    written = _encode(value, kind, tensors)
    return {_name(kind): written} if tagged else written


def _encode(value: Any, kind: Any, tensors: Tensors | None) -> Any:
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind):
        return {name: encode(getattr(value, name), hint, tensors) for name, hint in hints(kind).items()}
    if origin is tuple:
        members = _member_kinds(kind, len(value))
        if len(members) != len(value):
            raise TypeError(f"{value!r} is no {kind}")
        return [encode(item, hint, tensors) for item, hint in zip(value, members, strict=True)]
    if origin is dict:
        of_keys, of_values = typing.get_args(kind)
        return [[encode(k, of_keys, tensors), encode(v, of_values, tensors)] for k, v in value.items()]
    if _is_tensor(kind):
        if tensors is None:
            raise TypeError("no place for a tensor")
        return tensors.refer(value)
    if origin is float:
        return float(value) if math.isfinite(value) else str(float(value))
    if kind in (str, int) and isinstance(value, kind) and not isinstance(value, bool):
        return kind(value)  # of a subclass, such as torch's version, the plain value
    if not _is_scalar(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value


def decode(found: Any, kind: Any, tensors: Callable[[str, str], torch.Tensor] | None = None, at: str = "") -> Any:
    """The value of this annotation that `found`, parsed JSON of whatever origin, stands for.

    Args:
        found: what json.loads gave.
        kind: the annotation.
        tensors: gives the tensor for a reference's content and dtype; called once for each object.
        at: where in the file this is, for messages.

    Raises:
        Unreadable: for anything else than what `encode` writes. A field that is absent takes its default, if it has
            one: so what was written before the field existed can be read.
    """
    return _Reader(tensors).read(found, kind, at)


class _Reader:
    def __init__(self, tensors: Callable[[str, str], torch.Tensor] | None) -> None:
        self._tensors = tensors
        self._objects: dict[str, torch.Tensor] = {}

    def read(self, found: Any, kind: Any, at: str) -> Any:
        members = _members(kind)
        if found is None and type(None) in members:
            return None
        wanted = [member for member in members if member is not type(None)]
        if len(wanted) > 1:
            by_name = {_name(member): member for member in wanted}
            if not isinstance(found, dict) or len(found) != 1 or not found.keys() <= by_name.keys():
                raise Unreadable(f"{at or 'this'} is none of {', '.join(by_name)}")
            ((name, found),) = found.items()
            return self._read(found, by_name[name], at)
        return self._read(found, wanted[0], at)

    def _read(self, found: Any, kind: Any, at: str) -> Any:
        origin = typing.get_origin(kind) or kind
        if dataclasses.is_dataclass(kind):
            return self._dataclass(found, typing.cast("type[Any]", kind), at)
        if origin is tuple:
            items = _list(found, at)
            members = _member_kinds(kind, len(items))
            if len(members) != len(items):
                raise Unreadable(f"{at} has {len(items)} items instead of {len(members)}")
            return tuple(
                self.read(item, hint, f"{at}[{i}]") for i, (item, hint) in enumerate(zip(items, members, strict=True))
            )
        if origin is dict:
            return self._dict(found, kind, at)
        if _is_tensor(kind):
            return self._tensor(found, at)
        if origin is float and isinstance(found, str) and found in _NOT_FINITE:
            return _NOT_FINITE[found]
        if origin is float and isinstance(found, float | int) and not isinstance(found, bool):
            return float(_bounded(found, at))
        if not _is_scalar(found, kind):
            raise Unreadable(f"{at} is {_shown(found)}, which is no {_name(kind)}")
        return _bounded(found, at)

    def _dataclass(self, found: Any, kind: type[Any], at: str) -> Any:
        if not isinstance(found, dict):
            raise Unreadable(f"{at or 'this'} is {_shown(found)}, which is no {kind.__name__}")
        known = hints(kind)
        if unknown := [name for name in found if name not in known]:
            raise Unreadable(f"{at or 'this'} has a field that a {kind.__name__} does not: {_shown(unknown[0])}")
        required = {f.name for f in dataclasses.fields(kind) if not _has_default(f)}
        if absent := sorted(required - found.keys()):
            raise Unreadable(f"{at or 'this'} lacks {absent[0]}")
        dot = f"{at}." if at else ""
        return kind(**{name: self.read(found[name], known[name], f"{dot}{name}") for name in known if name in found})

    def _dict(self, found: Any, kind: Any, at: str) -> dict[Any, Any]:
        of_keys, of_values = typing.get_args(kind)
        read: dict[Any, Any] = {}
        for i, pair in enumerate(_list(found, at)):
            key, value = _pair(pair, f"{at}[{i}]")
            key = self.read(key, of_keys, f"{at}[{i}] (its key)")
            if key in read:
                raise Unreadable(f"{at}[{i}] repeats a key")
            read[key] = self.read(value, of_values, f"{at}[{i}]")
        return read

    def _tensor(self, found: Any, at: str) -> torch.Tensor:
        match = _REFERENCE.fullmatch(found) if isinstance(found, str) else None
        if match is None or self._tensors is None:
            raise Unreadable(f"{at} is {_shown(found)}, which refers to no tensor")
        if found not in self._objects:
            self._objects[found] = self._tensors(match["content"], match["dtype"])
        return self._objects[found]


def hints(kind: Any) -> Mapping[str, Any]:
    """The fields of a dataclass with their annotations, `torch.Tensor` being a stand-in: torch is not imported."""
    if kind not in _HINTS:
        names = {"torch": types.SimpleNamespace(Tensor=_ATensor)}
        found = typing.get_type_hints(kind, localns=names)
        _HINTS[kind] = {field.name: found[field.name] for field in dataclasses.fields(kind)}
    return _HINTS[kind]


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _member(kind: Any, value: object) -> tuple[Any, bool]:
    """Which member of a union a value is of, and whether that has to be said."""
    wanted = [member for member in _members(kind) if member is not type(None)]
    if len(wanted) == 1:
        return wanted[0], False
    for member in wanted:
        origin = typing.get_origin(member) or member
        if isinstance(origin, type) and isinstance(value, origin):
            return member, True
    raise TypeError(f"{value!r} is none of {', '.join(map(_name, wanted))}")


def _member_kinds(kind: Any, length: int) -> tuple[Any, ...]:
    members = typing.get_args(kind)
    return (members[0],) * length if len(members) == 2 and members[1] is Ellipsis else members


def _is_tensor(kind: Any) -> bool:
    return kind is _ATensor


def _is_scalar(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    return type(value) is kind and kind in (str, int, bool)


def _name(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    return "one of " + ", ".join(typing.get_args(kind)) if origin is Literal else str(getattr(origin, "__name__", kind))


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in as few bytes as they need: token ids are most of an archive."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype not in (torch.int64, torch.int32) or not plain.numel():
        return plain
    low, high = (int(bound) for bound in plain.aminmax())
    for name in _NARROW:
        narrow = getattr(torch, name)
        if torch.iinfo(narrow).min <= low and high <= torch.iinfo(narrow).max:
            return plain.to(narrow)
    return plain


def _list(found: Any, at: str) -> list[Any]:
    if not isinstance(found, list):
        raise Unreadable(f"{at} is {_shown(found)} instead of a list")
    return found


def _pair(found: Any, at: str) -> Iterable[Any]:
    if not isinstance(found, list) or len(found) != 2:
        raise Unreadable(f"{at} is no pair")
    return found


def _bounded(found: Any, at: str) -> Any:
    if isinstance(found, int) and abs(found) > MAX_INTEGER:
        raise Unreadable(f"{at} is a number of more than 63 bits")
    return found


def _shown(found: object) -> str:
    text = repr(found) if isinstance(found, str | int | float | bool | None) else f"a {type(found).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
