"""Two RAM images compared page by page, from outside and by content: what a migration has to answer for.

Nothing here knows a ledger, a log or a hint. It takes the RAM of a guest that is paused at its source and
loaded, but not started, at its destination, and tells which pages differ.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Comparison:
    """Pages by number in the RAM file."""

    pages: int
    """All of RAM."""
    looked_at: int
    """With content, zero or not, in either image; the others are holes in both."""
    left_behind: list[int] = field(repr=False)
    """Not the same, and zero at the destination."""
    wrong: list[int] = field(repr=False)
    """Not the same, and something else there."""

    @property
    def left(self) -> int:
        return len(self.left_behind)


def compare(source: int, destination: int) -> Comparison:
    """The images behind two descriptors, of the same size. AssertionError if it is not."""
    size = os.fstat(source).st_size
    assert size == os.fstat(destination).st_size, "the RAM has two sizes"
    looked_at, left_behind, wrong = 0, [], []
    for start in sorted({*_chunks(source, size), *_chunks(destination, size)}):
        length = min(_CHUNK_BYTES, size - start)
        here, there = _read(source, start, length), _read(destination, start, length)
        looked_at += length // PAGE_BYTES
        if np.array_equal(here, there):
            continue
        differ = (here != there).any(axis=1)
        zero = ~there.any(axis=1)
        first = start // PAGE_BYTES
        left_behind += (np.flatnonzero(differ & zero) + first).tolist()
        wrong += (np.flatnonzero(differ & ~zero) + first).tolist()
    return Comparison(size // PAGE_BYTES, looked_at, left_behind, wrong)


def _chunks(fd: int, size: int) -> Iterator[int]:
    """Where each chunk begins in which the file has something."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind here
                return
            raise
        at -= at % _CHUNK_BYTES
        yield at
        at += _CHUNK_BYTES


def _read(fd: int, start: int, length: int) -> NDArray[np.uint64]:
    """A row of words for each page; a hole reads as zeros, and stays a hole."""
    data = os.pread(fd, length, start)
    assert len(data) == length, "RAM has shrunk"
    return np.frombuffer(data, np.uint64).reshape(-1, PAGE_BYTES // 8)
