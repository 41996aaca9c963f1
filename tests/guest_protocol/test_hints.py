"""The hint protocol: golden bytes both ways, resynchronisation, bombs, and what a hostile guest can cost."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from migd.guest import hints
from migd.guest.hints import (
    MAX_BITMAP_PAGES,
    MAX_BODY_BYTES,
    MAX_RANGES_PER_FRAME,
    Bitmap,
    Done,
    End,
    Greet,
    Hello,
    HintDecoder,
    HintFrame,
    HintType,
    Ranges,
    Request,
    encode,
    encode_ranges,
)

GOLDEN: list[tuple[HintFrame, str]] = [
    (Greet(), "66704831 01 00 0000 02000000 0000000000000000 be23c258 090d4d44 0100"),
    (
        Hello(contract=2, strength=1, page_bytes=4096, pages=262144),
        "66704831 02 00 0000 10000000 0000000000000000 31414c4b 0616b4550100 02 01 00100000 0000040000000000",
    ),
    (Request(7), "66704831 03 00 0000 00000000 0700000000000000 00000000 731a6126"),
    (
        Ranges(7, ((0x1000, 0x2000), (0x100000000, 0x1000))),
        "66704831 04 00 0000 20000000 0700000000000000 8404ea09 efed6568"
        "0010000000000000 0020000000000000 0000000001000000 0010000000000000",
    ),
    (End(7, 5), "66704831 06 00 0000 08000000 0700000000000000 0dd1c22d 403bcabc 0500000000000000"),
    (Done((1 << 64) - 1), "66704831 07 00 0000 00000000 ffffffffffffffff 00000000 a301e302"),
]
BITMAP = Bitmap(9, 0x40000000, 20, b"\x05\x00\x0f")
ANSWER: list[HintFrame] = [
    Hello(1, 0, 4096, 1000), Ranges(3, ((4096, 8192),)), BITMAP, End(3, 7), Request(4), Done(4),
]  # fmt: skip


def frame(
    kind: int,
    body: bytes = b"",
    *,
    epoch: int = 1,
    length: int | None = None,
    zeros: tuple[int, int] = (0, 0),
) -> bytes:
    """A frame with right checks and any content."""
    size = len(body) if length is None else length
    head = struct.pack("<4sBBHIQI", b"fpH1", kind, *zeros, size, epoch, zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


def bitmap_body(pages: int, data: bytes, start: int = 0) -> bytes:
    return struct.pack("<QI", start, pages) + data


def decode(data: bytes, sizes: list[int] | None = None) -> tuple[list[HintFrame], HintDecoder]:
    """All frames, fed in pieces of the given sizes and then whatever is left."""
    decoder, frames, at = HintDecoder(), [], 0
    for size in sizes or []:
        frames += decoder.feed(data[at : at + size])
        at += size
    frames += decoder.feed(data[at:])
    return frames, decoder


# -- golden bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "text"), GOLDEN, ids=lambda value: type(value).__name__)
def test_golden_bytes_through_encoder_and_decoder_byte_by_byte(message: HintFrame, text: str) -> None:
    data = bytes.fromhex(text)
    assert encode(message) == data
    decoder = HintDecoder()
    assert [decoder.feed(data[at : at + 1]) for at in range(len(data) - 1)] == [[]] * (len(data) - 1)
    assert decoder.feed(data[-1:]) == [message]
    assert (decoder.garbage_bytes, decoder.rejected_frames) == (0, 0)


def test_a_bitmap_frame_byte_by_byte() -> None:
    """The compressed bytes are zlib's affair; all around them is fixed, and any zlib stream is read."""
    data = encode(BITMAP)
    assert data[:8].hex(" ", 4) == "66704831 05000000"
    assert data[28:40] == struct.pack("<QI", 0x40000000, 20)
    assert zlib.decompress(data[40:]) == b"\x05\x00\x0f"
    assert decode(data, [1] * len(data))[0] == [BITMAP]
    for level in range(10):
        body = bitmap_body(20, zlib.compress(b"\x05\x00\x0f", level), 0x40000000)
        assert decode(frame(HintType.BITMAP, body, epoch=9))[0] == [BITMAP]


def test_every_frame_type_has_golden_bytes() -> None:
    assert {type(message) for message, _ in GOLDEN} | {Bitmap} == set(hints.HintFrame.__args__)
    assert {bytes.fromhex(text)[4] for _, text in GOLDEN} | {HintType.BITMAP} == set(HintType)


# -- splits, loss, repetition, garbage ------------------------------------------------------------------


@given(sizes=st.lists(st.integers(0, 90), max_size=12))
def test_any_split_of_a_valid_stream_gives_the_same_frames(sizes: list[int]) -> None:
    frames, decoder = decode(b"".join(map(encode, ANSWER)), sizes)
    assert frames == ANSWER
    assert decoder.garbage_bytes == 0


@given(noise=st.lists(st.binary(max_size=40), min_size=7, max_size=7), sizes=st.lists(st.integers(0, 60)))
@example(noise=[b"fpH1", b"f", b"fp", b"fpH", b"fpH1fpH1", b"", b"fpH1" + bytes(30)], sizes=[])
def test_every_frame_between_garbage_is_found(noise: list[bytes], sizes: list[int]) -> None:
    data = b"".join(piece + encode(message) for piece, message in zip(noise, ANSWER, strict=False))
    frames, decoder = decode(data, sizes)
    assert frames == ANSWER
    assert decoder.garbage_bytes == sum(map(len, noise[: len(ANSWER)]))


@pytest.mark.parametrize("lost", [1, 3, 30])
def test_loss_at_every_position_costs_the_frames_it_touches_and_no_other(lost: int) -> None:
    stream = [*ANSWER, Greet(), Greet()]
    encoded = [encode(message) for message in stream]
    whole, tail = b"".join(encoded), encode(Request(99)) * 60  # what a damaged length still waits for
    starts = [sum(map(len, encoded[:number])) for number in range(len(encoded) + 1)]
    for at in range(len(whole) - lost):
        frames, _ = decode(whole[:at] + whole[at + lost :] + tail)
        untouched = [
            message
            for number, message in enumerate(stream)
            if starts[number + 1] <= at or starts[number] >= at + lost
        ]
        # Where the bytes behind a gap equal those lost in it, a frame is whole by luck; it still is genuine.
        rest = iter(frames)
        assert all(message in rest for message in untouched), at
        assert all(one in [*stream, Request(99)] for one in frames)
        assert len(frames) <= len(untouched) + 1 + 60
        assert frames.count(Request(99)) == 60


def test_a_flipped_bit_anywhere_costs_exactly_one_frame() -> None:
    whole = bytearray(b"".join(map(encode, ANSWER)))
    for at in range(len(whole)):
        for bit in range(8):
            whole[at] ^= 1 << bit
            frames, _ = decode(bytes(whole) + encode(Greet()) * 3)
            assert len(frames) == len(ANSWER) - 1 + 3
            assert all(one in [*ANSWER, Greet()] for one in frames)
            whole[at] ^= 1 << bit


def test_repeated_bytes_repeat_frames_and_break_none() -> None:
    whole = b"".join(map(encode, ANSWER))
    for at in range(len(whole)):
        frames, _ = decode(whole[:at] + whole + encode(Greet()))
        assert frames[-len(ANSWER) - 1 :] == [*ANSWER, Greet()]


@given(data=st.binary(max_size=300), sizes=st.lists(st.integers(0, 50)))
def test_garbage_never_raises_and_never_is_a_frame(data: bytes, sizes: list[int]) -> None:
    frames, decoder = decode(data, sizes)
    assert frames == []
    assert decoder.garbage_bytes <= len(data)


@given(kind=st.integers(0, 255), body=st.binary(max_size=80), zeros=st.sampled_from([(0, 0), (1, 0), (0, 1)]))
def test_right_checks_around_any_content_never_raise(kind: int, body: bytes, zeros: tuple[int, int]) -> None:
    frames, decoder = decode(frame(kind, body, zeros=zeros) + encode(Greet()))
    assert frames[-1] == Greet()
    assert len(frames) + decoder.rejected_frames + (zeros != (0, 0)) == 2
    for one in frames[:-1]:
        assert decode(encode(one))[0] == [one]


def test_garbage_is_not_hoarded() -> None:
    decoder = HintDecoder()
    for _ in range(100):
        decoder.feed(b"x" * 10_000)
    assert len(decoder._buffer) < 4
    assert decoder.garbage_bytes >= 999_990


# -- content that does not fit its type -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (HintType.GREET, b""), (HintType.GREET, b"\1\0\0"),
        (HintType.HELLO, bytes(15)), (HintType.HELLO, bytes(17)),
        (HintType.REQUEST, b"\0"), (HintType.DONE, b"\0"), (HintType.END, bytes(7)), (HintType.END, bytes(9)),
        (HintType.RANGES, bytes(15)), (HintType.RANGES, bytes(17)),
        (HintType.RANGES, bytes(16 * MAX_RANGES_PER_FRAME + 16)), (HintType.BITMAP, b""),
        (HintType.BITMAP, bytes(11)), (0, b""), (8, b""), (255, b"x"),
    ],
)  # fmt: skip
def test_a_body_of_the_wrong_length_or_type_is_rejected_and_counted(kind: int, body: bytes) -> None:
    frames, decoder = decode(frame(kind, body) + encode(Greet()))
    assert frames == [Greet()]
    assert (decoder.rejected_frames, decoder.garbage_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("no pages", bitmap_body(0, zlib.compress(b""))),
        ("too many pages", bitmap_body(MAX_BITMAP_PAGES + 1, zlib.compress(bytes(MAX_BODY_BYTES + 1)))),
        ("the most pages there can be", bitmap_body(0xFFFF_FFFF, zlib.compress(b"\0"))),
        ("a byte too few", bitmap_body(24, zlib.compress(b"ab"))),
        ("a byte too many", bitmap_body(24, zlib.compress(b"abcd"))),
        ("a bomb", bitmap_body(24, zlib.compress(bytes(500 << 20 >> 3), 9))),
        ("cut", bitmap_body(24, zlib.compress(b"abc")[:-1])),
        ("cut to the checksum", bitmap_body(24, zlib.compress(b"abc")[:-4])),
        ("a wrong checksum", bitmap_body(24, zlib.compress(b"abc")[:-1] + b"\xff")),
        ("bytes behind the end", bitmap_body(24, zlib.compress(b"abc") + b"x")),
        ("no zlib", bitmap_body(24, b"abc")),
        ("a wanted dictionary", bitmap_body(24, b"\x78\x20\x00\x00\x00\x01abc")),
        ("nothing", bitmap_body(24, b"")),
        ("a bit beyond the last page", bitmap_body(20, zlib.compress(b"\0\0\x10"))),
    ],
)
def test_a_bad_bitmap_is_rejected(name: str, body: bytes) -> None:
    frames, decoder = decode(frame(HintType.BITMAP, body) + encode(Greet()))
    assert frames == [Greet()]
    assert decoder.rejected_frames == 1


def test_the_output_of_a_bomb_is_bounded() -> None:
    """62 MiB of zeros in 64 KiB, announced as 24 pages: zlib is asked for four bytes."""
    bomb = frame(HintType.BITMAP, bitmap_body(24, zlib.compress(bytes(62 << 20), 9)))
    tracemalloc.start()
    try:
        frames, _ = decode(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frames == []
    assert peak < 1 << 20


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 63, 64, 65, 4096, MAX_BITMAP_PAGES])
def test_bitmaps_of_every_size_survive_the_round_trip(pages: int) -> None:
    bits = bytearray(b"\xff" * (-(-pages // 8)))
    if pages % 8:
        bits[-1] >>= 8 - pages % 8
    message = Bitmap(1, 4096, pages, bytes(bits))
    assert decode(encode(message))[0] == [message]


def test_an_announced_length_beyond_the_limit_is_garbage_at_once() -> None:
    frames, decoder = decode(frame(HintType.RANGES, b"", length=MAX_BODY_BYTES + 1) + encode(Greet()))
    assert frames == [Greet()]
    assert decoder.garbage_bytes == 28


def test_ranges_are_cut_into_frames_within_the_limit() -> None:
    pairs = [(4096 * number, 4096) for number in range(2 * MAX_RANGES_PER_FRAME + 1)]
    frames = list(encode_ranges(5, iter(pairs)))
    assert [len(one) - 28 for one in frames] == [16 * MAX_RANGES_PER_FRAME] * 2 + [16]
    assert [pair for one in decode(b"".join(frames))[0] for pair in one.ranges] == pairs
    assert list(encode_ranges(5, [])) == []
    with pytest.raises(ValueError, match="exceeds"):
        encode(Ranges(5, tuple(pairs)))
    incompressible = random.Random(1).randbytes(MAX_BODY_BYTES)
    with pytest.raises(ValueError, match="exceeds"):
        encode(Bitmap(5, 0, MAX_BITMAP_PAGES, incompressible))


# -- what a hostile guest can cost (G6) -----------------------------------------------------------------


def test_headers_within_headers_do_not_multiply_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 bytes that promise 1 MiB, over and over: each body is damaged and contains the next header."""
    summed = 0
    real = zlib.crc32

    def counting(data: bytes) -> int:
        nonlocal summed
        summed += len(data)
        return real(data)

    header = frame(HintType.END, b"", length=MAX_BODY_BYTES)
    data = header * (3 * MAX_BODY_BYTES // len(header)) + bytes(MAX_BODY_BYTES)
    monkeypatch.setattr(hints.zlib, "crc32", counting)
    frames, _ = decode(data + b"".join(map(encode, ANSWER)) * 2)
    assert frames[-len(ANSWER) :] == ANSWER  # it still resynchronises
    assert summed <= hints.MAX_REREAD_BYTES + 3 * len(data)
