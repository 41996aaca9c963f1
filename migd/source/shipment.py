"""Shipment: picked pages on their way into one stream, batch by batch, read and sent by the same thread."""

from __future__ import annotations

import numpy as np

from migd.migration.ports import Clock, Link
from migd.ram.bitmap import PageBitmap, PageIndices
from migd.ram.block import PAGE_BYTES
from migd.source.batcher import Batcher
from migd.source.sent_image import SentDigests
from migd.wire.protocol import FrameType

SHIPMENT_BATCHES = 4
"""Batches for each hop between loop and thread, which costs 0.1 to 0.3 ms: a tenth of what 4 batches take."""


class Shipment:
    """What one stream picked at a time. ``send`` runs in a worker, as often as it takes."""

    def __init__(
        self,
        pages: PageIndices,
        exposed: PageBitmap,
        batch_pages: int,
        clock: Clock,
        sent: SentDigests,
    ) -> None:
        """``exposed``: those of the pages that need a ZERO record if they are zero (R10).

        ``sent`` learns of each record behind the call that puts it into the stream, and of nothing else.
        """
        self._pages = pages
        self._exposed = exposed if exposed else None
        self._batch_pages = batch_pages
        self._clock = clock
        self._sent = sent
        self._next = 0
        self._zero: list[PageIndices] = []
        self.page_bytes = 0
        self.payload_bytes = 0
        self.sending_s = 0.0
        """How long the stream took to accept the payload, as far as the thread has seen it."""

    @property
    def done(self) -> bool:
        return self._next >= len(self._pages)

    @property
    def zero(self) -> PageIndices:
        """Those that were zero when they were read, ascending."""
        return np.concatenate(self._zero) if self._zero else self._pages[:0]

    def send(self, link: Link, batcher: Batcher, buffer: memoryview, allowance_bytes: float) -> None:
        """Read, pack and send until all or ``allowance_bytes`` are sent, or the link takes no more for now.

        ``buffer``, of 2 MiB, is in use until the link was flushed.
        """
        batch_pages = int(min(self._batch_pages, max(1, allowance_bytes / PAGE_BYTES)))
        up_to_bytes = link.sent_bytes + allowance_bytes
        while not self.done and not link.congested and link.sent_bytes < up_to_bytes:
            indices = self._pages[self._next : self._next + batch_pages]
            self._next += len(indices)
            batch = batcher.build(indices, buffer)
            if len(batch.zero):
                self._zero.append(batch.zero)
                self._send_zero(link, batch.zero)
            if batch.count:
                began = self._clock.now()
                link.send_pages_now(batch.runs, batch.digests, batch.codec, batch.payload)
                self.sending_s += self._clock.now() - began
                self._sent.put(batch.runs, batch.copies, batch.digests)
                self.page_bytes += batch.count * PAGE_BYTES
                self.payload_bytes += len(batch.payload)

    def _send_zero(self, link: Link, zero: PageIndices) -> None:
        if self._exposed is not None:
            records = PageBitmap.of(self._exposed.pages, zero) & self._exposed
            if records:
                runs = list(records.runs())
                link.send_runs_now(FrameType.ZERO, runs)
                self._sent.clear(runs)
