"""Stream: one data stream at its destination: places its page records, hands out what comes between them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from migd.destination.loader import Loader
from migd.errors import PeerLost
from migd.limits import Limits
from migd.migration.ports import Bandwidth, Link, Slot, Worker
from migd.wire.framing import Frame
from migd.wire.protocol import MAX_PAYLOAD_BYTES, PAGE_RECORDS

_LEAST_DEBT_BYTES = 2 * MAX_PAYLOAD_BYTES
"""Frames may be as large as was agreed when the migration began, whatever the limit is now."""


class Stream:
    """Takes in what comes, within the bandwidth, with room for one payload while one is being read."""

    def __init__(
        self,
        link: Link,
        loader: Loader,
        worker: Worker,
        slot: Slot,
        bandwidth: Bandwidth,
        streams: int,
        limits: Limits,
        applied: Callable[[int], None],
    ) -> None:
        """One of ``streams`` that share the bandwidth; ``applied`` is told of bytes of RAM, once settled."""
        self._link = link
        self._loader = loader
        self._worker = worker
        self._slot = slot
        self._bandwidth = bandwidth
        self._streams = streams
        self._limits = limits
        self._applied = applied
        self._paid_bytes = link.received_bytes
        link.lend(None)

    async def next(self) -> Frame:
        """The next frame that is no page record, once all records before it are placed; no room is held then.

        Raises what ``Loader.take_in`` and the link raise, and PeerLost for a peer that stops inside a frame.
        """
        try:
            while True:
                frame = await self._take_in()
                if frame is not None:
                    return frame
        finally:
            self._give_back()

    async def _take_in(self) -> Frame | None:
        link, allowance_bytes = self._link, self._bandwidth.frame_bytes / self._streams
        intake = await link.in_thread(self._worker, self._loader.take_in, link, allowance_bytes)
        self._applied(intake.placed_bytes)
        if intake.frame is not None:
            return intake.frame
        if link.starved:
            link.lend(await self._slot.take())
            return None
        if link.at_boundary:
            await self._pay()
        return None if intake.placed_bytes else await self._await_frame()

    async def _pay(self) -> None:
        """Between two frames; room that others could use meanwhile is not held."""
        owed_bytes = self._link.received_bytes - self._paid_bytes
        self._paid_bytes = self._link.received_bytes
        if self._slot.wanted or math.isfinite(self._bandwidth.rate_bytes_s):
            self._give_back()
        # What a limit allowed that was lowered since is not held against the stream until it looks stalled.
        await self._bandwidth.take(min(owed_bytes, max(_LEAST_DEBT_BYTES, 2 * self._bandwidth.frame_bytes)))

    async def _await_frame(self) -> Frame | None:
        """Nothing has come for a moment. Between two frames the source may have nothing to send for long."""
        between = self._link.at_boundary
        if between:
            self._give_back()
        try:
            async with asyncio.timeout(None if between else self._limits.progress_s) as patience:
                frame = await self._link.receive(lambda: self._lend(patience))
        except TimeoutError as error:
            raise PeerLost(f"the source stopped inside a frame for {self._limits.progress_s:g} s") from error
        if frame.type not in PAGE_RECORDS:
            return frame
        self._applied(await self._worker.run(self._loader.place, frame))
        return None

    async def _lend(self, patience: asyncio.Timeout) -> memoryview:
        """From here on the frame holds room, and the source has to go on with it (G6)."""
        buffer = await self._slot.take()
        patience.reschedule(asyncio.get_running_loop().time() + self._limits.progress_s)
        return buffer

    def _give_back(self) -> None:
        self._link.lend(None)
        self._slot.give_back()
