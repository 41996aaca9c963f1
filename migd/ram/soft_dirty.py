"""SoftDirty: the kernel's older marks of written pages, as a dirty log of a process that nobody prepared.

``clear`` (4 into /proc/PID/clear_refs) takes the mark, and the right to write, from every page of the
process; the fault of the next write gives both back. ``written`` reads the marks: bit 55 of each page's entry
in /proc/PID/pagemap. Reading and clearing are two steps, and what is written between them is lost (W06). So
**the process must hold still from before ``written`` until after ``clear``** (QMP ``stop`` .. ``cont``). Only
the first ``clear``, with which the log begins, may find it running.

Seen is what is written through the process's own mapping, by itself or by the kernel for it. Not seen is what
userfaultfd does not see either (migd/ram/dirty_log.py): pwrite, other mappings, DMA into pinned pages.

Why it is sound, and where it would not be
------------------------------------------
The mark is in the page table's entry, and lasts as long as that does:

- A page that moves (compaction, NUMA) keeps it: what stands in its place meanwhile has a bit for it.
- A mapping made anew is marked as a whole.
- An entry of *shared* memory that is cleared takes its mark with it. Private memory has a swap entry in its
  place, shared memory has nothing, and the next read makes a new, clean one. So a page that was written,
  unmapped and read again before the next look is lost for good: nothing that can be read tells. What clears
  entries behind the process's back is reclaim (of memory on tmpfs if there is swap, of a file on a disk
  whenever memory is short) and the merging of pages into a huge one (khugepaged). ``obstacle`` says that
  this memory is subject to either, and then this log must not be used.
- An entry that was there at the last look and is not there now was cleared all the same, by the process
  itself (MADV_DONTNEED, a hole punched into the file): the page counts as written, whatever its mark says.
  One that was not there at the last look either has not been written in between, or it would be there now,
  unless the process dropped it again. QEMU drops what the guest gives to a balloon and nothing else; as with
  userfaultfd, what a guest expects of such pages when it takes them back is not this log's business.

  It would be simpler to count every page without an entry, unless it is a hole of the file. But of a file
  that somebody else filled, as a destination daemon does, all that QEMU has not touched yet is such a page,
  and would be sent again in each iteration.
- Pages of hugetlbfs have no marks.

Only one can use the marks of a process: another program that clears them (CRIU) takes these away.

This file needs Python's library and nothing else: the tests run it in a guest, whose kernel has the marks.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

_ENTRY_BYTES = 8
_MARK_BYTE = 6
_PRESENT_BYTE = 7
"""Of an entry's eight, the lowest first; soft-dirty (bit 55) and present (63) are the top bits of theirs."""

_TOP_BIT = bytes(ord("1") if byte & 0x80 else ord("0") for byte in range(256))
"""``translate`` makes a binary number of a slice of entries with it, in C."""

_SLICE_PAGES = 1 << 17
"""1 MiB of entries for 512 MiB of memory; from 64 KiB up it makes no difference to the speed."""

_CLEAR_SOFT_DIRTY = b"4"

_TMPFS = 0x01021994
_STATFS_BYTES = 120

_SWAPS = Path("/proc/swaps")

_libc = ctypes.CDLL(None, use_errno=True)


class SoftDirty:
    """The marks of the given ranges of one process, to be closed; all errors are the kernel's OSError.

    The process is the one that had this number when the object was made, also when another has it later.
    """

    def __init__(self, pid: int, ranges: Iterable[tuple[int, int]]) -> None:
        """``ranges``: (address, pages) each; they are counted through one behind the other."""
        self._pid = pid
        self._ranges = list(ranges)
        self._count = sum(pages for _, pages in self._ranges)
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._clear_refs = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._pagemap)
            raise
        self._present: int | None = None  # until the first look
        self._vanished = 0

    def close(self) -> None:
        if self._pagemap >= 0:
            os.close(self._pagemap)
            os.close(self._clear_refs)
            self._pagemap = self._clear_refs = -1

    def clear(self) -> None:
        """Take all marks: the log begins, or begins anew. The process has held still since ``written``."""
        if self._present is None:
            self._look()
        os.write(self._clear_refs, _CLEAR_SOFT_DIRTY)
        self._vanished = 0

    def written(self) -> bytes:
        """The pages written since the last ``clear``: a bit each, least significant first, 1 = written.

        It changes nothing: without a ``clear`` in between the next call has the same pages, and those
        written since. It takes 10 to 25 ms for each GiB that is present (Linux 6.18), of which 2 are ours.
        """
        marked = self._look()
        return (marked | self._vanished).to_bytes((self._count + 7) // 8, "little")

    def obstacle(self, fd: int) -> str | None:
        """Why the marks must not be relied on for this memory, in the file behind ``fd``; None if they may.

        To be asked before the log begins, and again when it is over: swap can be turned on meanwhile.
        """
        if not supported():
            return "this kernel has no soft-dirty marks"
        if _file_system(fd) != _TMPFS:
            return "soft-dirty marks do not last on files that are not in memory, or are in huge pages"
        smaps = self._smaps()
        areas = [
            area
            for start, pages in self._ranges
            for area in _overlapping(smaps, start, start + pages * mmap.PAGESIZE)
        ]
        if any(_may_be_huge(area) for area in areas):
            return (
                "its pages may be merged into huge ones, which loses soft-dirty marks: mount its tmpfs with "
                "huge=never, or write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled"
            )
        if _swap_is_on() and not all("lo" in _flags(area) for area in areas):
            return (
                "swap is on, and a page that is swapped out loses its soft-dirty mark: swapoff -a, or start "
                "QEMU with -overcommit mem-lock=on"
            )
        return None

    def _look(self) -> int:
        """The marks, as a number with a bit for each page; takes note of entries that are gone."""
        marks: list[bytes] = []
        present: list[bytes] = []
        for address, pages in self._ranges:
            for first in range(0, pages, _SLICE_PAGES):
                entries = self._entries(address // mmap.PAGESIZE + first, min(_SLICE_PAGES, pages - first))
                marks.append(_top_bits(entries, _MARK_BYTE))
                present.append(_top_bits(entries, _PRESENT_BYTE))
        before, now = self._present, _number(present)
        if before is not None:
            self._vanished |= before & ~now
        self._present = now
        return _number(marks)

    def _entries(self, first: int, count: int) -> bytes:
        """Of so many pages of the address space."""
        size = count * _ENTRY_BYTES
        entries = os.pread(self._pagemap, size, first * _ENTRY_BYTES)
        if len(entries) != size:  # its memory is gone, or was never so large
            raise OSError(errno.ESRCH, f"the page table of process {self._pid} ends at page {first:#x}")
        return entries

    def _smaps(self) -> str:
        return Path(f"/proc/{self._pid}/smaps").read_text(errors="replace")


def _top_bits(entries: bytes, byte: int) -> bytes:
    """One byte's top bit of each entry, as digits, the last entry's first: numbers begin with the highest."""
    return entries[byte - _ENTRY_BYTES :: -_ENTRY_BYTES].translate(_TOP_BIT)


def _number(digits: list[bytes]) -> int:
    """With a bit for each page; the pieces are in the order of the pages."""
    return int(b"0" + b"".join(reversed(digits)), 2)


def supported() -> bool:
    """Whether this kernel marks written pages, found out by writing one: clear_refs takes a 4 on any."""
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            entry = os.pread(pagemap, _ENTRY_BYTES, address // mmap.PAGESIZE * _ENTRY_BYTES)
    finally:
        os.close(pagemap)
    return len(entry) == _ENTRY_BYTES and bool(entry[_MARK_BYTE] & 0x80)


# -- what could take a mark away --------------------------------------------------------------------------


def _file_system(fd: int) -> int:
    """The magic number of linux/magic.h."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fstatfs: {os.strerror(code)}")
    return int(struct.unpack_from("<q", answer)[0]) & 0xFFFF_FFFF


def _overlapping(smaps: str, start: int, end: int) -> list[str]:
    """The paragraphs of /proc/PID/smaps about a part of these addresses."""
    heads = list(re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) ", smaps, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(smaps)]
    return [
        smaps[head.start() : stop]
        for head, stop in zip(heads, ends, strict=True)
        if int(head[1], 16) < end and int(head[2], 16) > start
    ]


def _may_be_huge(area: str) -> bool:
    """THPeligible: it may become so; the others: it is."""
    return re.search(r"^(THPeligible|(File|Shmem)PmdMapped): +[1-9]", area, re.MULTILINE) is not None


def _flags(area: str) -> list[str]:
    found = re.search(r"^VmFlags: (.*)$", area, re.MULTILINE)
    return found[1].split() if found else []


def _swap_is_on() -> bool:
    return len(_SWAPS.read_text().splitlines()) > 1  # the first names the columns
