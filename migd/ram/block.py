"""RamBlock: one contiguous piece of guest RAM in a sealed memfd, and RamLayout: all blocks of a guest.

Neither daemon trusts a descriptor it was handed before ``RamBlock.adopt`` has checked it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from migd.errors import GuestError, ResourceError
from migd.ram import linux
from migd.ram.bitmap import PageBitmap, PageIndices, Run, runs_of

PAGE_BYTES = 4096

MAX_BLOCK_PAGES = 1 << 32
"""Page indices are u32 on the wire: 16 TiB a block."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A file that cannot shrink cannot raise SIGBUS under a mapping; SEAL_SEAL rules out a later write seal."""


@dataclass(frozen=True)
class BlockShape:
    """What both daemons and the guest must agree on about a block."""

    name: str
    pages: int


class RamBlock:
    """Guest RAM of ``pages`` pages behind one descriptor, which the block owns until ``close``."""

    def __init__(self, shape: BlockShape, fd: int) -> None:
        self.name = shape.name
        self.pages = shape.pages
        self.fd = fd
        self._view: NDArray[np.uint8] | None = None

    @classmethod
    def create(cls, shape: BlockShape) -> RamBlock:
        """A fresh, zero (R11), sealed memfd. ResourceError if the kernel refuses."""
        if not 0 < shape.pages <= MAX_BLOCK_PAGES:
            raise ResourceError(f"RAM block {shape.name!r}: {shape.pages} pages is not between 1 and 2^32")
        try:
            fd = os.memfd_create(f"migd-{shape.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ResourceError(f"RAM block {shape.name!r}: memfd_create: {error.strerror}") from error
        try:
            os.ftruncate(fd, shape.pages * PAGE_BYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(fd)
            raise ResourceError(
                f"RAM block {shape.name!r} of {shape.pages} pages: {error.strerror}"
            ) from error
        return cls(shape, fd)

    @classmethod
    def adopt(cls, shape: BlockShape, fd: int) -> RamBlock:
        """RAM that a guest hands back after a daemon restart; GuestError unless size and seals are right."""
        if not 0 < shape.pages <= MAX_BLOCK_PAGES:
            raise GuestError(f"RAM block {shape.name!r}: {shape.pages} pages is not between 1 and 2^32")
        size = os.fstat(fd).st_size
        if size != shape.pages * PAGE_BYTES:
            raise GuestError(
                f"RAM block {shape.name!r}: {shape.pages} pages announced, the file has {size} bytes"
            )
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise GuestError(f"RAM block {shape.name!r}: the descriptor is not a memfd") from error
        if seals & _SEALS != _SEALS:
            raise GuestError(f"RAM block {shape.name!r}: the memfd is not sealed against resizing")
        read_write = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        if not read_write or seals & fcntl.F_SEAL_WRITE:
            raise GuestError(f"RAM block {shape.name!r}: the descriptor cannot be written through")
        return cls(shape, fd)

    @property
    def shape(self) -> BlockShape:
        return BlockShape(self.name, self.pages)

    @property
    def bytes(self) -> int:
        return self.pages * PAGE_BYTES

    @property
    def view(self) -> NDArray[np.uint8]:
        """All pages through a shared mapping, shape (pages, 4096). Reading a hole through it allocates it."""
        if self._view is None:
            mapping = mmap.mmap(self.fd, self.bytes)
            self._view = np.frombuffer(mapping, np.uint8).reshape(self.pages, PAGE_BYTES)
        return self._view

    def touched(self, start: int, stop: int) -> list[Run]:
        """Runs of pages from ``start`` to ``stop`` that were ever written (or read through a mapping).

        By SEEK_DATA: content is never read. About 10 ms for each GiB that was touched.
        """
        found: list[Run] = []
        offset, end = start * PAGE_BYTES, stop * PAGE_BYTES
        while offset < end:
            try:
                data = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError:  # ENXIO: no data behind this offset
                break
            hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            if data < end:
                found.append((data // PAGE_BYTES, min(-(-hole // PAGE_BYTES), stop)))
            offset = hole
        return found

    def read(self, indices: PageIndices, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Copy pages into the first rows of ``out`` (shape (>= n, 4096)): the private copy of R8."""
        rows = out[: len(indices)]
        np.take(self.view, indices, axis=0, out=rows, mode="clip")
        return rows

    def write(self, indices: PageIndices, pages: NDArray[np.uint8]) -> None:
        """Place pages by ``pwrite`` of contiguous runs; a full memory is an error here, never SIGBUS.

        Contiguous pwrite touches fresh memory at 2.9 GB/s where stores through a mapping reach 1.3.
        """
        row = 0
        for start, stop in runs_of(indices):
            data = pages[row : row + stop - start].data.cast("B")
            offset = start * PAGE_BYTES
            while data:
                written = os.pwrite(self.fd, data, offset)
                data = data[written:]
                offset += written
            row += stop - start

    def zero(self, start: int, stop: int) -> None:
        """Make pages ``start``..``stop`` read as zero and give their memory back to the host."""
        linux.punch_hole(self.fd, start * PAGE_BYTES, (stop - start) * PAGE_BYTES)

    def close(self) -> None:
        """Give the descriptor up; the memory goes when the last holder (the guest) lets go of it."""
        self._view = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
    def shapes(self) -> tuple[BlockShape, ...]:
        return tuple(block.shape for block in self.blocks)

    def touched(self, within: PageBitmap | None = None) -> PageBitmap:
        """The pages, of all or of those in ``within``, that were ever written; see ``RamBlock.touched``."""
        touched = PageBitmap(self.pages)
        for start, stop in within.runs() if within is not None else [(0, self.pages)]:
            for first, block in zip(self.first_pages, self.blocks, strict=True):
                low, high = max(start, first) - first, min(stop, first + block.pages) - first
                for run in block.touched(low, high):
                    touched.add_run(first + run[0], first + run[1])
        return touched

    def read(self, indices: PageIndices, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Copy pages (ascending indices) into the first rows of ``out``; see ``RamBlock.read``."""
        for block, local, rows in self._split(indices):
            block.read(local, out[rows])
        return out[: len(indices)]

    def write(self, indices: PageIndices, pages: NDArray[np.uint8]) -> None:
        """Place pages (ascending indices); see ``RamBlock.write``."""
        for block, local, rows in self._split(indices):
            block.write(local, pages[rows])

    def zero(self, indices: PageIndices) -> None:
        """Make pages (ascending indices) read as zero and give their memory back."""
        for block, local, _ in self._split(indices):
            for start, stop in runs_of(local):
                block.zero(start, stop)

    def _split(self, indices: PageIndices) -> Iterator[tuple[RamBlock, PageIndices, slice]]:
        """Each block with the indices that fall into it, and which rows of the whole those are.

        IndexError if one lies outside: better than rows of stale bytes.
        """
        if len(indices) and not 0 <= indices[0] <= indices[-1] < self.pages:
            raise IndexError(f"pages {indices[0]}..{indices[-1]} of a RAM of {self.pages} pages")
        for first, block in zip(self.first_pages, self.blocks, strict=True):
            low, high = np.searchsorted(indices, (first, first + block.pages)).tolist()
            if low < high:
                yield block, indices[low:high] - first, slice(low, high)

    def close(self) -> None:
        for block in self.blocks:
            block.close()
