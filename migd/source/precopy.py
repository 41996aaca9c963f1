"""Precopy: one iteration after another over the streams, driven by the ledger and by nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from migd.ledger.ledger import Ledger, Tally
from migd.migration.convergence import RecentRate
from migd.migration.ports import Bandwidth, Clock, Link, Room, Worker
from migd.migration.stats import Iteration
from migd.ram.bitmap import PageBitmap
from migd.ram.layout import RamLayout
from migd.source.batcher import BATCH_PAGES, Batcher
from migd.source.sent_image import SentDigests
from migd.source.shipment import SHIPMENT_BATCHES, Shipment
from migd.wire import messages
from migd.wire.codec import CodecChoice
from migd.wire.protocol import MAX_RUNS_PER_FRAME, RUN, FrameType

Pace: TypeAlias = Callable[[int], Awaitable[int]]
"""Below which page may be read now, asked with the lowest that is to send; 0 to be asked again at once."""


class Precopy:
    """Sends what the ledger says over ``links``, and what was sent into ``digests``."""

    def __init__(
        self,
        migration: str,
        ram: RamLayout,
        ledger: Ledger[PageBitmap],
        links: list[Link],
        worker: Worker,
        clock: Clock,
        bandwidth: Bandwidth,
        room: Room,
        digests: SentDigests,
        choice: CodecChoice,
        batch_pages: int = BATCH_PAGES,
    ) -> None:
        self._migration = migration
        self._ram = ram
        self._ledger = ledger
        self._links = tuple(links)
        self._worker = worker
        self._clock = clock
        self._bandwidth = bandwidth
        self._room = room
        self._choice = choice
        self._batch_pages = batch_pages
        self._digests = digests
        self._batchers = [Batcher(ram, choice, clock) for _ in links]
        self.page_bytes = 0
        self.payload_bytes = 0
        self._recent = RecentRate()
        self.iterations: list[Iteration] = []
        self._before = _Counts()

    @property
    def wire_bytes(self) -> int:
        return sum(link.sent_bytes for link in self._links)

    @property
    def rate_bytes_s(self) -> float:
        """Content per second as of late, and no more than the bandwidth allows now; 0 before the first."""
        packing = self.page_bytes / self.wire_bytes if self.page_bytes else 1.0
        return min(self._recent.bytes_s, self._bandwidth.rate_bytes_s * packing)

    @property
    def _allowance_bytes(self) -> float:
        """What a stream may send between two turns."""
        return self._bandwidth.frame_bytes / len(self._links)

    async def iterate(self, *, live: bool, pace: Pace | None = None) -> Iteration:
        """Send everything the ledger has to send, then a barrier on every stream (R9)."""
        ledger = self._ledger
        number = len(self.iterations)
        iteration = Iteration(number=number, live=live, to_send_pages=ledger.to_send.count())
        self.iterations.append(iteration)
        wire_before, page_bytes_before, began = self.wire_bytes, self.page_bytes, self._clock.now()
        await self._send_free_records()
        async with asyncio.TaskGroup() as tasks:
            for link, batcher in zip(self._links, self._batchers, strict=True):
                tasks.create_task(self._drain(link, batcher, pace))
        for link in self._links:
            await link.send(messages.Barrier(migration=self._migration, iteration=number))
        ledger.barrier()
        iteration.seconds = self._clock.now() - began
        self._recent.add(self.page_bytes - page_bytes_before, iteration.seconds)
        iteration.wire_bytes = self.wire_bytes - wire_before
        self._before.difference(ledger.tally, iteration)
        self._before = _Counts.of(ledger.tally)
        return iteration

    async def _send_free_records(self) -> None:
        """FREE for what earlier iterations sent; before any other record of this one (R9, R11)."""
        while pages := self._ledger.pick_free(self._free_pages()):
            runs = list(pages.runs())
            await self._links[0].send_runs(FrameType.FREE, runs)
            self._digests.clear(runs)
            self._ledger.freed(pages)

    def _free_pages(self) -> int:
        """For one FREE record: in the worst case each page is a run."""
        return int(min(MAX_RUNS_PER_FRAME, max(1, self._allowance_bytes / RUN.size)))

    async def _drain(self, link: Link, batcher: Batcher, pace: Pace | None) -> None:
        """One stream: pick, read, send, until nothing is left to pick."""
        ledger = self._ledger
        while pages := ledger.pick(await self._room_ahead(pace)):
            exposed = ledger.zero_records(pages)
            shipment = Shipment(pages.indices(), exposed, self._batch_pages, self._clock, self._digests)
            while not shipment.done:
                await self._send(shipment, link, batcher)
            zero = PageBitmap.of(ledger.pages, shipment.zero)
            ledger.zeroed(zero)
            ledger.sent_pages(pages - zero)

    async def _room_ahead(self, pace: Pace | None) -> int:
        """How many pages a stream may pick now; at least one."""
        while True:
            pages = self._shipment_pages()
            if pace is None or not len(coming := self._ledger.to_send.lowest(pages).indices()):
                return pages
            stop = await pace(int(coming[0]))
            if fit := int(np.searchsorted(coming, stop)):
                return fit

    def _shipment_pages(self) -> int:
        """Several batches, but only a fair share of what is left: the streams shall end together."""
        share = self._ledger.to_send.count() // (2 * len(self._links))
        return max(self._batch_pages, min(share, SHIPMENT_BATCHES * self._batch_pages))

    async def _send(self, shipment: Shipment, link: Link, batcher: Batcher) -> None:
        """As much as the link takes at once, and its wait for room; nothing before it is the link's turn."""
        began = self._clock.now()
        await link.turn()
        waited_s = self._clock.now() - began
        slot = self._room.slot()
        try:
            await self._send_with(await slot.take(), shipment, link, batcher, waited_s)
        finally:
            slot.give_back()

    async def _send_with(
        self, buffer: memoryview, shipment: Shipment, link: Link, batcher: Batcher, waited_s: float
    ) -> None:
        """``waited_s`` for bandwidth counts as sending: where that is what holds us up, packing pays."""
        content, payload, seconds = shipment.page_bytes, shipment.payload_bytes, shipment.sending_s
        await link.in_thread(self._worker, shipment.send, link, batcher, buffer, self._allowance_bytes)
        began = self._clock.now()
        await link.flush()
        seconds = waited_s + shipment.sending_s - seconds + self._clock.now() - began
        self._choice.sent(shipment.payload_bytes - payload, seconds)
        self.page_bytes += shipment.page_bytes - content
        self.payload_bytes += shipment.payload_bytes - payload

    async def end(self) -> None:
        """END on every stream, with counts and digest (R9)."""
        self._ledger.finish()
        for link in self._links:
            await link.send(link.sent.end(self._migration))


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
