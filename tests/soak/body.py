"""Body: what a soaked guest is: its making, its RAM, its journal in another memory, and a tenant that works.

An incoming guest has RAM before it has the rest, which comes as its device state.
"""

from __future__ import annotations

import itertools
import os
import tempfile

import msgspec
import numpy as np

from migd.guest.control import Block
from migd.guest.mapping import RamMapping
from migd.ram.contract import FreeContract
from migd.ram.dirty_log import WriteProtection
from tests.soak.journal import Journal, journal_file
from tests.soak.page import PAGE_BYTES
from tests.soak.tenant import Tenant
from tests.soak.words import Behaviour, Making


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What travels beside RAM."""

    making: Making
    behaviour: Behaviour
    journal: bytes
    stopped_at_ns: int


class Body:
    """A guest on its RAM, which is its own from now on."""

    def __init__(self, making: Making, ram: RamMapping, saved: bytes = b"") -> None:
        """``saved``: the journal of the guest that this RAM comes from. ValueError if it is of another."""
        pages = sum(making.block_pages)
        self.making = making
        self.ram = ram
        self.journal_fd = journal_file(pages)
        self.journal = Journal(self.journal_fd, pages, writable=True)
        if saved:
            self.journal.load(saved)
        self.tenant = Tenant(
            making.guest,
            ram.memory,
            self.journal,
            contract=FreeContract(making.contract),
            live_fraction=making.live_fraction,
            seed=making.seed,
        )
        self._protection: WriteProtection | None = None

    @property
    def pages(self) -> int:
        return self.tenant.pages

    def arm(self) -> tuple[list[int], int]:
        """Log every store to RAM from now on: (address of each block, pagemap descriptor, still ours)."""
        self.disarm()
        places = self.ram.places()
        self._protection = WriteProtection(places)
        return [address for address, _ in places], self._protection.pagemap_fd

    def disarm(self) -> None:
        """Log stores no more, if they were."""
        if self._protection is not None:
            self._protection.close()
            self._protection = None

    def smuggle(self) -> None:
        """See ``Tenant.smuggle``."""
        first_pages = list(itertools.accumulate(self.making.block_pages[:-1], initial=0))
        self.tenant.smuggle(self.ram.fds, first_pages)

    def all_free(self) -> bytes:
        """The bitmap of a liar."""
        return np.packbits(np.ones(self.pages, np.bool_), bitorder="little").tobytes()


def blocks(making: Making) -> tuple[Block, ...]:
    """As they are announced to a daemon."""
    return tuple(Block(f"ram{number}", pages) for number, pages in enumerate(making.block_pages))


def own_ram(making: Making) -> RamMapping | None:
    """RAM that a new guest brings with it; None if the daemon is to give it some."""
    if making.brings == "nothing":
        return None
    fds = [_zeros(making.brings, pages * PAGE_BYTES) for pages in making.block_pages]
    return RamMapping(blocks(making), fds)


def _zeros(kind: str, size: int) -> int:
    """A descriptor of zeros: memory without a name, or a file whose name is gone again."""
    if kind == "memfd":
        fd = os.memfd_create("soak-ram", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
