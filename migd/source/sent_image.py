"""SentImage: what the destination's RAM holds, by digest, and which pages of this RAM are not that.

Two questions have this one answer. The tracking verification asks it of a paused guest: whatever differs was
written and not logged. The compare log asks it instead of a kernel (R19). Both must ask about the bytes that
were *sent*, so digests are taken from the private copy that goes on the wire, never from RAM (W25).

The ledger is not asked. It says what shall be sent, this is what was: kept where records enter their stream,
so that a mistake of the ledger's, or of whoever packs and sends, shows up as a difference here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from migd.migration.ports import Worker
from migd.ram.bitmap import PageBitmap, PageIndices, Run
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import DIGEST_BYTES, keyed_page_digests, page_digests
from migd.ram.layout import RamLayout
from migd.tasks import together

Pages: TypeAlias = NDArray[np.uint8]
"""Content of pages, shape (n, 4096)."""

_Compare: TypeAlias = Callable[[PageIndices, Pages], NDArray[np.bool_]]

_SLICE_PAGES = 1 << 12
"""16 MiB to a job of the worker, 4 to 30 ms: between two jobs it can be cancelled, and lanes end together."""

_BATCH_PAGES = 512
"""2 MiB are read and digested at a time: they stay in the processor's cache."""

_TABLE_ROWS = 1 << 20
"""16 MiB of digests are looked through at a time."""


class SentDigests:
    """What the destination reads at each page once its streams have drained: 16 bytes a page.

    The digest of the last content that was sent; a row of zeros, if the last record was ZERO or FREE or there
    was none: then it reads zero, since its RAM was fresh (R11). That content has a digest of zeros is as
    likely as that two pages have the same.

    Without a ``key`` it is the digest on the wire, which finds accidents and costs nothing here. With one it
    is keyed: no guest can choose a page that looks like another (R18).
    """

    def __init__(self, pages: int, key: bytes = b"") -> None:
        # calloc: rows of pages that are never sent never become resident.
        self._table: NDArray[np.uint8] = np.zeros((pages, DIGEST_BYTES), np.uint8)
        self._key = key

    def put(self, runs: list[Run], copies: Pages, wire_digests: bytes) -> None:
        """Remember the copies of pages that were sent, shape (n, 4096), with their digests, 16 bytes each."""
        if self._key:
            digests = keyed_page_digests(copies, self._key)
        else:
            digests = np.frombuffer(wire_digests, np.uint8).reshape(-1, DIGEST_BYTES)
        row = 0
        for start, stop in runs:
            self._table[start:stop] = digests[row : row + stop - start]
            row += stop - start

    def clear(self, runs: list[Run]) -> None:
        """ZERO or FREE was sent for these pages."""
        for start, stop in runs:
            self._table[start:stop] = 0

    def held(self) -> PageBitmap:
        """The pages that the destination holds content of: 1 ms a GiB of RAM."""
        halves = self._table.view(np.uint64)
        found = PageBitmap(len(halves))
        for low in range(0, len(halves), _TABLE_ROWS):
            part = halves[low : low + _TABLE_ROWS]
            bits = np.packbits((part[:, 0] | part[:, 1]) != 0, bitorder="little")
            found |= PageBitmap.from_bytes(bits.tobytes(), len(halves), low)
        return found

    def differ(self, indices: PageIndices, pages: Pages) -> NDArray[np.bool_]:
        """Which of these pages are not as last sent, shape (n,)."""
        now = keyed_page_digests(pages, self._key) if self._key else page_digests(pages)
        differs: NDArray[np.bool_] = (self._table[indices] != now).any(axis=1)
        return differs


class SentImage:
    """The destination's RAM as it was sent, by digest; compared in a worker, several slices at a time."""

    def __init__(self, ram: RamLayout, worker: Worker, *, lanes: int, key: bytes = b"") -> None:
        self._ram = ram
        self._worker = worker
        self._lanes = lanes
        self.digests = SentDigests(ram.pages, key)

    async def differing(self, pages: PageBitmap) -> PageBitmap:
        """Those of ``pages`` that this RAM and the destination's do not hold alike; only behind a barrier.

        What the destination holds is compared by digest; where it reads zero, this RAM must. Pages of it
        that were never touched do: reading them would allocate.
        """
        held = await self._worker.run(self.digests.held)
        compared = self._compared(self.digests.differ, pages & held)
        return functools.reduce(operator.ior, await together(compared, self._not_blank(pages - held)))

    async def _not_blank(self, pages: PageBitmap) -> PageBitmap:
        """Looking for those that were touched takes 10 ms a GiB, while others are compared."""
        return await self._compared(_not_zero, await self._worker.run(self._ram.touched, pages))

    async def _compared(self, compare: _Compare, pages: PageBitmap) -> PageBitmap:
        slices = self._slices(pages)
        found = await together(*(self._lane(compare, slices) for _ in range(self._lanes)))
        return functools.reduce(operator.ior, found)

    async def _lane(self, compare: _Compare, slices: Iterator[PageIndices]) -> PageBitmap:
        """Whatever slices the other lanes leave over."""
        found = PageBitmap(self._ram.pages)
        for indices in slices:
            found |= await self._worker.run(self._differing_of, compare, indices)
        return found

    def _slices(self, pages: PageBitmap) -> Iterator[PageIndices]:
        start = 0
        while part := pages.lowest(_SLICE_PAGES, start):
            start = part.stop()
            yield part.indices()

    def _differing_of(self, compare: _Compare, indices: PageIndices) -> PageBitmap:
        """Those of the pages that differ, read in batches that fit the processor's cache."""
        scratch = np.empty((_BATCH_PAGES, PAGE_BYTES), np.uint8)
        differs = np.zeros(len(indices), np.bool_)
        for low in range(0, len(indices), _BATCH_PAGES):
            batch = indices[low : low + _BATCH_PAGES]
            differs[low : low + len(batch)] = compare(batch, self._ram.read(batch, scratch))
        return PageBitmap.of(self._ram.pages, indices[differs])


def _not_zero(_indices: PageIndices, pages: Pages) -> NDArray[np.bool_]:
    """Not by ``migd.ram.zero``, which decided that the pages were zero: a fault of it would not show."""
    nonzero: NDArray[np.bool_] = pages.view(np.uint64).max(axis=1) != 0
    return nonzero
