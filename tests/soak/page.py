"""Self-describing pages: what a page of a soaked guest holds, from (guest, page, sequence) and nothing else.

::

    word 0    magic
         1    guest
         2    page
         3    sequence: the number of the store that wrote it
    4..509    body: a word of the page's own times a table of odd numbers; one word over and over in 3 of 16
       510    checksum: mixed from words 1 to 3
       511    sequence again

Every 16th sequence is a page of zeros, since zero pages go another way. So any page can be judged by itself:
right, zero, torn, stale, or of somebody else.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
WORDS = PAGE_BYTES // 8

Rows: TypeAlias = NDArray[np.uint64]
"""Pages as ``(n, WORDS)``."""
Numbers: TypeAlias = NDArray[np.uint64]

_MAGIC = np.uint64(int.from_bytes(b"migdsoak", "little"))
_HEAD_WORDS = 4
_CHECKSUM, _TAIL = 510, 511
KINDS = 16
PLAIN_KINDS = 4
"""Of ``KINDS``: 0 is zeros, 1 to 3 compress well, the others do not."""

_TABLE = np.random.default_rng(0x6D696764).integers(1 << 63, size=WORDS, dtype=np.uint64) * 2 + 1
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def content(guest: int, pages: Numbers, sequences: Numbers) -> Rows:
    """What these pages hold after the stores with these numbers."""
    checksums = _mixed(_mixed(_mixed(np.full(len(pages), guest, np.uint64)) ^ pages) ^ sequences)
    words = checksums * _STEP | np.uint64(1)  # never 0: a body of zeros is no body
    rows = words[:, None] * _TABLE
    kinds = sequences % np.uint64(KINDS)
    plain = kinds < PLAIN_KINDS
    rows[plain] = words[plain, None]
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = _MAGIC, guest, pages, sequences
    rows[:, _CHECKSUM], rows[:, _TAIL] = checksums, sequences
    rows[kinds == 0] = 0
    return rows


def _mixed(numbers: Numbers) -> Numbers:
    """SplitMix64 of each."""
    z = numbers + _STEP
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def verdict(row: NDArray[np.uint64], guest: int, page: int, sequence: int) -> str:
    """What is wrong with a page, by what lies in it; empty if it is as the store ``sequence`` left it."""
    if np.array_equal(row, _one(guest, page, sequence)):
        return ""
    if not row.any():
        return f"zero instead of sequence {sequence}"
    magic, found_guest, found_page, head = (int(word) for word in row[:_HEAD_WORDS])
    if magic != _MAGIC:
        return f"no page of any guest instead of sequence {sequence}"
    if (found_guest, found_page) != (guest, page):
        return f"page {found_page} of guest {found_guest}"
    if head != row[_TAIL]:
        return f"torn: sequence {head} at its beginning, {int(row[_TAIL])} at its end, not {sequence}"
    if not np.array_equal(row, _one(guest, page, head)):
        return f"torn: sequence {head} in header and end, something else between"
    return f"stale: sequence {head} instead of {sequence}"


def header(row: NDArray[np.uint64]) -> str:
    """The words that say what a page is, in hexadecimal, for a report."""
    words = [*row[:_HEAD_WORDS], row[_CHECKSUM], row[_TAIL]]
    return " ".join(f"{int(word):016x}" for word in words)


def _one(guest: int, page: int, sequence: int) -> NDArray[np.uint64]:
    row: NDArray[np.uint64] = content(guest, np.array([page], np.uint64), np.array([sequence], np.uint64))[0]
    return row
