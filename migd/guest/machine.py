"""Machine: what a stub guest *is* - RAM, page allocator, and a journal of what it wrote where.

The journal is the oracle of every test: the XXH3 digest of each owned page, taken from the source content
before it is stored, never read back from RAM. RAM is written only by stores through the one mapping, since
the kernel's dirty log sees nothing else (docs/safety.md, W13).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from xxhash import xxh3_128_digest

from migd.guest.allocator import MAX_RUN_PAGES, PageAllocator, PageRun
from migd.ram.contract import FreeContract

page_digest = xxh3_128_digest
"""What ``migd.ram.digest.frame_digest`` is, without the numpy that comes with it."""

PAGE_BYTES = 4096
DIGEST_BYTES = 16

_ZERO_RUN = bytes(MAX_RUN_PAGES * PAGE_BYTES)
_ZERO_PAGE = bytes(PAGE_BYTES)
_STAMP = struct.Struct("<Q")
_CHECK_PAGES = 256
"""How many pages are checked between two looks at the clock: 0.3 ms."""


class Machine:
    """Guest RAM of ``pages`` pages in a shared mapping, whose owner stays the caller."""

    def __init__(self, ram: mmap, contract: FreeContract, allocator: PageAllocator | None = None) -> None:
        """``allocator``: of RAM that holds something already; the caller fills the journal of its pages."""
        self.ram = ram
        self.pages = len(ram) // PAGE_BYTES
        self.contract = contract
        self.allocator = allocator or PageAllocator(self.pages)
        self.journal = mmap(-1, self.pages * DIGEST_BYTES, MAP_PRIVATE | MAP_ANONYMOUS)
        """A digest per page; anonymous memory, since most rows are never touched."""
        self.sequence = 0
        """Stamps given out so far: no two stamped pages are ever equal."""
        self.written_pages = 0
        self.wrong_pages = 0
        """Pages that did not hold what they must: against the journal, or not zero when allocated."""
        self.first_wrong = -1
        self.check: SelfCheck | None = None

    def allocate(self, length: int, near: int) -> PageRun | None:
        """A run of up to ``length`` pages, shorter where memory is fragmented; None if RAM is full.

        Under the contract ZERO it is checked to read as zero, since nobody cleans it before its first use.
        """
        start = None
        while length and (start := self.allocator.allocate(length, near)) is None:
            length //= 2
        if start is None:
            return None
        if self.contract is FreeContract.ZERO:
            self._expect_zero(start, start + length)
        return start, start + length

    def allocate_next(self, length: int, near: int) -> PageRun | None:
        """The first free run at or behind page ``near``, cut to ``length``, checked as in ``allocate``."""
        run = self.allocator.allocate_next(length, near)
        if run is not None and self.contract is FreeContract.ZERO:
            self._expect_zero(*run)
        return run

    def write(self, start: int, content: memoryview, *, stamp: bool) -> None:
        """Store whole pages from page ``start`` on, all owned; ``stamp`` marks each in place first."""
        pages = len(content) // PAGE_BYTES
        self._settle(start, start + pages)
        if stamp:
            self._stamp(content)
        cut = range(0, len(content), PAGE_BYTES)
        digests = b"".join([page_digest(content[at : at + PAGE_BYTES]) for at in cut])
        self.journal[start * DIGEST_BYTES : (start + pages) * DIGEST_BYTES] = digests
        self.ram[start * PAGE_BYTES : (start + pages) * PAGE_BYTES] = content
        self.written_pages += pages

    def free(self, start: int, stop: int) -> None:
        """Give an owned run of at most MAX_RUN_PAGES back; under the contract ZERO it is zeroed first."""
        self._settle(start, stop)
        if self.contract is FreeContract.ZERO:
            self.ram[start * PAGE_BYTES : stop * PAGE_BYTES] = _ZERO_RUN[: (stop - start) * PAGE_BYTES]
        self.allocator.free(start, stop)

    def digest(self, page: int) -> bytes:
        """What the journal says of a page; of no meaning unless the page is owned."""
        return self.journal[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]

    def begin_check(self) -> SelfCheck:
        """Every page owned now becomes suspect, until it is checked or this is called again."""
        self.check = SelfCheck(self)
        return self.check

    def suspect(self, page: int) -> None:
        """Count a page that does not hold what it must."""
        self.wrong_pages += 1
        if self.first_wrong < 0:
            self.first_wrong = page

    def _stamp(self, content: memoryview) -> None:
        sequence = self.sequence
        for at in range(0, len(content), PAGE_BYTES):
            sequence += 1
            _STAMP.pack_into(content, at, sequence)
            _STAMP.pack_into(content, at + PAGE_BYTES - _STAMP.size, sequence)
        self.sequence = sequence

    def _settle(self, start: int, stop: int) -> None:
        """What is about to be lost is checked first."""
        if self.check is not None:
            self.check.settle(start, stop)

    def _expect_zero(self, start: int, stop: int) -> None:
        if self.ram[start * PAGE_BYTES : stop * PAGE_BYTES] == _ZERO_RUN[: (stop - start) * PAGE_BYTES]:
            return
        for page in range(start, stop):
            if self.ram[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] != _ZERO_PAGE:
                self.suspect(page)


class SelfCheck:
    """The comparison of every page owned at its beginning with the journal, all 4096 bytes of each.

    It goes on in slices while the guest runs: a page is checked before it is written or freed, or in turn.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pending = bytearray(machine.pages)  # 1 = owned and not yet checked
        self._next = 0
        self.pages = machine.allocator.owned_pages
        for start, stop in machine.allocator.owned_runs():
            self._pending[start:stop] = b"\x01" * (stop - start)

    def settle(self, start: int, stop: int) -> None:
        """Check what of this run is still pending."""
        page = self._pending.find(1, start, stop)
        while page >= 0:
            self._check(page)
            page = self._pending.find(1, page + 1, stop)

    def run(self, deadline: float, clock: Callable[[], float]) -> bool:
        """Check on until ``deadline`` on ``clock``; True once nothing is pending."""
        while True:
            for _ in range(_CHECK_PAGES):
                page = self._pending.find(1, self._next)
                if page < 0:
                    return True
                self._check(page)
                self._next = page + 1
            if clock() >= deadline:
                return False

    def _check(self, page: int) -> None:
        machine = self._machine
        self._pending[page] = 0
        at = page * PAGE_BYTES
        if page_digest(machine.ram[at : at + PAGE_BYTES]) != machine.digest(page):
            machine.suspect(page)
