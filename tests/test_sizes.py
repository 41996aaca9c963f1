"""Sizes and bandwidths as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.sizes import bandwidth_text, check_bandwidth, parse_bandwidth, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1000),
        ("1Ki", 1024),
        ("1G", 10**9),
        ("2T", 2 * 10**12),
        ("1.5GiB", 3 << 29),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "B", "G", "1X", "1iG", "one", "0x10", "-1", "inf", "nan", "1e400", "1,5G"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write it like 512Mi, 1Gi or 50M"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "bytes_s"), [("unlimited", 0), ("0", 0), ("100K", 10**5), ("1G", 10**9), ("1.5M/s", 1_500_000)]
)
def test_bandwidths(text: str, bytes_s: int) -> None:
    assert parse_bandwidth(text) == bytes_s


@pytest.mark.parametrize("text", ["", "Unlimited", "none", "1G/min", "inf", "-1G"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="is no bandwidth; write it like 1G, 500M or unlimited"):
        parse_bandwidth(text)


@pytest.mark.parametrize("bytes_s", [1, 500, 99_999, -1])
def test_what_is_too_little(bytes_s: int) -> None:
    with pytest.raises(
        ValueError, match=f"{bytes_s} bytes/s is too little; the least is 100K, and 0 is unlimited"
    ):
        check_bandwidth(bytes_s)


@given(st.one_of(st.just(0), st.integers(100_000, 10**13)))
def test_what_is_written_is_read_again(bytes_s: int) -> None:
    assert parse_bandwidth(bandwidth_text(bytes_s)) == bytes_s


@pytest.mark.parametrize(
    ("bytes_s", "text"), [(0, "unlimited"), (10**9, "1G"), (1_500_000, "1500K"), (123_456, "123456")]
)
def test_the_shortest_way_to_write_it(bytes_s: int, text: str) -> None:
    assert bandwidth_text(bytes_s) == text
