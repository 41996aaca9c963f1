"""RamLayout: all RAM blocks of a guest as one flat page space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from migd.ram.bitmap import PageBitmap, PageIndices, Run, expand_runs
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock

_LOOK_PAGES = 512
"""2 MiB, which stay in the processor's cache."""

_SHORT_RUN_PAGES = 4
"""Gathering 4 pages takes as long as an array of its own for a run."""


class RamLayout:
    """The blocks of a guest as one flat page space, block 0's pages first.

    The ledger, the batcher and the wire count pages in it; only this class knows where blocks begin.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self.blocks = tuple(blocks)
        self.first_pages = tuple(accumulate((block.pages for block in self.blocks), initial=0))[:-1]
        self.pages = sum(block.pages for block in self.blocks)

    @property
    def bytes(self) -> int:
        return self.pages * PAGE_BYTES

    @property
    def read_only(self) -> bool:
        """Nobody may write it through the descriptors here, and its guest does not."""
        return all(block.read_only for block in self.blocks)

    @property
    def named(self) -> bool:
        """Some of it is in files that go with the guest."""
        return any(block.path is not None for block in self.blocks)

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return tuple(block.shape for block in self.blocks)

    def touched(self, within: PageBitmap | None = None) -> PageBitmap:
        """The pages, of all or of those in ``within``, that were ever written; see ``RamBlock.touched``.

        In one pass: the kernel finds the end of an extent by walking there, for each run anew if it is asked.
        """
        touched = PageBitmap(self.pages)
        wanted = within if within is not None else PageBitmap.full(self.pages)
        start, _ = next(wanted.runs(), (0, 0))
        for first, block in zip(self.first_pages, self.blocks, strict=True):
            low, high = max(start, first) - first, min(wanted.stop(), first + block.pages) - first
            for run in block.touched(low, high):
                touched.add_run(first + run[0], first + run[1])
        return touched & wanted

    def blank(self) -> bool:
        """Whether all of it reads zero (R11). Where it was never touched nothing is read; the rest at 5 GB/s.

        GuestError if it cannot be read.
        """
        runs = self.touched().runs()
        pieces = [
            (low, min(low + _LOOK_PAGES, stop))
            for start, stop in runs
            for low in range(start, stop, _LOOK_PAGES)
        ]
        return not any(pages.any() for pages in self.look(pieces))

    def read(self, indices: PageIndices, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Copy pages (ascending indices) into the first rows of ``out``; see ``RamBlock.read``."""
        for block, local, rows in self._split(indices):
            block.read(local, out[rows])
        return out[: len(indices)]

    def look(self, runs: Sequence[Run]) -> Iterator[NDArray[np.uint8]]:
        """The pages of ascending runs in order: by ``RamBlock.look``, or ``gather`` where runs are short."""
        pages = sum(stop - start for start, stop in runs)
        if pages < len(runs) * _SHORT_RUN_PAGES:
            for block, local, _ in self._split(expand_runs(np.array(runs))):
                yield from block.gather(local)
            return
        for block, shares in self._cut(runs):
            for start, stop in shares:
                yield block.look(start, stop)

    def write(self, runs: Sequence[Run], data: memoryview) -> None:
        """Place the bytes of the pages of ascending runs; see ``RamBlock.place``."""
        for block, shares in self._cut(runs):
            size = sum(stop - start for start, stop in shares) * PAGE_BYTES
            block.place(shares, data[:size])
            data = data[size:]

    def zero(self, runs: Sequence[Run]) -> None:
        """Make the pages of ascending runs read as zero and give their memory back."""
        for block, shares in self._cut(runs):
            for start, stop in shares:
                block.zero(start, stop)

    def _cut(self, runs: Sequence[Run]) -> Iterator[tuple[RamBlock, Sequence[Run]]]:
        """Each block with the runs that fall into it, cut where they cross a border, in its page numbers.

        IndexError if one lies outside.
        """
        for start, stop in runs:
            if not 0 <= start <= stop <= self.pages:
                raise IndexError(f"pages {start}..{stop} of a RAM of {self.pages} pages")
        if len(self.blocks) == 1:
            yield self.blocks[0], runs
            return
        for first, block in zip(self.first_pages, self.blocks, strict=True):
            clipped = ((max(start - first, 0), min(stop - first, block.pages)) for start, stop in runs)
            if shares := [(low, high) for low, high in clipped if low < high]:
                yield block, shares

    def _split(self, indices: PageIndices) -> Iterator[tuple[RamBlock, PageIndices, slice]]:
        """Each block with the indices that fall into it, and which rows of the whole those are.

        IndexError if one lies outside: better than rows of stale bytes.
        """
        if len(indices) and not 0 <= indices[0] <= indices[-1] < self.pages:
            raise IndexError(f"pages {indices[0]}..{indices[-1]} of a RAM of {self.pages} pages")
        if len(self.blocks) == 1:
            yield self.blocks[0], indices, slice(0, len(indices))
            return
        for first, block in zip(self.first_pages, self.blocks, strict=True):
            low, high = np.searchsorted(indices, (first, first + block.pages)).tolist()
            if low < high:
                yield block, indices[low:high] - first, slice(low, high)

    def unlink(self) -> None:
        """See ``RamBlock.unlink``."""
        for block in self.blocks:
            block.unlink()

    def close(self) -> None:
        for block in self.blocks:
            block.close()
