"""The wire between a pool and its hosts: plain data, which nothing can run from, whoever wrote it.

    message = MAGIC, length of the text, length of the attachments; the text; the attachments

The text is JSON, in which a list begins with what it is: ["(", 1, 2] is a tuple, ["@Failure", ...] a dataclass with its
fields in order. Attachments are the bytes of tensors. A model runs in the process that holds the host's end, so what
comes from there is read as from a stranger: `Garbled` tells of what is no message, and text is made printable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from genmodel.runners import evidence, protocol, scenarios
from genmodel.runners.protocol import printable

if TYPE_CHECKING:
    from _typeshed import HasFileno

MAGIC = b"genmodel"
_HEADER = struct.Struct(f"!{len(MAGIC)}sQQ")
LONGEST_JSON = 1 << 27
"""Bytes of text; thousands of token sequences take less."""
LONGEST = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
"""Bytes of a message: half of the machine's memory."""
_CHUNK = 1 << 20
_TURN = 1 << 26
"""Bytes that are read of one host before others have their turn."""

SENT: Mapping[str, type[Any]] = {
    name: found
    for module in (evidence, protocol, scenarios)
    for name, found in vars(module).items()
    if isinstance(found, type) and dataclasses.is_dataclass(found)
}
"""The dataclasses that can be sent, by name."""
_PARAGRAPHS = {("Failure", "details"), ("Inspection", "vllm_says")}
"""Fields that hold several lines; text in all others is one line."""
_SEQUENCES: Mapping[str, Any] = {"(": tuple, "[": list, "<": set, "!": frozenset}
_TAGS: Mapping[type[Any], str] = {kind: tag for tag, kind in _SEQUENCES.items()}
_DTYPES = {
    *(f"{kind}{bits}" for kind in ("int", "float", "uint") for bits in (8, 16, 32, 64)),
    *("bool", "bfloat16", "complex64", "complex128"),
}
_SCALARS = (type(None), bool, int, float)
_KINDS: tuple[Any, ...] = (bool, int, float, str, tuple, list, frozenset, set, dict)


class Garbled(ValueError):
    """What came is no message of ours; the message says why, in one line."""


class Channel:
    """One end of a socket pair. The pool's neither blocks when it sends nor when it receives; a host's does both.

    Args:
        end: the socket, which is the channel's own from now on.
        blocking: whether this is the host's end.
    """

    def __init__(self, end: socket.socket, *, blocking: bool) -> None:
        self._socket = end
        self._blocking = blocking
        end.setblocking(blocking)
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """Whether `flush` has something left to send."""
        return bool(self._outgoing)

    @property
    def in_the_middle(self) -> bool:
        """Whether a message has come in part."""
        return bool(self._incoming)

    def send(self, message: object) -> None:
        """Send, or at the pool's end begin to.

        Raises:
            TypeError: for what is no plain data; nothing is sent then.
            OSError: if the other end is gone.
        """
        for part in encode(message):
            if self._blocking:
                self._socket.sendall(part)
            else:
                self._outgoing += part
        self.flush()

    def flush(self) -> None:
        """Send as much of what is left as the other end takes now; raises OSError if it is gone."""
        while self._outgoing:
            try:
                del self._outgoing[: self._socket.send(self._outgoing)]
            except BlockingIOError:
                return

    def receive(self) -> Any:
        """The next message, or None if it has not come whole; at a host's end, waits for it.

        Raises:
            EOFError: if the other end is gone.
            Garbled: if what came is no message.
        """
        read = 0
        while (message := self._next()) is None and read < _TURN:
            try:
                chunk = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return None
            except OSError:
                raise EOFError from None
            if not chunk:
                raise EOFError
            read += 0 if self._blocking else len(chunk)
            self._incoming += chunk
        return None if message is None else decode(*message)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _next(self) -> tuple[bytes, memoryview] | None:
        """Text and attachments of the first message, once it is whole."""
        begun = bytes(self._incoming[: len(MAGIC)])
        if not MAGIC.startswith(begun):
            raise Garbled(f"it begins with {begun!r}")
        if len(self._incoming) < _HEADER.size:
            return None
        _, text, attached = _HEADER.unpack_from(self._incoming)
        if text > LONGEST_JSON or text + attached > LONGEST:
            raise Garbled(f"it says that it is {text + attached} bytes long")
        whole = _HEADER.size + text + attached
        if len(self._incoming) < whole:
            return None
        frame = bytes(memoryview(self._incoming)[:whole])
        del self._incoming[:whole]
        body = memoryview(frame)[_HEADER.size :]
        return bytes(body[:text]), body[text:]


def encode(message: object) -> Iterator[bytes | memoryview]:
    """The parts of a message; raises TypeError for what is no plain data."""
    writer = _Writer()
    text = json.dumps(writer.plain(message), separators=(",", ":")).encode()
    yield _HEADER.pack(MAGIC, len(text), sum(part.nbytes for part in writer.attachments)) + text
    yield from writer.attachments


def decode(text: bytes, attachments: memoryview) -> Any:
    """What was encoded; raises Garbled for anything else."""
    try:
        return _Reader(attachments).value(json.loads(text))
    except Garbled:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
        raise Garbled(printable(f"{type(error).__name__}: {error}")[:100]) from None


class _Writer:
    """Values to JSON; bytes and tensors become attachments, each object once."""

    def __init__(self) -> None:
        self.attachments: list[memoryview] = []
        self._known: dict[int, tuple[object, int]] = {}

    def plain(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SCALARS or kind is str:
            return value
        if kind in _TAGS:
            return [_TAGS[kind], *(v if type(v) in _SCALARS else self.plain(v) for v in value)]
        if kind is dict:
            return ["{", *(self.plain(part) for pair in value.items() for part in pair)]
        if SENT.get(kind.__name__) is kind:
            fields = (getattr(value, field.name) for field in dataclasses.fields(kind))
            return [f"@{kind.__name__}", *map(self.plain, fields)]
        return self._unusual(value)

    def _unusual(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return ["b", self._attach(value, value), len(value)]
        if hasattr(value, "untyped_storage"):
            return ["t", self._attach(value, _bytes_of(value)), str(value.dtype)[6:], *value.shape]
        if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
            return ["d", str(value)[6:]]
        if type(value).__module__ == "numpy" and not getattr(value, "shape", None):
            return self.plain(value.item())
        # Of a subclass, such as an enumeration's member or torch's sizes, the plain value.
        for kind in _KINDS:
            if isinstance(value, kind):
                return self.plain(kind(value))
        if isinstance(value, Mapping):
            return self.plain(dict(value))
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} is no plain data")

    def _attach(self, owner: object, content: bytes | memoryview) -> int:
        """The number of an attachment; the owner is kept, so that its id stays its own."""
        if id(owner) not in self._known:
            self._known[id(owner)] = owner, len(self.attachments)
            self.attachments.append(memoryview(content))
        return self._known[id(owner)][1]


class _Reader:
    """JSON to values; attachments come in the order of their numbers, each with its length told by its first use."""

    def __init__(self, attachments: memoryview) -> None:
        self._attachments = attachments
        self._made: list[Any] = []
        self._at = 0

    def value(self, found: Any, *, lines: bool = True) -> Any:
        if type(found) in _SCALARS:
            return found
        if type(found) is str:
            return printable(found, lines=lines)
        if type(found) is not list or not found or type(found[0]) is not str:
            raise Garbled("something in it has no kind")
        tag, *items = found
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](v if type(v) in _SCALARS else self.value(v, lines=lines) for v in items)
        if tag == "{":
            keys, values = items[::2], items[1::2]
            return {self.value(k, lines=lines): self.value(v, lines=lines) for k, v in zip(keys, values, strict=True)}
        if tag in ("b", "t"):
            return self._attached(tag, *items)
        return self._dtype(*items) if tag == "d" else self._dataclass(tag.removeprefix("@"), items)

    def _dataclass(self, name: str, items: list[Any]) -> Any:
        kind = SENT[name]
        fields = [field.name for field in dataclasses.fields(kind)]
        values = zip(fields, items, strict=True)
        return kind(**{field: self.value(v, lines=(name, field) in _PARAGRAPHS) for field, v in values})

    def _attached(self, tag: str, number: int, *about: Any) -> Any:
        if number == len(self._made):
            self._made.append(self._bytes(*about) if tag == "b" else self._tensor(*about))
        return self._made[number]

    def _bytes(self, size: int) -> bytes:
        return bytes(self._take(size))

    def _tensor(self, dtype: str, *shape: int) -> Any:
        import torch

        if not all(type(size) is int and size >= 0 for size in shape):
            raise Garbled("a tensor in it is none")
        made = torch.empty(0, dtype=self._dtype(dtype))
        content = self._take(math.prod(shape) * made.element_size())
        # A copy, which is aligned and can be written to, and does not keep the message.
        return torch.frombuffer(bytearray(content), dtype=made.dtype).reshape(shape) if content else made.reshape(shape)

    def _dtype(self, name: str) -> Any:
        import torch

        if name not in _DTYPES:
            raise Garbled("a dtype in it is none")
        return getattr(torch, name)

    def _take(self, size: int) -> memoryview:
        if not 0 <= size <= len(self._attachments) - self._at:
            raise Garbled("its attachments are too short")
        self._at += size
        return self._attachments[self._at - size : self._at]


def _bytes_of(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def ready(channels: Iterable[Channel], others: Iterable[HasFileno], seconds: float) -> set[int]:
    """Descriptors with something to read, once there are any or so many seconds are over; what is left is sent."""
    poller = select.poll()
    sending = {}
    for channel in channels:
        poller.register(channel, select.POLLIN | (select.POLLOUT if channel.sending else 0))
        sending[channel.fileno()] = channel
    for other in others:
        poller.register(other, select.POLLIN)
    found = poller.poll(seconds * 1000)
    for descriptor, event in found:
        if event & select.POLLOUT:
            with contextlib.suppress(OSError):  # one that is gone is noticed by what reads from it
                sending[descriptor].flush()
    return {descriptor for descriptor, event in found if event & ~select.POLLOUT}
