"""The agent's own copy of the hint protocol against migd's: the same bytes both ways, and what is skipped."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from migd.guest import agent, hints
from migd.guest.hints import (
    Done,
    End,
    Greet,
    Hello,
    HintDecoder,
    HintFrame,
    HintType,
    Ranges,
    Request,
    Strength,
)
from migd.ram.contract import FreeContract

FROM_HOST: list[tuple[HintFrame, agent.Frame]] = [
    (Greet(), (agent.GREET, 0, b"\1\0")),
    (Request(7), (agent.REQUEST, 7, b"")),
    (Request((1 << 64) - 1), (agent.REQUEST, (1 << 64) - 1, b"")),
    (Done(7), (agent.DONE, 7, b"")),
]
HOST_SAYS = b"".join(hints.encode(frame) for frame, _ in FROM_HOST)
HEARD = [heard for _, heard in FROM_HOST]

FROM_GUEST: list[tuple[HintFrame, bytes]] = [
    (Hello(FreeContract.ZERO, Strength.WEAK, agent.PAGE_BYTES, 262144), agent.hello(agent.ZERO, 262144)),
    (Hello(FreeContract.NONE, Strength.WEAK, agent.PAGE_BYTES, 0), agent.hello(agent.NONE, 0)),
    (
        Ranges(7, ((0x1000, 0x2000), (0x100000000, 0x1000))),
        agent.encode(agent.RANGES, 7, struct.pack("<4Q", 0x1000, 0x2000, 0x100000000, 0x1000)),
    ),
    (End(7, 5), agent.encode(agent.END, 7, struct.pack("<Q", 5))),
]


def hear(data: bytes, sizes: list[int] | None = None) -> list[agent.Frame]:
    """What a reader makes of it, fed in pieces of these sizes and then whatever is left."""
    reader, heard, at = agent.FrameReader(), [], 0
    for size in sizes or []:
        heard += reader.feed(data[at : at + size])
        at += size
    return heard + reader.feed(data[at:])


def frame(
    kind: int, body: bytes = b"", *, length: int | None = None, zeros: tuple[int, int] = (0, 0)
) -> bytes:
    """A frame with right checks and any content."""
    size = len(body) if length is None else length
    head = struct.pack("<4sBBHIQI", b"fpH1", kind, *zeros, size, 0, zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


# -- the same bytes on both sides -------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_specification() -> None:
    kinds = [agent.GREET, agent.HELLO, agent.REQUEST, agent.RANGES, agent.BITMAP, agent.END, agent.DONE]
    assert kinds == list(HintType)
    assert list(FreeContract) == [agent.NONE, agent.ANYTHING, agent.ZERO]
    assert tuple(contract.name for contract in FreeContract) == agent.CONTRACT_NAMES
    assert (agent.PROTOCOL_VERSION, agent.WEAK) == (hints.VERSION, Strength.WEAK)


@pytest.mark.parametrize(("said", "heard"), FROM_HOST, ids=lambda value: type(value).__name__)
def test_the_host_is_understood_byte_by_byte(said: HintFrame, heard: agent.Frame) -> None:
    data = hints.encode(said)
    assert agent.encode(*heard) == data
    reader = agent.FrameReader()
    assert [reader.feed(data[at : at + 1]) for at in range(len(data) - 1)] == [[]] * (len(data) - 1)
    assert reader.feed(data[-1:]) == [heard]


@pytest.mark.parametrize(("meant", "data"), FROM_GUEST, ids=lambda value: type(value).__name__)
def test_the_agent_is_understood_byte_by_byte(meant: HintFrame, data: bytes) -> None:
    assert hints.encode(meant) == data
    decoder = HintDecoder()
    assert [frame for at in range(len(data)) for frame in decoder.feed(data[at : at + 1])] == [meant]
    assert (decoder.garbage_bytes, decoder.rejected_frames) == (0, 0)


# -- splits, loss, garbage --------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 60), max_size=12))
def test_any_split_gives_the_same_frames(sizes: list[int]) -> None:
    assert hear(HOST_SAYS, sizes) == HEARD


@given(noise=st.lists(st.binary(max_size=40), min_size=4, max_size=4), sizes=st.lists(st.integers(0, 60)))
@example(noise=[b"fpH1", b"fpH1fpH1", b"", b"fpH1" + bytes(30)], sizes=[])
def test_every_frame_between_garbage_is_found(noise: list[bytes], sizes: list[int]) -> None:
    data = b"".join(piece + hints.encode(said) for piece, (said, _) in zip(noise, FROM_HOST, strict=True))
    assert hear(data, sizes) == HEARD


@pytest.mark.parametrize("lost", [1, 3, 30])
def test_loss_at_every_position_is_what_it_is_to_the_host_s_decoder(lost: int) -> None:
    tail = hints.encode(Request(99)) * 3
    for at in range(len(HOST_SAYS) - lost):
        data = HOST_SAYS[:at] + HOST_SAYS[at + lost :] + tail
        expected = [agent.encode(*heard) for heard in hear(data)]
        assert [hints.encode(one) for one in HintDecoder().feed(data)] == expected
        assert expected[-1] == hints.encode(Request(99))


def test_a_flipped_bit_anywhere_costs_exactly_one_frame() -> None:
    data = bytearray(HOST_SAYS)
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            heard = hear(bytes(data) + hints.encode(Greet()) * 150)  # what a damaged length waits for
            assert len([one for one in heard if one != HEARD[0]]) in (2, 3)
            assert len(heard) == len(FROM_HOST) - 1 + 150
            data[at] ^= 1 << bit


@given(data=st.binary(max_size=300), sizes=st.lists(st.integers(0, 50)))
def test_garbage_is_no_frame(data: bytes, sizes: list[int]) -> None:
    assert hear(data, sizes) == []


def test_garbage_is_not_hoarded() -> None:
    reader = agent.FrameReader()
    for _ in range(100):
        reader.feed(b"fpH" + b"x" * 10_000)
    assert len(reader._buffer) < 4


def test_the_buffer_is_bounded_by_the_longest_body() -> None:
    """What announces more is no host's frame, however right its checks are."""
    reader = agent.FrameReader()
    longest = frame(agent.GREET, length=agent.MAX_TAKEN_BODY_BYTES)
    assert reader.feed(longest + bytes(agent.MAX_TAKEN_BODY_BYTES - 1)) == []
    assert len(reader._buffer) < len(longest) + agent.MAX_TAKEN_BODY_BYTES
    assert reader.feed(b"x" + HOST_SAYS) == HEARD
    assert hear(frame(agent.GREET, length=agent.MAX_TAKEN_BODY_BYTES + 1) + HOST_SAYS) == HEARD


# -- frames that a host of this version does not send -----------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        hints.encode(Greet(version=2)), hints.encode(Greet(version=0)),
        frame(agent.GREET), frame(agent.GREET, b"\1\0\0"),
        frame(agent.REQUEST, b"x"), frame(agent.DONE, b"x"),
        frame(agent.REQUEST, zeros=(1, 0)), frame(agent.REQUEST, zeros=(0, 1)),
        frame(0), frame(8), frame(255, b"x"),
        *(data for _, data in FROM_GUEST),
    ],
)  # fmt: skip
def test_they_are_ignored_and_the_next_one_is_heard(data: bytes) -> None:
    assert hear(data + HOST_SAYS) == HEARD
