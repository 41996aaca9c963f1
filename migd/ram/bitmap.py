"""PageBitmap: a set of page indices as packed bits, with vectorised set algebra and run-length iteration.

One bit per page, least significant bit first, so 1 GiB of RAM costs 32 KiB. A bitmap stores only a window
of words, and every page outside it is clear: a batch of 256 neighbouring pages costs a few words, whatever
the size of the RAM, and set algebra costs as much as the smaller window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

PageIndices: TypeAlias = NDArray[np.int64]
Run: TypeAlias = tuple[int, int]
"""Half-open: first page, one past the last."""

_WORD_PAGES = 64
_ALL_ONES = 0xFFFF_FFFF_FFFF_FFFF
_SCRATCH_WORDS = 4096
"""How much is unpacked at a time: 4096 words are 262144 pages, 1 GiB of RAM, 256 KiB of scratch."""


class PageBitmap:
    """A mutable set of page indices below ``pages``; a new one is empty."""

    __slots__ = ("_base", "_words", "pages")

    def __init__(self, pages: int) -> None:
        if pages < 0:
            raise ValueError(f"a bitmap cannot hold {pages} pages")
        self.pages = pages
        self._base = 0
        self._words: NDArray[np.uint64] = np.zeros(0, np.uint64)

    # -- construction -------------------------------------------------------------------------------

    @classmethod
    def _window(cls, pages: int, base: int, words: NDArray[np.uint64]) -> PageBitmap:
        bitmap = cls(pages)
        bitmap._base, bitmap._words = base, words
        return bitmap

    @classmethod
    def full(cls, pages: int) -> PageBitmap:
        """Every page set."""
        bitmap = cls(pages)
        bitmap.add_run(0, pages)
        return bitmap

    @classmethod
    def of(cls, pages: int, indices: Iterable[int] | PageIndices) -> PageBitmap:
        """The given indices set, in any order. IndexError if one lies outside."""
        at = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)
        if not len(at):
            return cls(pages)
        low, high = int(at.min()), int(at.max())
        if low < 0 or high >= pages:
            raise IndexError(f"pages {low}..{high} are not inside 0..{pages - 1}")
        base = low // _WORD_PAGES
        words = np.zeros(high // _WORD_PAGES - base + 1, np.uint64)
        word, bit = np.divmod(at, _WORD_PAGES)
        np.bitwise_or.at(words, word - base, np.uint64(1) << bit.astype(np.uint64))
        return cls._window(pages, base, words)

    @classmethod
    def from_runs(cls, pages: int, runs: Iterable[Run]) -> PageBitmap:
        """The given runs set. IndexError if one is not inside, or backwards."""
        bitmap = cls(pages)
        for start, stop in runs:
            bitmap.add_run(start, stop)
        return bitmap

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, pages: int, first_page: int = 0) -> PageBitmap:
        """One bit per page from ``first_page`` (a multiple of 64) on, least significant first.

        Bits beyond ``pages`` in the last byte are dropped. ValueError if more bytes than that are given.
        """
        if first_page % _WORD_PAGES or first_page < 0:
            raise ValueError(f"a bitmap begins at a multiple of {_WORD_PAGES} pages, not at {first_page}")
        if len(data) > -(-(pages - first_page) // 8):
            raise ValueError(f"{len(data)} bytes from page {first_page} on exceed {pages} pages")
        words = np.zeros(-(-len(data) // 8), np.uint64)
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        bitmap = cls._window(pages, first_page // _WORD_PAGES, words)
        used = pages % _WORD_PAGES
        if used and bitmap._end == -(-pages // _WORD_PAGES) and len(words):
            words[-1] &= np.uint64((1 << used) - 1)
        return bitmap

    def to_bytes(self) -> bytes:
        """All pages, ``ceil(pages / 8)`` bytes: the inverse of ``from_bytes``."""
        whole = np.zeros(-(-self.pages // _WORD_PAGES), np.uint64)
        whole[self._base : self._end] = self._words
        return whole.view(np.uint8)[: -(-self.pages // 8)].tobytes()

    def copy(self) -> PageBitmap:
        """An independent set with the same pages."""
        return self._window(self.pages, self._base, self._words.copy())

    # -- questions ----------------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        return self._base + len(self._words)

    @property
    def window_bytes(self) -> int:
        """What the set occupies."""
        return self._words.nbytes

    def count(self) -> int:
        """How many pages are set."""
        return int(np.bitwise_count(self._words).sum())

    def __bool__(self) -> bool:
        return bool(self._words.any())

    def __contains__(self, page: int) -> bool:
        word = page // _WORD_PAGES
        if not self._base <= word < self._end:
            return False
        return bool((int(self._words[word - self._base]) >> (page % _WORD_PAGES)) & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageBitmap):
            return NotImplemented
        return self.pages == other.pages and not (self - other) and not (other - self)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"<PageBitmap {self.count()} of {self.pages}>"

    def isdisjoint(self, other: PageBitmap) -> bool:
        """True if no page is in both."""
        mine, theirs = self._overlap(other)
        return not (self._words[mine] & other._words[theirs]).any()

    # -- algebra ------------------------------------------------------------------------------------

    def _overlap(self, other: PageBitmap) -> tuple[slice, slice]:
        """The words both windows have, as a slice of either."""
        if other.pages != self.pages:
            raise ValueError(f"bitmaps of {self.pages} and {other.pages} pages do not combine")
        low = max(self._base, other._base)
        high = max(low, min(self._end, other._end))
        return slice(low - self._base, high - self._base), slice(low - other._base, high - other._base)

    def _widen(self, base: int, end: int) -> None:
        """Make the window contain words ``base``..``end``.

        It grows to twice its size at least, so that a set which grows batch by batch is not copied for each.
        """
        if not len(self._words):
            self._base, self._words = base, np.zeros(end - base, np.uint64)
        elif base < self._base or end > self._end:
            low, high, spare = min(base, self._base), max(end, self._end), len(self._words)
            if end > self._end:
                high = max(high, min(high + spare, -(-self.pages // _WORD_PAGES)))
            if base < self._base:
                low = max(0, low - spare)
            words = np.zeros(high - low, np.uint64)
            words[self._base - low : self._end - low] = self._words
            self._base, self._words = low, words

    def __ior__(self, other: PageBitmap) -> PageBitmap:
        if len(other._words):
            self._widen(other._base, other._end)
        mine, theirs = self._overlap(other)
        self._words[mine] |= other._words[theirs]
        return self

    def __isub__(self, other: PageBitmap) -> PageBitmap:
        mine, theirs = self._overlap(other)
        self._words[mine] &= ~other._words[theirs]
        return self

    def __iand__(self, other: PageBitmap) -> PageBitmap:
        result = self & other
        self._base, self._words = result._base, result._words
        return self

    def __or__(self, other: PageBitmap) -> PageBitmap:
        result = self.copy()
        result |= other
        return result

    def __sub__(self, other: PageBitmap) -> PageBitmap:
        result = self.copy()
        result -= other
        return result

    def __and__(self, other: PageBitmap) -> PageBitmap:
        mine, theirs = self._overlap(other)
        return self._window(self.pages, self._base + mine.start, self._words[mine] & other._words[theirs])

    # -- runs ---------------------------------------------------------------------------------------

    def add_runs(self, runs: NDArray[np.int64]) -> None:
        """Set half-open runs, shape (n, 2), in any order. IndexError if one is not inside, or backwards."""
        if not len(runs):
            return
        starts, lengths = runs[:, 0], runs[:, 1] - runs[:, 0]
        if int(starts.min()) < 0 or int(runs[:, 1].max()) > self.pages or int(lengths.min()) < 0:
            raise IndexError(f"a run is not inside 0..{self.pages}")
        long = lengths > _WORD_PAGES
        for start, stop in runs[long].tolist():
            self.add_run(start, stop)
        # Short ones page by page, all at once: a Python call for each costs five times as much.
        self |= PageBitmap.of(self.pages, expand_runs(runs[~long]))

    def add_run(self, start: int, stop: int) -> None:
        """Set the half-open run. IndexError if it is not inside, or backwards."""
        if not 0 <= start <= stop <= self.pages:
            raise IndexError(f"run {start}..{stop} is not inside 0..{self.pages}")
        if start == stop:
            return
        first, last = start // _WORD_PAGES, (stop - 1) // _WORD_PAGES
        self._widen(first, last + 1)
        first, last = first - self._base, last - self._base
        head = (_ALL_ONES << (start % _WORD_PAGES)) & _ALL_ONES
        tail = _ALL_ONES >> (_WORD_PAGES - 1 - (stop - 1) % _WORD_PAGES)
        if first == last:
            self._words[first] |= np.uint64(head & tail)
        else:
            self._words[first] |= np.uint64(head)
            self._words[first + 1 : last] = np.uint64(_ALL_ONES)
            self._words[last] |= np.uint64(tail)

    def runs(self) -> Iterator[Run]:
        """Maximal half-open runs of set pages, ascending."""
        pending: Run | None = None
        for at in range(0, len(self._words), _SCRATCH_WORDS):
            window = self._words[at : at + _SCRATCH_WORDS]
            bits = np.unpackbits(window.view(np.uint8), bitorder="little").view(np.int8)
            edges = np.flatnonzero(np.diff(bits, prepend=np.int8(0), append=np.int8(0)))
            for start, stop in (edges.reshape(-1, 2) + (self._base + at) * _WORD_PAGES).tolist():
                if pending is not None and pending[1] == start:
                    pending = (pending[0], stop)
                    continue
                if pending is not None:
                    yield pending
                pending = (start, stop)
        if pending is not None:
            yield pending

    # -- the lowest pages ---------------------------------------------------------------------------

    def indices(self) -> PageIndices:
        """Every set page, ascending: eight bytes a page."""
        return self._lowest(self.pages, 0)

    def lowest(self, limit: int, start: int = 0) -> PageBitmap:
        """The up to ``limit`` lowest set pages that are not below ``start``, as a set of its own."""
        return PageBitmap.of(self.pages, self._lowest(limit, start))

    def stop(self) -> int:
        """One past the highest set page; 0 if there is none."""
        nonzero = np.flatnonzero(self._words)
        if not len(nonzero):
            return 0
        top = int(nonzero[-1])
        return (self._base + top) * _WORD_PAGES + int(self._words[top]).bit_length()

    def _lowest(self, limit: int, start: int) -> PageIndices:
        found: list[PageIndices] = []
        missing = limit
        at = max(0, start // _WORD_PAGES - self._base)
        while missing > 0 and at < len(self._words):
            # A non-empty word has at least one page, and only the first may lose pages below `start`.
            nonzero = at + np.flatnonzero(self._words[at : at + _SCRATCH_WORDS])[: missing + 1]
            at += _SCRATCH_WORDS
            counts = np.bitwise_count(self._words[nonzero]).cumsum(dtype=np.int64)
            enough = int(np.searchsorted(counts, missing + _WORD_PAGES)) + 1
            indices = self._unpack(nonzero[:enough])
            indices = indices[indices >= start][:missing]
            found.append(indices)
            missing -= len(indices)
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _unpack(self, positions: NDArray[np.int64]) -> PageIndices:
        """The set pages of the words at these positions of the window, ascending."""
        bits = np.unpackbits(self._words[positions].view(np.uint8), bitorder="little")
        row, bit = np.nonzero(bits.reshape(-1, _WORD_PAGES))
        return (self._base + positions[row]) * _WORD_PAGES + bit


def runs_of(indices: PageIndices) -> list[Run]:
    """Maximal half-open runs of an ascending array of page indices."""
    if not len(indices):
        return []
    first, last = int(indices[0]), int(indices[-1])
    if last - first == len(indices) - 1:  # the usual case by far, and a dozen numpy calls less
        return [(first, last + 1)]
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.concatenate(([0], breaks + 1))]
    stops = indices[np.concatenate((breaks, [len(indices) - 1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def expand_runs(runs: NDArray[np.int64]) -> PageIndices:
    """The page indices of half-open runs, shape (n, 2), in the order of the runs."""
    lengths = runs[:, 1] - runs[:, 0]
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(runs[:, 1] - ends, lengths)
