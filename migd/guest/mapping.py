"""RamMapping: the RAM of a guest as one stretch of its address space, block behind block.

So the machine works over several blocks as over one: a run of pages that crosses the border of two is one
slice. The kernel still sees a mapping of each file, and logs the writes of each.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate

from migd.errors import GuestError
from migd.guest.control import Block

PAGE_BYTES = 4096

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)


class RamMapping:
    """Owns the descriptors of the blocks, and ``memory``: all of them, shared, in their order."""

    def __init__(self, blocks: Sequence[Block], fds: Sequence[int], *, read_only: bool = False) -> None:
        """``fds`` are ours if this succeeds. GuestError if one is no RAM of its block.

        With ``read_only`` nothing can be stored through the mapping; of one block only.
        """
        self.blocks = tuple(blocks)
        self.read_only = read_only
        for block, fd in zip(blocks, fds, strict=True):
            size = os.fstat(fd).st_size
            if size != block.pages * PAGE_BYTES or not size:
                raise GuestError(
                    f"RAM block {block.name!r}: {block.pages} pages announced, {size} bytes passed"
                )
        try:
            self.memory = self._map(fds)
            # A child would write past the dirty log: it would inherit the mapping, but not that it is armed.
            self.memory.madvise(mmap.MADV_DONTFORK)
        except (OSError, OverflowError) as error:
            names = ", ".join(repr(block.name) for block in blocks)
            raise GuestError(f"RAM block {names} cannot be mapped: {error}") from error
        self.fds = tuple(fds)

    def _map(self, fds: Sequence[int]) -> mmap.mmap:
        if len(fds) == 1:
            access = mmap.PROT_READ if self.read_only else mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(fds[0], self._bytes, prot=access)
        memory = _reserved(self._bytes, max(os.fstat(fd).st_blksize for fd in fds))
        try:
            for fd, (address, length) in zip(fds, self._places(memory), strict=True):
                _map_over(fd, address, length)
        except OSError:
            memory.close()
            raise
        return memory

    @property
    def _bytes(self) -> int:
        return sum(block.pages for block in self.blocks) * PAGE_BYTES

    def places(self) -> list[tuple[int, int]]:
        """Where each block lies in this process: (address, bytes)."""
        return self._places(self.memory)

    def _places(self, memory: mmap.mmap) -> list[tuple[int, int]]:
        # Released at once: an exported buffer would keep the mapping from being closed.
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        sizes = [block.pages * PAGE_BYTES for block in self.blocks]
        return list(zip(accumulate(sizes[:-1], initial=address), sizes, strict=True))

    def close(self) -> None:
        """Let RAM go."""
        self.memory.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


def _reserved(size: int, alignment: int) -> mmap.mmap:
    """Addresses for ``size`` bytes, to be mapped over; aligned, as a mapping of huge pages has to be.

    The kernel aligns only what it takes for huge pages itself; nothing is taken from their pool.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    if alignment > mmap.PAGESIZE and size % alignment == 0:
        huge = _MAP_HUGETLB | (alignment.bit_length() - 1) << _MAP_HUGE_SHIFT
        with suppress(OSError):  # no huge pages of this size: a file that merely prefers them
            return mmap.mmap(-1, size, flags=flags | huge)
    return mmap.mmap(-1, size, flags=flags)


def _map_over(fd: int, address: int, length: int) -> None:
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, length, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
