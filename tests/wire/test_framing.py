"""R16: the stream is hostile. Every wrong size, count, run, number and digest is a ProtocolError, in time."""

from __future__ import annotations

import random
import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.errors import ProtocolError
from migd.ram.digest import frame_digest
from migd.wire import messages
from migd.wire.codec import compress
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder, OtherFraming
from migd.wire.protocol import (
    FRAMING_VERSION,
    HEADER,
    HEADER_BYTES,
    MAX_METADATA_BYTES,
    MAX_PAGES_PER_FRAME,
    MAX_PAYLOAD_BYTES,
    MAX_RUNS_PER_FRAME,
    Codec,
    FrameType,
)
from tests.wire.feeding import Feed

ID = "0123456789abcdef" * 2
RAM_PAGES = 1000
PAGE = bytes(4096)
READY = messages.Ready(migration=ID)


def frame(
    kind: int = FrameType.ZERO,
    metadata: bytes = struct.pack("<II", 0, 1),
    *,
    count: int = 1,
    runs: int = 1,
    codec: int = 0,
    payload: bytes = b"",
    sequence: int = 0,
    magic: bytes = b"MIGD",
    version: int = FRAMING_VERSION,
    zero: int = 0,
    metadata_bytes: int | None = None,
    payload_bytes: int | None = None,
    digest: bytes | None = None,
) -> bytes:
    """A frame with a right digest around any header and content; without arguments a valid ZERO record."""
    sizes = (
        len(metadata) if metadata_bytes is None else metadata_bytes,
        len(payload) if payload_bytes is None else payload_bytes,
    )
    head = HEADER.pack(magic, version, kind, codec, zero, sequence, count, runs, *sizes, bytes(16))[:32]
    return head + (frame_digest(head + metadata) if digest is None else digest) + metadata + payload


def table(*runs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<II", first, pages) for first, pages in runs)


def pages_frame(count: int, runs: int = 1, digests: int | None = None, **fields: object) -> bytes:
    """A PAGES frame with room for ``runs`` runs and ``digests`` digests, all zero but the first run."""
    metadata = table((0, count)) + bytes(8 * (runs - 1)) + bytes(16 * (count if digests is None else digests))
    return frame(FrameType.PAGES, metadata, count=count, runs=runs, **fields)  # type: ignore[arg-type]


# -- headers --------------------------------------------------------------------------------------------

BAD_FRAMES: dict[str, bytes] = {
    "magic": frame(magic=b"MIGE"),
    "magic of another protocol": b"GET / HTTP/1.1\r\nHost: destination.example\r\n\r\n" + bytes(16),
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
    "framing version 0": frame(version=0),
    "framing version 1": frame(version=1),
    "framing version 3": frame(version=3),
    "type 0": frame(0),
    "type 12": frame(12),
    "type 255": frame(255),
    "codec 2": pages_frame(1, codec=2, payload=PAGE),
    "codec on ZERO": frame(codec=1),
    "codec on a message": frame(FrameType.READY, b"\x80", count=0, runs=0, codec=1),
    "the reserved byte": frame(zero=1),
    "sequence of the next frame": frame(sequence=1),
    "the last sequence there is": frame(sequence=(1 << 64) - 1),
    "digest": frame(digest=bytes(16)),
    "metadata beyond the limit": frame(FrameType.STATE, b"", count=0, runs=0,
                                       metadata_bytes=MAX_METADATA_BYTES + 1),
    "metadata of 4 GiB": frame(FrameType.STATE, b"", count=0, runs=0, metadata_bytes=(1 << 32) - 1),
    "count on a message": frame(FrameType.READY, b"\x80", count=1, runs=0),
    "runs on a message": frame(FrameType.READY, b"\x80", count=0, runs=1),
    "payload on a message": frame(FrameType.READY, b"\x80", count=0, runs=0, payload=b"x"),
    "payload on STATE": frame(FrameType.STATE, b"state", count=0, runs=0, payload=b"x"),
    "payload on FREE": frame(FrameType.FREE, payload=b"x"),
    "ZERO without runs": frame(metadata=b"", count=0, runs=0),
    "ZERO of no page": frame(count=0),
    "fewer pages than runs": frame(metadata=table((0, 1), (2, 1)), count=1, runs=2),
    "metadata shorter than its runs": frame(metadata=table((0, 1)), count=2, runs=2),
    "metadata longer than its runs": frame(metadata=table((0, 1)) + b"x"),
    "too many runs": frame(metadata=b"", count=MAX_RUNS_PER_FRAME + 1, runs=MAX_RUNS_PER_FRAME + 1,
                           metadata_bytes=8 * (MAX_RUNS_PER_FRAME + 1)),
    "too many pages": pages_frame(MAX_PAGES_PER_FRAME + 1, payload_bytes=4096 * (MAX_PAGES_PER_FRAME + 1)),
    "a digest too few": pages_frame(2, digests=1, payload=PAGE * 2),
    "a digest too many": pages_frame(2, digests=3, payload=PAGE * 2),
    "a raw payload of a page too few": pages_frame(2, payload=PAGE),
    "a raw payload of a byte too few": pages_frame(1, payload=PAGE[1:]),
    "a raw payload of a byte too many": pages_frame(1, payload=PAGE + b"x"),
    "no raw payload": pages_frame(1),
    "no lz4 payload": pages_frame(1, codec=1),
    "an lz4 payload that does not save a byte": pages_frame(1, codec=1, payload=PAGE),
    "a payload beyond the limit": pages_frame(1, codec=1, payload_bytes=MAX_PAYLOAD_BYTES + 1),
    "a payload of 4 GiB": pages_frame(1, codec=1, payload_bytes=(1 << 32) - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_frame_that_is_wrong_in_one_thing_is_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        Feed().feed(BAD_FRAMES[name])


def test_what_the_table_is_built_from_is_right() -> None:
    """Else every row of the table above might fail for the same wrong reason."""
    good = [
        frame(),
        frame(FrameType.FREE),
        frame(FrameType.STATE, b"state", count=0, runs=0),
        frame(FrameType.STATE, bytes(MAX_METADATA_BYTES), count=0, runs=0),
        frame(FrameType.READY, msgspec.msgpack.encode({"migration": ID}), count=0, runs=0),
        pages_frame(1, payload=PAGE),
        pages_frame(1, codec=1, payload=PAGE[1:]),
        pages_frame(MAX_PAGES_PER_FRAME, payload=PAGE * MAX_PAGES_PER_FRAME),
        frame(metadata=table(*((2 * at, 1) for at in range(MAX_RUNS_PER_FRAME))), count=MAX_RUNS_PER_FRAME,
              runs=MAX_RUNS_PER_FRAME),
    ]  # fmt: skip
    for data in good:
        feed = Feed().feed(data)
        assert len(feed.frames) == 1
        assert feed.decoder.at_boundary


def test_the_refusal_says_which_frame_and_what() -> None:
    with pytest.raises(ProtocolError, match="does not speak the migd protocol"):
        Feed().feed(frame(magic=b"HTTP"))
    with pytest.raises(
        OtherFraming, match=r"version 3, this side \(migd .*\) with 2: update migd on this side"
    ):
        Feed().feed(frame(version=3))
    with pytest.raises(OtherFraming, match=r"version 1, .* with 2: update migd on the other side"):
        Feed().feed(frame(version=1))
    with pytest.raises(ProtocolError, match=r"frame 7 where 0 was due"):
        Feed().feed(frame(sequence=7))
    with pytest.raises(ProtocolError, match=r"frame 0 \(ZERO\): the digest is wrong"):
        Feed().feed(frame(digest=bytes(16)))
    with pytest.raises(ProtocolError, match=r"frame 0 \(PAGES\): count 513"):
        Feed().feed(BAD_FRAMES["too many pages"])


@pytest.mark.parametrize("behind", [bytes(43), b"\xff" * 43, bytes(range(43))])
def test_of_another_framing_version_nothing_but_the_version_is_read(behind: bytes) -> None:
    """Whatever a later one makes of the other 43 bytes, the refusal names both versions."""
    with pytest.raises(OtherFraming, match="version 9"):
        Feed().feed(b"MIGD\x09" + behind)


def test_a_lost_frame_and_a_repeated_frame_show() -> None:
    encoder = FrameEncoder()
    first, second, third = (encoder.message(READY) for _ in range(3))
    assert len(Feed().feed(first + second + third).frames) == 3
    with pytest.raises(ProtocolError, match="frame 2 where 1 was due"):
        Feed().feed(first + third)
    with pytest.raises(ProtocolError, match="frame 0 where 1 was due"):
        Feed().feed(first + first)
    with pytest.raises(ProtocolError, match="frame 1 where 0 was due"):
        Feed().feed(second + first)


def test_every_flipped_bit_of_header_and_metadata_is_noticed() -> None:
    data = bytearray(frame(metadata=table((0, 1), (5, 2)), count=3, runs=2))
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        feed = Feed()
        try:
            feed.feed(bytes(data))
        except ProtocolError:
            pass
        else:
            assert feed.frames == [], bit  # a longer length: more is awaited, nothing was believed
        data[bit // 8] ^= 1 << bit % 8
    assert len(Feed().feed(bytes(data)).frames) == 1


# -- runs -----------------------------------------------------------------------------------------------


def decoded(data: bytes) -> Frame:
    (found,) = Feed().feed(data).frames
    return found


@pytest.mark.parametrize("kind", [FrameType.ZERO, FrameType.FREE])
@pytest.mark.parametrize(
    ("name", "runs", "count"),
    [
        ("touching", [(0, 2), (2, 1)], 3),
        ("overlapping", [(0, 3), (2, 2)], 5),
        ("the same twice", [(4, 1), (4, 1)], 2),
        ("one within another", [(0, 9), (2, 2)], 11),
        ("descending", [(10, 1), (5, 1)], 2),
        ("empty", [(3, 0), (5, 1)], 2),
        ("empty, last", [(3, 1), (5, 0)], 2),
        ("a page beyond RAM", [(RAM_PAGES, 1)], 1),
        ("up to a page beyond RAM", [(RAM_PAGES - 1, 2)], 2),
        ("the last page there can be", [(0, 1), (0xFFFFFFFF, 1)], 2),
        ("a length that wraps around", [(5, 0xFFFFFFFF)], 0xFFFFFFFF),
        ("first and length that wrap around", [(0xFFFFFFFF, 0xFFFFFFFF)], 0xFFFFFFFF),
        ("a page fewer than announced", [(0, 2)], 3),
        ("a page more than announced", [(0, 4)], 3),
    ],
)
def test_runs_that_lie_are_refused(
    kind: FrameType, name: str, runs: list[tuple[int, int]], count: int
) -> None:
    found = decoded(frame(kind, table(*runs), count=count, runs=len(runs)))
    with pytest.raises(ProtocolError, match=kind.name):
        found.page_runs(RAM_PAGES)


def test_runs_at_the_limits_are_taken() -> None:
    found = decoded(frame(metadata=table((0, 1), (2, RAM_PAGES - 2)), count=RAM_PAGES - 1, runs=2))
    assert found.page_runs(RAM_PAGES) == [(0, 1), (2, RAM_PAGES)]
    found = decoded(frame(metadata=table((0xFFFFFFFE, 1)), count=1, runs=1))
    assert found.page_runs(1 << 32) == [(0xFFFFFFFE, 0xFFFFFFFF)]


def test_runs_of_a_pages_frame_are_checked_the_same_way() -> None:
    metadata = table((0, 1), (1, 1)) + bytes(32)
    found = decoded(frame(FrameType.PAGES, metadata, count=2, runs=2, payload=PAGE * 2))
    with pytest.raises(ProtocolError, match="PAGES"):
        found.page_runs(RAM_PAGES)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_runs_survive_the_round_trip(pages: set[int]) -> None:
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    found = decoded(FrameEncoder().runs(FrameType.FREE, runs))
    assert found.count == len(pages)
    assert found.page_runs(301) == runs


# -- messages -------------------------------------------------------------------------------------------

GOOD = {"migration": ID, "nonce": 1}
BAD_MESSAGES: dict[str, bytes] = {
    "nothing": b"",
    "no map": msgspec.msgpack.encode([1]),
    "no MessagePack": b"\xc1",
    "cut": msgspec.msgpack.encode(GOOD)[:-1],
    "bytes behind it": msgspec.msgpack.encode(GOOD) + b"\0",
    "a missing field": msgspec.msgpack.encode({"migration": ID}),
    "an unknown field": msgspec.msgpack.encode({**GOOD, "extra": 1}),
    "an ill-typed field": msgspec.msgpack.encode({**GOOD, "nonce": "1"}),
    "a negative count": msgspec.msgpack.encode({**GOOD, "nonce": -1}),
    "no id": msgspec.msgpack.encode({**GOOD, "migration": ""}),
    "an id in upper case": msgspec.msgpack.encode({**GOOD, "migration": ID.upper()}),
    "a path as id": msgspec.msgpack.encode({**GOOD, "migration": "../../etc/passwd"}),
    "an id with a line feed": msgspec.msgpack.encode({**GOOD, "migration": ID + "\n"}),
    "an id that is not UTF-8": msgspec.msgpack.encode(GOOD).replace(b"0123", b"01\xff3", 1),
    "a key that is not UTF-8": msgspec.msgpack.encode(GOOD).replace(b"nonce", b"n\xff\xffce", 1),
    "nesting without end": b"\x82\xa5nonce" + b"\x91" * 500_000,
    "nesting without end, unknown": b"\x82\xa5nosey" + b"\x91" * 500_000,
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_is_a_protocol_error_that_names_it(name: str) -> None:
    found = decoded(frame(FrameType.PING, BAD_MESSAGES[name], count=0, runs=0))
    with pytest.raises(ProtocolError, match="PING"):
        found.message()


def test_page_records_are_no_messages() -> None:
    with pytest.raises(ProtocolError, match="a ZERO frame where a message was expected"):
        decoded(frame()).message()


# -- nothing is allocated before its size is checked ----------------------------------------------------


def test_a_bad_size_allocates_nothing() -> None:
    for name in ("metadata of 4 GiB", "a payload of 4 GiB", "too many pages", "too many runs"):
        decoder = FrameDecoder()
        decoder.next_buffer()[:] = BAD_FRAMES[name][:HEADER_BYTES]
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError):
                decoder.advance(HEADER_BYTES)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 << 10, name


def test_a_buffer_never_is_larger_than_the_frame_needs() -> None:
    feed = Feed().feed(pages_frame(3, payload=PAGE * 3) + frame(sequence=1))
    assert feed.largest_buffer == 3 * 4096
    assert len(feed.decoder.next_buffer()) == HEADER_BYTES


def test_a_connection_cut_anywhere_inside_a_frame_is_not_at_a_boundary() -> None:
    data = pages_frame(1, codec=1, payload=b"xyz")
    for cut in range(1, len(data)):
        feed = Feed().feed(data[:cut])
        assert not feed.decoder.at_boundary
        assert feed.frames == []
    assert FrameDecoder().at_boundary
    assert Feed().feed(data).decoder.at_boundary


# -- END's account --------------------------------------------------------------------------------------


def recorded() -> tuple[bytes, FrameEncoder]:
    """A short, valid data stream as a source sends it."""
    encoder = FrameEncoder()
    content = bytes(range(256)) * 48
    packed = compress(memoryview(content))
    parts = [
        encoder.message(messages.Stream(migration=ID, token=bytes(16), index=0)),
        encoder.runs(FrameType.ZERO, [(0, 10), (20, 30)]),
        encoder.pages([(10, 12), (13, 14)], bytes(48), Codec.LZ4, len(packed)),
        packed,
        encoder.pages([(30, 33)], bytes(48), Codec.NONE, len(content)),
        content,
        encoder.message(messages.Barrier(migration=ID, iteration=0)),
        encoder.runs(FrameType.FREE, [(10, 11)]),
        encoder.message(encoder.account.end(ID)),
    ]
    return b"".join(parts), encoder


def test_both_sides_count_the_same() -> None:
    data, encoder = recorded()
    feed = Feed().feed(data)
    account = feed.decoder.account
    assert account == encoder.account
    assert (account.frames, account.pages, account.zero, account.free) == (4, 6, 20, 1)
    assert feed.frames[-1].message() == account.end(ID)


def test_the_accounts_digest_depends_on_content_and_order() -> None:
    first, second, third = FrameEncoder(), FrameEncoder(), FrameEncoder()
    first.runs(FrameType.ZERO, [(0, 1)])
    first.runs(FrameType.ZERO, [(2, 3)])
    second.runs(FrameType.ZERO, [(2, 3)])
    second.runs(FrameType.ZERO, [(0, 1)])
    third.runs(FrameType.ZERO, [(0, 1)])
    third.runs(FrameType.FREE, [(2, 3)])
    assert len({one.account.digest for one in (first, second, third)}) == 3


def test_messages_do_not_count() -> None:
    encoder = FrameEncoder()
    encoder.message(READY)
    encoder.state(b"state")
    assert encoder.account == FrameEncoder().account


# -- any damage at all ----------------------------------------------------------------------------------

MUTATIONS = 3000


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three of: flip a bit, set a byte or four, cut, drop, repeat, insert, swap."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(max(1, len(damaged))), rng.choice((1, 4, 16, 48, 300))
        match rng.randrange(7):
            case 0 if damaged:
                damaged[at] ^= 1 << rng.randrange(8)
            case 1:
                damaged[at : at + 1] = rng.choice((b"\0", b"\x7f", b"\x80", b"\xff"))
            case 2:
                damaged[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, rng.randbytes(4)))
            case 3:
                del damaged[at:]
            case 4:
                del damaged[at : at + size]
            case 5:
                damaged[at:at] = damaged[at : at + size]
            case _:
                damaged[at:at] = rng.randbytes(size)
    return bytes(damaged)


def reseal(data: bytes) -> bytes:
    """The same bytes with every frame digest made right as far as the frames can be told apart.

    A peer that is authenticated and hostile computes right digests: without this, hardly any damage would
    get past them.
    """
    sealed, at = bytearray(data), 0
    while at + HEADER_BYTES <= len(sealed):
        metadata, payload = struct.unpack_from("<II", sealed, at + 24)
        if metadata > MAX_METADATA_BYTES or payload > MAX_PAYLOAD_BYTES:
            break
        content = sealed[at + HEADER_BYTES : at + HEADER_BYTES + metadata]
        sealed[at + 32 : at + 48] = frame_digest(bytes(sealed[at : at + 32] + content))
        at += HEADER_BYTES + metadata + payload
    return bytes(sealed)


@pytest.mark.parametrize("hostile", [False, True], ids=["accident", "resealed"])
def test_a_damaged_stream_gives_frames_or_a_protocol_error_and_nothing_else(hostile: bool) -> None:
    data, _ = recorded()
    whole = Feed().feed(data)
    genuine = {frame.digest for frame in whole.frames}
    rng = random.Random(20240607)
    refused = accepted = 0
    for _ in range(MUTATIONS):
        damaged = mutated(data, rng)
        feed = Feed()
        try:
            feed.feed(reseal(damaged) if hostile else damaged, [rng.randint(1, 4096) for _ in range(8)])
            for found in feed.frames:
                if found.run_count:
                    found.page_runs(RAM_PAGES)
                elif found.type is not FrameType.STATE:
                    found.message()
            accepted += 1
        except ProtocolError:
            refused += 1
        assert feed.largest_buffer <= MAX_PAYLOAD_BYTES
        assert len(feed.decoder._payload) in (0, MAX_PAYLOAD_BYTES)
        assert hostile or {found.digest for found in feed.frames} <= genuine
    assert refused > MUTATIONS // 2
    assert refused + accepted == MUTATIONS
