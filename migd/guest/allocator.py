"""PageAllocator: which pages of the guest's RAM are free, one bit a page, exactly as hints show them.

No numpy here or anywhere else a guest passes through on its way to START: importing it costs 70-100 ms of
CPU, while the migration that spawned the guest runs on the same cores. Python integers are fast bit sets:
a window of 4096 pages is searched for a free run in about a microsecond.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

MAX_RUN_PAGES = 64
"""The longest run one allocation hands out; a window of the search overlaps the next by as much."""

_WINDOW_BYTES = 512
_OVERLAP_BYTES = MAX_RUN_PAGES // 8
_SCAN_BYTES = 8192
_ONES = re.compile("1+")

PageRun: TypeAlias = tuple[int, int]
"""Half-open: first page, one past the last."""


class PageAllocator:
    """The free list of ``pages`` pages, all free at first. It never hands out a page that is in use."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._bits = bytearray(b"\xff" * (pages // 8) + bytes([(1 << pages % 8) - 1] if pages % 8 else b""))

    @classmethod
    def from_free_bits(cls, free_bits: bytes, pages: int) -> PageAllocator:
        """With the pages free that ``free_bits`` of another one says; see there."""
        allocator = cls(pages)
        allocator._bits[:] = free_bits
        allocator.free_pages = int.from_bytes(free_bits, "little").bit_count()
        return allocator

    @property
    def owned_pages(self) -> int:
        return self.pages - self.free_pages

    def allocate(self, length: int, near: int) -> int | None:
        """The first of ``length`` (1..MAX_RUN_PAGES) free pages, now used; None if no such run is free.

        The first fit at or behind page ``near`` wins, going round once.
        """
        if not 1 <= length <= MAX_RUN_PAGES:
            raise ValueError(f"a run has 1 to {MAX_RUN_PAGES} pages, not {length}")
        near %= self.pages
        start = self._find(length, near, self.pages)
        if start is None:
            start = self._find(length, 0, near)
        if start is not None:
            self._flip(start, start + length)
            self.free_pages -= length
        return start

    def allocate_next(self, length: int, near: int) -> PageRun | None:
        """The first free run at or behind page ``near``, cut to ``length`` (1..MAX_RUN_PAGES), now used.

        None if no page is free there. A sweep through fragmented memory takes every gap as it comes, where
        ``allocate`` would search all of it for a longer one.
        """
        if not 1 <= length <= MAX_RUN_PAGES:
            raise ValueError(f"a run has 1 to {MAX_RUN_PAGES} pages, not {length}")
        start = self._find(1, near, self.pages)
        if start is None:
            return None
        _, value, _ = self._span(start, min(start + length, self.pages))
        ones = value >> start % 8
        stop = start + min(length, (~ones & (ones + 1)).bit_length() - 1)
        self._flip(start, stop)
        self.free_pages -= stop - start
        return start, stop

    def claim(self, start: int, stop: int) -> None:
        """Take exactly this run. ValueError if it is empty, not inside or not wholly free."""
        self._require(start, stop, free=True)
        self._flip(start, stop)
        self.free_pages -= stop - start

    def free(self, start: int, stop: int) -> None:
        """Give a run back. ValueError if it is empty, not inside or not wholly in use."""
        self._require(start, stop, free=False)
        self._flip(start, stop)
        self.free_pages += stop - start

    def free_bits(self) -> bytes:
        """``ceil(pages / 8)`` bytes, least significant bit first, 1 = free, none set behind the last page."""
        return bytes(self._bits)

    def owned_runs(self) -> Iterator[PageRun]:
        """Maximal runs of pages in use, ascending."""
        at = 0
        for start, stop in runs_in(self._bits):
            if at < start:
                yield at, start
            at = stop
        if at < self.pages:
            yield at, self.pages

    def _find(self, length: int, low: int, high: int) -> int | None:
        """The first run of ``length`` free pages that begins at ``low`` or behind and before ``high``."""
        at = low // 8
        mask = -1 << low % 8
        while at * 8 < high:
            window = self._bits[at : at + _WINDOW_BYTES + _OVERLAP_BYTES]
            begins = _begins(int.from_bytes(window, "little") & mask, length)
            if begins:
                start = at * 8 + (begins & -begins).bit_length() - 1
                return start if start < high else None
            at += _WINDOW_BYTES
            mask = -1
        return None

    def _span(self, start: int, stop: int) -> tuple[slice, int, int]:
        """The bytes that hold a run, their value, and the run's bits within that value."""
        at = slice(start // 8, -(-stop // 8))
        return at, int.from_bytes(self._bits[at], "little"), ((1 << stop - start) - 1) << start % 8

    def _flip(self, start: int, stop: int) -> None:
        at, value, run = self._span(start, stop)
        self._bits[at] = (value ^ run).to_bytes(at.stop - at.start, "little")

    def _require(self, start: int, stop: int, *, free: bool) -> None:
        if not 0 <= start < stop <= self.pages:
            raise ValueError(f"pages {start}..{stop} are not inside 0..{self.pages}")
        _, value, run = self._span(start, stop)
        if value & run != (run if free else 0):
            raise ValueError(f"pages {start}..{stop} are not all {'free' if free else 'in use'}")


def _begins(bits: int, length: int) -> int:
    """The bits at which ``length`` set bits in a row begin: log2(length) shifts."""
    have = 1
    while have < length:
        step = min(have, length - have)
        bits &= bits >> step
        have += step
    return bits


def count_runs(bits: bytes | bytearray) -> int:
    """How many maximal runs of ones there are, without visiting them: 10 microseconds per GiB of RAM."""
    value = int.from_bytes(bits, "little")
    return (value & ~(value << 1)).bit_count()


def runs_in(bits: bytes | bytearray | memoryview) -> Iterator[PageRun]:
    """Maximal half-open runs of ones, least significant bit of byte 0 first, ascending."""
    pending: PageRun | None = None
    for at in range(0, len(bits), _SCAN_BYTES):
        digits = f"{int.from_bytes(bits[at : at + _SCAN_BYTES], 'little'):b}"[::-1]
        for match in _ONES.finditer(digits):
            start, stop = at * 8 + match.start(), at * 8 + match.end()
            if pending is not None and pending[1] == start:
                start = pending[0]
            elif pending is not None:
                yield pending
            pending = (start, stop)
    if pending is not None:
        yield pending
