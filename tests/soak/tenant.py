"""Tenant: what a soaked guest does with its memory: allocate, store, free, and take what it freed at once.

RAM is written only by stores through the guest's one mapping, since the kernel's dirty log sees nothing else;
a tenant that smuggles does it the other way, and the oracle has to notice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from mmap import mmap

import numpy as np
from numpy.typing import NDArray

from migd.ram.contract import FreeContract
from tests.soak.journal import Journal
from tests.soak.page import PAGE_BYTES, WORDS, content

MAX_RUN_PAGES = 64
_FILL_PAGES = 512
_REWRITE_SHARE = 0.5
"""Of all steps; the others allocate or free, whichever brings the live set nearer to its size."""

Pages = NDArray[np.int64]


class Tenant:
    """Works on ``memory`` and keeps ``journal``; every method but the questions is one step."""

    def __init__(
        self,
        guest: int,
        memory: mmap,
        journal: Journal,
        *,
        contract: FreeContract,
        live_fraction: float,
        seed: int,
    ) -> None:
        self._guest = guest
        self._memory = np.frombuffer(memory, np.uint64).reshape(-1, WORDS)
        self._journal = journal
        self._contract = contract
        self._live_pages = max(1, int(len(self._memory) * live_fraction))
        self._owned_pages = int(np.count_nonzero(journal.owned))
        self._random = np.random.default_rng((seed, journal.sequence))
        self.reuse_share = 0.0
        """Of all steps: free a run and take it into use again at once."""

    @property
    def pages(self) -> int:
        return len(self._memory)

    def populate(self, *, hog: bool) -> None:
        """Store the live set; as a ``hog`` every page first, so that the free ones hold old data."""
        if hog:
            for first in range(0, self.pages, _FILL_PAGES):
                self._allocate(np.arange(first, min(first + _FILL_PAGES, self.pages)))
            self._free(np.flatnonzero(self._journal.owned))
        while self._owned_pages < self._live_pages:
            run = self._run()
            self._allocate(run[~self._journal.owned[run]])

    def step(self) -> int:
        """One operation on at most one run of 64 pages: how many bytes were stored."""
        run = self._run()
        owned = run[self._journal.owned[run]]
        chance = self._random.random()
        self._journal.begin_step()
        if len(owned) and chance < self.reuse_share:
            self._free(owned)
            self._allocate(owned)
            stored = owned
        elif len(owned) and self._random.random() < _REWRITE_SHARE:
            self._store(owned)
            stored = owned
        elif self._owned_pages >= self._live_pages:
            self._free(owned)
            stored = owned if self._contract is FreeContract.ZERO else owned[:0]
        else:
            stored = run[~self._journal.owned[run]]
            self._allocate(stored)
        self._journal.end_step()
        return max(1, len(stored)) * PAGE_BYTES  # a step that stores nothing costs a page's time

    def seize(self, share: float) -> None:
        """Take that share of the free pages into use and store to them at once: hints say they are free."""
        free = np.flatnonzero(~self._journal.owned)
        taken = free[self._random.random(len(free)) < share][: self._live_pages]
        self._journal.begin_step()
        self._allocate(taken)
        self._journal.end_step()

    def smuggle(self, fds: Sequence[int], first_pages: Sequence[int]) -> None:
        """Store to an owned page through the descriptor of its block, behind the dirty log's back (W13)."""
        owned = np.flatnonzero(self._journal.owned)
        page = int(owned[self._random.integers(len(owned))])
        block = max(number for number, first in enumerate(first_pages) if first <= page)
        self._journal.begin_step()
        row, sequences = self._new_content(np.array([page]))
        os.pwrite(fds[block], row.tobytes(), (page - first_pages[block]) * PAGE_BYTES)
        self._journal.sequences[page] = sequences[0]
        self._journal.end_step()

    def _run(self) -> Pages:
        start = int(self._random.integers(self.pages))
        return np.arange(start, min(start + int(self._random.integers(1, MAX_RUN_PAGES + 1)), self.pages))

    def _allocate(self, pages: Pages) -> None:
        if self._contract is FreeContract.ZERO:
            self._journal.surprised(int(np.count_nonzero(self._memory[pages].any(axis=1))))
        self._journal.owned[pages] = True
        self._owned_pages += len(pages)
        self._store(pages)

    def _free(self, pages: Pages) -> None:
        if self._contract is FreeContract.ZERO:
            self._memory[pages] = 0
        self._journal.owned[pages] = False
        self._owned_pages -= len(pages)

    def _store(self, pages: Pages) -> None:
        rows, sequences = self._new_content(pages)
        self._memory[pages] = rows
        self._journal.sequences[pages] = sequences

    def _new_content(self, pages: Pages) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        sequences = self._journal.next_sequences(len(pages))
        return content(self._guest, pages.astype(np.uint64), sequences), sequences
