"""lz4 payloads, right and wrong; and the choice between lz4 and raw as a policy without a clock."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.errors import ProtocolError
from migd.wire.codec import SAMPLE_BYTES, CodecChoice, compress, decompress
from migd.wire.protocol import Codec

MB = 1e6
CHUNK = 1 << 20


@given(st.binary(min_size=1, max_size=20_000))
def test_round_trip(data: bytes) -> None:
    assert decompress(memoryview(compress(memoryview(data))), len(data)) == data


def test_memory_that_repeats_gets_small() -> None:
    assert len(compress(memoryview(bytes(CHUNK)))) < CHUNK // 200


@pytest.mark.parametrize(
    ("name", "data", "announced"),
    [
        ("shorter than announced", compress(memoryview(bytes(4096))), 8192),
        ("longer than announced", compress(memoryview(bytes(8192))), 4096),
        ("a byte too long", compress(memoryview(bytes(4097))), 4096),
        ("a bomb", compress(memoryview(bytes(64 << 20))), 4096),
        ("cut", compress(memoryview(random.Random(1).randbytes(4096)))[:-1], 4096),
        ("garbage", b"\xff" * 100, 4096),
        ("one byte", b"\xff", 4096),
        ("a match before the beginning", bytes.fromhex("1f41ffff") + b"\xff" * 15 + b"\x50AAAAA", 4096),
        ("nothing", b"", 4096),
    ],
)
def test_a_payload_that_does_not_unpack_to_its_pages_is_a_protocol_error(
    name: str, data: bytes, announced: int
) -> None:
    with pytest.raises(ProtocolError, match="lz4"):
        decompress(memoryview(data), announced)


@given(st.binary(max_size=300))
def test_garbage_never_is_anything_but_an_error_or_the_right_size(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert len(decompress(memoryview(data), 4096)) == 4096


# -- CodecChoice ------------------------------------------------------------------------------------------


def drive(
    choice: CodecChoice, chunks: int, *, link: float, lz4: float = 650 * MB, ratio: float = 2.0
) -> list[Codec]:
    """What is chosen for ``chunks`` chunks where link and lz4 have these bytes per second."""
    chosen = []
    for _ in range(chunks):
        if choice.sample_due():
            choice.packed(SAMPLE_BYTES, int(SAMPLE_BYTES / ratio), SAMPLE_BYTES / lz4)
        codec = choice.choose()
        chosen.append(codec)
        size = float(CHUNK)
        if codec is Codec.LZ4:
            choice.packed(CHUNK, int(CHUNK / ratio), CHUNK / lz4)
            size = CHUNK / ratio
        choice.sent(int(size), size / link)
    return chosen


def share(chosen: list[Codec]) -> float:
    """Of chunks that were compressed."""
    return chosen.count(Codec.LZ4) / len(chosen)


def test_a_slow_link_gets_lz4() -> None:
    assert share(drive(CodecChoice(), 200, link=100 * MB)) > 0.99  # but for the first


def test_a_fast_link_gets_raw_pages() -> None:
    assert share(drive(CodecChoice(), 650, link=3000 * MB)) == 0


def test_raw_traffic_is_sampled_now_and_then() -> None:
    choice, samples = CodecChoice(), 0
    for _ in range(800):
        samples += choice.sample_due()
        drive(choice, 1, link=3000 * MB)
    assert 0 < samples * SAMPLE_BYTES < 800 * CHUNK / 100


def test_memory_that_does_not_compress_goes_raw_on_any_link() -> None:
    for ratio in (1.0, 0.99):
        assert share(drive(CodecChoice(), 650, link=10 * MB, ratio=ratio)) == 0


@pytest.mark.parametrize(("factor", "pays"), [(0.9, True), (1.1, False)])
def test_the_limit_is_where_packing_takes_as_long_as_sending_what_it_saves(factor: float, pays: bool) -> None:
    """lz4 at 650 MB/s that halves: worth it on links below 325 MB/s."""
    assert (share(drive(CodecChoice(), 300, link=325 * MB * factor)) > 0.5) is pays


def test_a_link_that_becomes_slow_is_noticed() -> None:
    choice = CodecChoice()
    drive(choice, 200, link=3000 * MB)
    drive(choice, 200, link=50 * MB)
    assert share(drive(choice, 100, link=50 * MB)) == 1


def test_a_link_that_becomes_fast_is_noticed() -> None:
    choice = CodecChoice()
    drive(choice, 200, link=50 * MB)
    drive(choice, 200, link=3000 * MB)
    assert share(drive(choice, 200, link=3000 * MB)) == 0


def test_memory_that_begins_to_compress_is_noticed_by_the_samples() -> None:
    choice = CodecChoice()
    drive(choice, 200, link=100 * MB, ratio=1.0)
    drive(choice, 64 * 40, link=100 * MB, ratio=4.0)
    assert share(drive(choice, 100, link=100 * MB, ratio=4.0)) == 1


@pytest.mark.parametrize("codec", Codec)
def test_a_fixed_codec_is_never_questioned(codec: Codec) -> None:
    for link in (1 * MB, 9000 * MB):
        assert set(drive(CodecChoice(codec), 200, link=link)) == {codec}


def test_a_clock_that_stands_still_does_no_harm() -> None:
    choice = CodecChoice()
    for _ in range(100):
        choice.choose()
        choice.packed(CHUNK, CHUNK // 2, 0.0)
        choice.sent(CHUNK, 0.0)
    assert choice.choose() in Codec
