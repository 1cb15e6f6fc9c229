"""What goes between a pool and its hosts is data: it arrives as it was sent, and what is no message is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pickle
import random
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import evidence_samples
from genmodel.runners.evidence import CodedTensor, Failure
from genmodel.runners.protocol import LONGEST_LINE, LONGEST_TEXT, Command, describe_failure, printable, signal_name
from genmodel.runners.wire import MAGIC, Channel, Garbled, decode, encode, ready

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The pool's end, and a host's."""
    ours, theirs = socket.socketpair()
    channels = Channel(ours, blocking=False), Channel(theirs, blocking=True)
    yield channels
    for channel in channels:
        channel.close()


def carried(message: object) -> Any:
    first, *attachments = encode(message)
    length = struct.unpack_from("!Q", first, len(MAGIC))[0]
    return decode(bytes(first[-length:]), memoryview(b"".join(attachments)))


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif dataclasses.is_dataclass(theirs):
        for field in dataclasses.fields(theirs):
            assert_equal(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    elif isinstance(theirs, dict):
        assert_equal(list(ours.items()), list(theirs.items()))
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    "value",
    [
        (None, True, 1, -(2**70), 0.1, "text", b"\0bytes", b""),
        ([1, [2]], (3, (4,)), {5}, frozenset({(6, 7)}), {(8, 9): {"a": [None]}}, (), [], {}),
        math.inf,
        torch.bfloat16,
        "two\nlines",
        Command(
            name="prepare",
            scenario="plain",
            process="t",
            arguments={"codes": {"a": CodedTensor(shape=(2,), first_code=1)}},
        ),
    ],
)
def test_what_is_sent_arrives(value: object) -> None:
    assert_equal(carried(value), value)


def test_evidence_arrives() -> None:
    assert_equal(carried(evidence_samples.clean()), evidence_samples.clean())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_arrive(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert_equal(
        carried({"a": tensor, "b": [tensor.T if shape else tensor]}),
        {"a": tensor, "b": [tensor.T if shape else tensor]},
    )


def test_numbers_of_other_libraries_arrive_as_plain_ones() -> None:
    """And of enumerations and torch's sizes, the values."""
    assert_equal(carried([np.float32(0.5), np.int64(7), np.bool_(True), torch.Size([2])]), [0.5, 7, True, (2,)])


def test_a_tensor_is_sent_once() -> None:
    """And stays one object; what is a view of a large one is sent without the rest of it."""
    tensor = torch.zeros(1000, 1000)
    twice = carried([tensor[:2], *[tensor] * 2])
    assert twice[1] is twice[2]
    assert sum(len(part) for part in encode([tensor] * 5)) < 4_001_000
    assert sum(len(part) for part in encode(tensor[:2])) < 9_000


def test_what_is_no_data_is_not_sent(pair: Pair) -> None:
    """The sender is told, and nothing has been sent."""
    ours, theirs = pair
    with pytest.raises(TypeError, match=r"a builtins\.function is no plain data"):
        theirs.send(("done", (lambda: None, {})))
    theirs.send("next")
    assert ours.receive() == "next"


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('it ran')",)


def framed(text: bytes, attachments: bytes = b"", *, longer: int = 0) -> bytes:
    return struct.pack(f"!{len(MAGIC)}sQQ", MAGIC, len(text), len(attachments) + longer) + text + attachments


@pytest.mark.parametrize(
    "rubbish",
    [
        pickle.dumps(Evil()),
        struct.pack("!i", len(pickle.dumps(Evil()))) + pickle.dumps(Evil()),
        b"\0" * 100,
        b"g",
        framed(b"rubbish"),
        framed(b"[" * 100_000),
        framed(b'["@Evil"]'),
        framed(b'["@Path", "/etc/passwd"]'),
        framed(b'["@Failure"]'),
        framed(b'["(", {"a": 1}]'),
        framed(b'["t", 0, "float32", 10]', b"short"),
        framed(b'["t", 0, "float32", -1]'),
        framed(b'["t", 0, "load", 1]', bytes(4)),
        framed(b'["t", 0, "float32", 4611686018427387904]', bytes(4)),
        framed(b'["d", "load"]'),
        framed(b'["t", 3, "float32", 1]', bytes(4)),
        framed(b'["b", 0, 5]'),
        framed(b'["b", 0, "x"]', b"x"),
        framed(b'["{", ["[", 1], 2]'),
        framed(b'["{", 1]'),
        framed(b"\xff\xfe"),
        framed(b"9" * 10_000),
        framed(b"null", longer=1 << 62),
        struct.pack(f"!{len(MAGIC)}sQQ", MAGIC, 1 << 63, 1 << 63),
    ],
)  # fmt: skip
def test_rubbish_is_refused(pair: Pair, rubbish: bytes) -> None:
    """In words, without running it, waiting for what does not come, or taking memory for it."""
    ours, theirs = pair
    theirs._socket.sendall(rubbish)
    theirs._socket.shutdown(socket.SHUT_WR)
    with pytest.raises((Garbled, EOFError)) as raised:
        ours.receive()
    assert "\n" not in str(raised.value)


def test_any_damage_is_refused_or_harmless() -> None:
    """Bytes of a true message changed at random."""
    generator = random.Random(0)
    first, *attachments = encode(("done", (evidence_samples.clean(), {"a": 1.0})))
    length = struct.unpack_from("!Q", first, len(MAGIC))[0]
    text, attached = bytes(first[-length:]), memoryview(b"".join(attachments))
    for _ in range(300):
        changed = bytearray(text)
        for _ in range(generator.choice((1, 3))):
            changed[generator.randrange(len(changed))] = generator.choice(b'[]{}",(@t0 9\xff')
        with contextlib.suppress(Garbled):
            decode(bytes(changed), attached)


def test_half_a_message_blocks_nobody(pair: Pair) -> None:
    ours, theirs = pair
    whole = b"".join(encode("x" * 1000))
    theirs._socket.sendall(whole[:500])
    assert ours.receive() is None
    assert ours.in_the_middle
    theirs._socket.sendall(whole[500:] + whole)
    assert [ours.receive(), ours.receive(), ours.receive()] == ["x" * 1000, "x" * 1000, None]
    assert not ours.in_the_middle


def test_a_host_that_does_not_listen_blocks_nobody(pair: Pair) -> None:
    """What it does not take now is sent while the pool waits."""
    ours, theirs = pair
    big = torch.arange(1 << 20)
    ours.send(big)
    assert ours.sending
    assert ready([ours], [], 0.01) == set()
    theirs._socket.settimeout(0.01)
    received = None
    while received is None:
        ready([ours], [], 0.0)
        try:
            received = theirs.receive()
        except EOFError:  # a timeout
            continue
    assert torch.equal(received, big)
    assert not ours.sending


def test_the_other_end_is_gone(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()


# --- text ----------------------------------------------------------------------------------------------------------

NASTY = "half \ud800 pair, \x1b[2J, \0, \u202e, line\nbreak\r\ttab \x85 caf\xe9 \N{SNOWMAN}"


def test_text_is_made_printable() -> None:
    one = printable(NASTY)
    assert one == r"half \ud800 pair, \x1b[2J, \x00, \u202e, line break  tab   café ☃"
    several = printable(NASTY, lines=True)
    assert several.split("\n")[1] == "break \ttab   café ☃"
    assert printable("\x1b[31mred\x1b[0m\N{NO-BREAK SPACE}\u2028") == "red  "
    for text in (one, several):
        text.encode()
        assert printable(text, lines=True) == text
    assert len(printable("x" * 50_000_000)) < LONGEST_LINE + 100
    assert len(printable("x\n" * 50_000_000, lines=True)) < LONGEST_TEXT + 100


def test_text_that_arrives_is_printable() -> None:
    """Wherever it stands, and in one line but where several are meant."""
    failure = carried(Failure(kind="raised", scenario="plain", message=NASTY, details=NASTY, phase=NASTY))
    assert failure.message == failure.phase == printable(NASTY)
    assert failure.details == printable(NASTY, lines=True)
    assert carried({NASTY: [NASTY]}) == {printable(NASTY, lines=True): [printable(NASTY, lines=True)]}


class Mute(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise SystemExit


def test_any_exception_is_described() -> None:
    """One whose causes go round in circles, one without a text, one with too much of it, and one for no terminal."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    for error in (first, Mute(), ValueError("x" * 50_000_000), ValueError(NASTY), ValueError("\n\n"), ValueError()):
        found = describe_failure(error, "plain", 0, "generating")
        assert type(error).__name__ in found.message
        assert found.message.isprintable()
        assert len(found.message) + len(found.details) < 2 * LONGEST_TEXT


def test_signals_without_a_name() -> None:
    assert (signal_name(11), signal_name(40), signal_name(33)) == ("SIGSEGV", "real-time signal 40", "signal 33")
