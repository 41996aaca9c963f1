"""Page digests and the zero scan against the plain way of saying the same."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migd.ram.block import PAGE_BYTES
from migd.ram.digest import DIGEST_BYTES, KEY_BYTES, frame_digest, keyed_page_digests, page_digests
from migd.ram.zero import zero_pages


def pages_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


def test_known_digests() -> None:
    """Of XXH3-128, seed 0: both daemons must agree for ever."""
    assert frame_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert frame_digest(b"hello").hex() == "b5e9c1ad071b3e7fc779cfaa5e523818"


@pytest.mark.parametrize("count", [0, 1, 2, 257])
def test_one_digest_a_page_in_order(count: int) -> None:
    pages = pages_of(1, count)
    digests = page_digests(pages)
    assert digests.shape == (count, DIGEST_BYTES)
    assert [row.tobytes() for row in digests] == [frame_digest(page.tobytes()) for page in pages]


@given(page=st.integers(0, 2), byte=st.integers(0, PAGE_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=50)
def test_one_flipped_bit_changes_its_page_and_no_other(page: int, byte: int, bit: int) -> None:
    pages = pages_of(2, 3)
    before = page_digests(pages)
    pages[page, byte] ^= 1 << bit
    changed = (page_digests(pages) != before).any(axis=1)
    assert changed.tolist() == [number == page for number in range(3)]


KEY, OTHER_KEY = bytes(range(KEY_BYTES)), bytes(KEY_BYTES)


@pytest.mark.parametrize("count", [0, 1, 2, 257])
def test_keyed_digests_are_those_of_the_key_and_the_page(count: int) -> None:
    """SHA-256 of the key, filled up to a block, and the page; the first 16 bytes."""
    pages = pages_of(1, count)
    digests = keyed_page_digests(pages, KEY)
    assert digests.shape == (count, DIGEST_BYTES)
    assert [row.tobytes() for row in digests] == [
        hashlib.sha256(KEY + bytes(32) + page.tobytes()).digest()[:16] for page in pages
    ]


def test_another_key_makes_other_digests_of_every_page() -> None:
    pages = np.zeros((3, PAGE_BYTES), np.uint8)
    assert (keyed_page_digests(pages, KEY) != keyed_page_digests(pages, OTHER_KEY)).any(axis=1).all()


@given(page=st.integers(0, 2), byte=st.integers(0, PAGE_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=50)
def test_one_bit_anywhere_makes_a_page_nonzero(page: int, byte: int, bit: int) -> None:
    pages = np.zeros((3, PAGE_BYTES), np.uint8)
    assert zero_pages(pages).all()
    pages[page, byte] = 1 << bit
    assert zero_pages(pages).tolist() == [number != page for number in range(3)]


def test_zero_scan_of_no_pages_of_rows_of_a_buffer_and_of_readonly_memory() -> None:
    assert zero_pages(np.zeros((0, PAGE_BYTES), np.uint8)).shape == (0,)
    buffer = pages_of(3, 8)
    buffer[2::2] = 0
    assert zero_pages(buffer[1:5]).tolist() == [False, True, False, True]
    assert zero_pages(np.frombuffer(bytes(2 * PAGE_BYTES), np.uint8).reshape(2, PAGE_BYTES)).all()
