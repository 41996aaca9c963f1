"""A guest's memory as the guest knows it: what it stored in each page it owns, and what the log has seen.

Content is remembered when it is stored, never read back from RAM: the oracle of every comparison here.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract

ZERO_PAGE = bytes(PAGE_BYTES)
_UNIT = struct.Struct("<QII")


@dataclass(frozen=True)
class Image:
    """A guest at a pause: what it owns, what it had stored there, and all of its RAM at that moment."""

    owned: dict[int, bytes]
    ram: bytes
    contract: FreeContract
    stores: int

    def wrong_pages(self, found: bytes) -> dict[int, str]:
        """What is wrong with this RAM for a guest that goes on with it here.

        An owned page has what was stored. A free one reads as zero where the guest expects that; else as
        zero or as what it was at the pause, never as bytes of an earlier time or of somebody else (R11).
        """
        wrong = {}
        for page in range(len(self.ram) // PAGE_BYTES):
            here = found[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            there = self.ram[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            if page in self.owned:
                if here != self.owned[page]:
                    wrong[page] = f"page {page} is owned and has {_name(here)}, not {_name(self.owned[page])}"
            elif here != ZERO_PAGE and (self.contract is FreeContract.ZERO or here != there):
                wrong[page] = f"page {page} is free and has {_name(here)}, was {_name(there)}"
        return wrong


def _name(content: bytes) -> str:
    if content == ZERO_PAGE:
        return "zeros"
    stores, page, _ = _UNIT.unpack_from(content)
    return f"store {stores} of page {page}" if content[:16] == content[16:32] else "other bytes"


class Memory:
    """RAM in blocks, mapped; one process has it. ``close`` lets it go."""

    def __init__(self, fds: Sequence[int], pages: Sequence[int], dice: random.Random) -> None:
        """``fds`` are ours."""
        self.fds = list(fds)
        self.block_pages = tuple(pages)
        self.pages = sum(pages)
        self._dice = dice
        self._places: list[tuple[mmap.mmap, int]] = []
        for fd, count in zip(fds, pages, strict=True):
            mapping = mmap.mmap(fd, count * PAGE_BYTES)
            self._places += [(mapping, number * PAGE_BYTES) for number in range(count)]
        self.owned: dict[int, bytes] = {}
        self.contract = FreeContract.ANYTHING
        self.stores = 0
        self.log: set[int] | None = None
        self.smuggled: set[int] = set()
        """Pages changed behind the log's back."""
        self.took_unwritten = False
        """It relied on a free page's zeros: if that was skipped it is "rescued", though nothing is lost."""

    def restore(self, image: Image) -> None:
        """Be the guest of this image; RAM is as it is."""
        self.owned, self.contract, self.stores = dict(image.owned), image.contract, image.stores

    def image(self) -> Image:
        return Image(dict(self.owned), self.whole(), self.contract, self.stores)

    def whole(self) -> bytes:
        return b"".join(self.page(page) for page in range(self.pages))

    def page(self, page: int) -> bytes:
        mapping, offset = self._places[page]
        return mapping[offset : offset + PAGE_BYTES]

    @property
    def free(self) -> list[int]:
        return [page for page in range(self.pages) if page not in self.owned]

    @property
    def free_bitmap(self) -> bytes:
        return PageBitmap.of(self.pages, self.free).to_bytes()

    # -- what a guest does --------------------------------------------------------------------------

    def store(self, page: int, content: bytes, *, logged: bool = True) -> None:
        """Own the page and have this in it."""
        self._put(page, content, logged=logged)
        self.owned[page] = content

    def _put(self, page: int, content: bytes, *, logged: bool = True) -> None:
        mapping, offset = self._places[page]
        mapping[offset : offset + PAGE_BYTES] = content
        if logged and self.log is not None:
            self.log.add(page)

    def new_content(self, page: int) -> bytes:
        """No other store had it."""
        self.stores += 1
        if self._dice.random() < 0.1:
            return _UNIT.pack(self.stores, page, 0) + self._dice.randbytes(PAGE_BYTES - _UNIT.size)
        return _UNIT.pack(self.stores, page, self._dice.getrandbits(32)) * (PAGE_BYTES // _UNIT.size)

    def write(self, page: int) -> None:
        self.store(page, self.new_content(page))

    def scribble(self, page: int) -> None:
        """Change one byte of an owned page."""
        at, value = self._dice.randrange(PAGE_BYTES), self._dice.randrange(256)
        content = self.owned[page]
        self.store(page, content[:at] + bytes([value]) + content[at + 1 :])

    def touch(self, page: int) -> None:
        """Store what is there."""
        self.store(page, self.owned[page])

    def clear(self, page: int) -> None:
        self.store(page, ZERO_PAGE)

    def give_up(self, page: int) -> None:
        """Free the page: init_on_free zeroes it then, other guests leave what is there."""
        if self.contract is FreeContract.ZERO:
            self._put(page, ZERO_PAGE)
        del self.owned[page]

    def take(self, page: int) -> str:
        """Allocate a free page. What is wrong with it, if the guest could rely on zeros."""
        found = self.page(page)
        if self.contract is FreeContract.ZERO:
            self.owned[page] = ZERO_PAGE  # never stored: nothing may have changed it
            if self._dice.random() < 0.8:
                self.write(page)
            else:
                self.took_unwritten = True
            return "" if found == ZERO_PAGE else f"allocated page {page} has {_name(found)}, not zeros"
        if self._dice.random() < 0.2 and found != ZERO_PAGE:
            self.store(page, found)  # a page-cache re-read: the same bytes again
        else:
            self.write(page)
        return ""

    def smuggle(self, page: int) -> None:
        """Change an owned page so that no log sees it (W13)."""
        self.store(page, self.new_content(page), logged=False)
        self.smuggled.add(page)

    def wrong_pages(self) -> list[str]:
        """The guest's own check of what it owns."""
        return [f"page {page}" for page, content in self.owned.items() if self.page(page) != content]

    def fill(self, owned: Iterable[int]) -> None:
        """At the beginning."""
        for page in owned:
            self.write(page)

    def close(self) -> None:
        """The process has ended."""
        self.log = None
        self._places.clear()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
