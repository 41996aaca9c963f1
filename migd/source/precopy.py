"""Precopy: one iteration after another over the streams, driven by the ledger and by nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from migd.ledger.ledger import Ledger, Tally
from migd.migration.ports import Clock, Link, Worker
from migd.migration.stats import Iteration
from migd.ram.bitmap import PageBitmap, PageIndices, runs_of
from migd.ram.block import PAGE_BYTES, RamLayout
from migd.ram.digest import page_digests
from migd.ram.zero import zero_pages
from migd.source.batcher import BATCH_PAGES, Batch, Batcher, SentDigests
from migd.wire import messages
from migd.wire.codec import CodecChoice
from migd.wire.protocol import MAX_RUNS_PER_FRAME, FrameType

Pages: TypeAlias = NDArray[np.uint8]
"""Content of pages, shape (n, 4096)."""

_VERIFY_PAGES = 1 << 14
"""64 MiB to a job of the verification, 15 to 30 ms: between two jobs it can be cancelled."""


class Precopy:
    """Sends what the ledger says over ``links``, and remembers what was sent for the verification."""

    def __init__(
        self,
        migration: str,
        ram: RamLayout,
        ledger: Ledger[PageBitmap],
        links: list[Link],
        worker: Worker,
        clock: Clock,
        choice: CodecChoice,
        batch_pages: int = BATCH_PAGES,
    ) -> None:
        self._migration = migration
        self._ram = ram
        self._ledger = ledger
        self._links = tuple(links)
        self._worker = worker
        self._clock = clock
        self._choice = choice
        self._batch_pages = batch_pages
        self._digests = SentDigests(ram.pages)
        self._batchers = [Batcher(ram, self._digests, choice, clock) for _ in links]
        self.page_bytes = 0
        self.payload_bytes = 0
        self.sending_s = 0.0
        self.iterations: list[Iteration] = []
        self._before = _Counts()

    @property
    def wire_bytes(self) -> int:
        return sum(link.sent_bytes for link in self._links)

    @property
    def rate_bytes_s(self) -> float:
        """Content per second over all iterations so far; 0 before the first."""
        return self.page_bytes / self.sending_s if self.sending_s else 0.0

    async def iterate(self, *, live: bool) -> Iteration:
        """Send everything the ledger has to send, then a barrier on every stream (R9)."""
        ledger = self._ledger
        number = len(self.iterations)
        iteration = Iteration(number=number, live=live, to_send_pages=ledger.to_send.count())
        self.iterations.append(iteration)
        wire_before, began = self.wire_bytes, self._clock.now()
        await self._send_free_records()
        async with asyncio.TaskGroup() as tasks:
            for link, batcher in zip(self._links, self._batchers, strict=True):
                tasks.create_task(self._drain(link, batcher))
        for link in self._links:
            await link.send(messages.Barrier(migration=self._migration, iteration=number))
        ledger.barrier()
        iteration.seconds = self._clock.now() - began
        self.sending_s += iteration.seconds
        iteration.wire_bytes = self.wire_bytes - wire_before
        self._before.difference(ledger.tally, iteration)
        self._before = _Counts.of(ledger.tally)
        return iteration

    async def _send_free_records(self) -> None:
        """FREE for what earlier iterations sent; before any other record of this one (R9, R11)."""
        while pages := self._ledger.pick_free(MAX_RUNS_PER_FRAME):
            await self._links[0].send_runs(FrameType.FREE, list(pages.runs()))
            self._ledger.freed(pages)

    async def _drain(self, link: Link, batcher: Batcher) -> None:
        """One stream: pick, read, send, until nothing is left to pick."""
        while pages := self._ledger.pick(self._batch_pages):
            batch = await self._worker.run(batcher.build, pages.indices())
            await self._send(link, pages, batch)

    async def _send(self, link: Link, pages: PageBitmap, batch: Batch) -> None:
        ledger = self._ledger
        if len(batch.zero):
            zero = PageBitmap.of(ledger.pages, batch.zero)
            pages -= zero
            records = ledger.zero_records(zero)
            if records:
                await link.send_runs(FrameType.ZERO, list(records.runs()))
            ledger.zeroed(zero)
        if len(batch.data):
            began = self._clock.now()
            await link.send_pages(runs_of(batch.data), batch.digests, batch.codec, batch.payload)
            self._choice.sent(len(batch.payload), self._clock.now() - began)
            self.page_bytes += len(batch.data) * PAGE_BYTES
            self.payload_bytes += len(batch.payload)
            ledger.sent_pages(pages)

    async def end(self) -> None:
        """END on every stream, with counts and digest (R9)."""
        self._ledger.finish()
        for link in self._links:
            await link.send(link.sent.end(self._migration))

    # -- tracking verification ----------------------------------------------------------------------

    async def untracked(self) -> int:
        """Compare the paused guest's RAM with what was last sent: pages that differ are writes nobody saw.

        Pages skipped as free have no right content and are not compared. Holes and unsent zero pages must
        still be zero.
        """
        wrong = 0
        for pages, compare in ((self._ledger.sent, self._changed), (self._unsent(), self._not_zero)):
            start = 0
            while chunk := pages.lowest(_VERIFY_PAGES, start):
                start = chunk.stop()
                wrong += await self._worker.run(_in_batches, compare, chunk.indices())
        return wrong

    def _unsent(self) -> PageBitmap:
        """Zero pages, and holes at arming that are none now: reading those allocates nothing."""
        return self._ledger.zero | self._ram.touched(self._ledger.hole)

    def _changed(self, indices: PageIndices, scratch: Pages) -> int:
        digests = page_digests(self._ram.read(indices, scratch))
        return len(self._digests.differing(indices, digests))

    def _not_zero(self, indices: PageIndices, scratch: Pages) -> int:
        return int((~zero_pages(self._ram.read(indices, scratch))).sum())


def _in_batches(compare: Callable[[PageIndices, Pages], int], indices: PageIndices) -> int:
    """The sum of ``compare`` over batches that fit the processor's cache."""
    scratch = np.empty((BATCH_PAGES, PAGE_BYTES), np.uint8)
    return sum(
        compare(indices[low : low + BATCH_PAGES], scratch) for low in range(0, len(indices), BATCH_PAGES)
    )


@dataclass(frozen=True)
class _Counts:
    """The ledger's tally when the last iteration ended, for the difference at the end of the next."""

    sent: int = 0
    resent: int = 0
    zero: int = 0
    free: int = 0
    applied: int = 0

    @classmethod
    def of(cls, tally: Tally) -> _Counts:
        return cls(tally.sent, tally.resent, tally.zero, tally.free_records, tally.hints_applied)

    def difference(self, tally: Tally, iteration: Iteration) -> None:
        """What was counted since, into the iteration."""
        iteration.sent_pages = tally.sent - self.sent
        iteration.resent_pages = tally.resent - self.resent
        iteration.zero_pages = tally.zero - self.zero
        iteration.free_records = tally.free_records - self.free
        iteration.skipped_pages = tally.hints_applied - self.applied
