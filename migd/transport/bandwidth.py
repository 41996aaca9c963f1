"""SharedBandwidth: what all migrations of a daemon may put on the wire in one direction, awaited.

Who goes next is decided in ``migd.migration.bandwidth``; here are only the clock and those who wait.
"""

from __future__ import annotations

import asyncio
import math

from migd.migration.bandwidth import FRAME_S, Claim, FairShare, Flow, rate_of
from migd.migration.ports import Clock
from migd.transport.turns import Turns

_TICK_S = 0.001
"""Timers of the event loop are no finer; what a late one misses is made up for (``BURST_S``)."""


class SharedBandwidth:
    """One direction of one daemon. All limits are in bytes on the wire per second, 0 for none."""

    def __init__(self, limit_bytes_s: int, clock: Clock) -> None:
        self.limit_bytes_s = limit_bytes_s
        self._clock = clock
        self._share = FairShare(rate_of(limit_bytes_s), clock.now())
        self._turns: Turns[Claim] = Turns(self._withdraw)
        self._timer: asyncio.TimerHandle | None = None

    def open(self, limit_bytes_s: int = 0) -> MigrationBandwidth:
        """For one migration, with a limit of its own; to be closed."""
        flow = self._share.open(rate_of(limit_bytes_s), self._clock.now())
        return MigrationBandwidth(self, flow, limit_bytes_s)

    def change(self, limit_bytes_s: int) -> None:
        """From now on, also for those who wait."""
        self.limit_bytes_s = limit_bytes_s
        self._share.change(rate_of(limit_bytes_s), self._clock.now())
        self._serve()

    def change_flow(self, flow: Flow, limit_bytes_s: int) -> None:
        self._share.change_flow(flow, rate_of(limit_bytes_s), self._clock.now())
        self._serve()

    def close(self, flow: Flow) -> None:
        self._share.close(flow)

    async def take(self, flow: Flow, size_bytes: float) -> None:
        if not size_bytes or math.isinf(self._share.rate_of(flow)):
            return
        claim = self._share.ask(flow, size_bytes, self._clock.now())
        granted = self._share.grant(self._clock.now())
        self._turns.grant(granted)
        if claim not in granted:
            self._wake_later()
            await self._turns.of(claim)

    def rate_of(self, flow: Flow) -> float:
        return self._share.rate_of(flow)

    def part_of(self, flow: Flow) -> float:
        return self._share.part_of(flow)

    def _withdraw(self, claim: Claim) -> None:
        self._share.withdraw(claim)
        self._serve()

    def _serve(self) -> None:
        self._turns.grant(self._share.grant(self._clock.now()))
        self._wake_later()

    def _wake_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wait_s = self._share.wait_s(self._clock.now())
        if math.isfinite(wait_s):
            self._timer = asyncio.get_running_loop().call_later(max(wait_s, _TICK_S), self._serve)


class MigrationBandwidth:
    """See ``migd.migration.ports.Bandwidth``."""

    def __init__(self, shared: SharedBandwidth, flow: Flow, limit_bytes_s: int) -> None:
        self._shared = shared
        self._flow = flow
        self.limit_bytes_s = limit_bytes_s

    @property
    def rate_bytes_s(self) -> float:
        return self._shared.rate_of(self._flow)

    @property
    def frame_bytes(self) -> float:
        return self._shared.part_of(self._flow) * FRAME_S

    async def take(self, size_bytes: float) -> None:
        await self._shared.take(self._flow, size_bytes)

    def change(self, limit_bytes_s: int) -> None:
        """Another limit of this migration, from now on, also for streams that wait."""
        self.limit_bytes_s = limit_bytes_s
        self._shared.change_flow(self._flow, limit_bytes_s)

    def close(self) -> None:
        """The migration is over; nobody waits any more."""
        self._shared.close(self._flow)
