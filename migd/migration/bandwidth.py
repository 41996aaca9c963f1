"""Who may put how many bytes on the wire, and when: the bandwidth of one daemon in one direction, shared.

A pure policy; time is an argument, in seconds of a monotonic clock. Each migration is a ``Flow``. Its streams
``ask`` for one frame each, and ``grant`` says who may go now. Criteria, in order:

1. No flow is granted more than its own limit, and all together no more than the shared one: from the
   beginning on at most limit x (time + BURST_S) bytes; within any other stretch of time a frame of each flow
   more, for which bandwidth was saved up while it waited.
2. The flow that was served least is next, however many streams it has; within a flow, first come, first
   served. A large frame is waited for, so that small ones of others cannot overtake it for ever.
3. Nothing is kept for a flow that asks for nothing, nor for one that its own limit holds back: others take
   it, and neither can demand back more than LAG_S of it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from migd.sizes import UNLIMITED

BURST_S = 0.05
"""How much of an unused limit may be made up for: long enough for late timers and a scheduler's slice (a few
ms), short beside the 0.1 s in which a change has to take effect."""

LAG_S = 0.1
"""A flow that asks again within this time has not been idle: a single stream has nothing to ask for while it
builds its next frame, and would else get less than many streams, of which there is always one that waits."""

FRAME_S = 0.1
"""What a flow's streams together may send before they wait, at the flow's share of the limit: bytes are paid
for once they are sent, when it is known how many they were. So frames are smaller where the limit is low, and
the destination, which applies whole frames, has something to apply long before ``progress_s``."""

_ROUNDING_BYTES = 1e-3
"""What floating point may lack after waiting exactly as long as was said; it stays on the account."""


class Unlimited:
    """See ``migd.migration.ports.Bandwidth``: nobody waits."""

    rate_bytes_s = math.inf
    frame_bytes = math.inf

    async def take(self, size_bytes: float) -> None:
        pass

    def close(self) -> None:
        pass


def rate_of(limit_bytes_s: int) -> float:
    """A configured limit as a number to calculate with: infinite where there is none."""
    return math.inf if limit_bytes_s == UNLIMITED else float(limit_bytes_s)


class Bucket:
    """The account of one limit: bytes that may go now."""

    def __init__(self, rate_bytes_s: float, now_s: float) -> None:
        self.rate_bytes_s = rate_bytes_s
        self._bytes = self._burst_bytes
        self._at_s = now_s

    @property
    def _burst_bytes(self) -> float:
        return self.rate_bytes_s * BURST_S

    def refill(self, now_s: float, saving_for_bytes: float = 0) -> None:
        """Credit the time since the last call: up to a burst, and what somebody is waiting for on top."""
        if math.isinf(self.rate_bytes_s):
            self._bytes = math.inf
        else:
            credit = max(0.0, now_s - self._at_s) * self.rate_bytes_s
            self._bytes = min(self._bytes + credit, self._burst_bytes + saving_for_bytes)
        self._at_s = now_s

    def wait_s(self, size_bytes: float) -> float:
        """From the last ``refill`` on, until so many bytes may go."""
        missing = size_bytes - self._bytes
        return 0.0 if missing <= _ROUNDING_BYTES else missing / self.rate_bytes_s

    def spend(self, size_bytes: float) -> None:
        self._bytes -= size_bytes

    def change(self, rate_bytes_s: float, now_s: float) -> None:
        """Another limit from now on. What was saved up shrinks to the new burst."""
        self.refill(now_s)
        self.rate_bytes_s = rate_bytes_s
        self._bytes = min(self._bytes, self._burst_bytes)


@dataclass(eq=False)
class Claim:
    """One frame of one stream that waits for its turn."""

    flow: Flow
    size_bytes: float


@dataclass(eq=False)
class Flow:
    """One migration's part in it."""

    bucket: Bucket
    waiting: deque[Claim] = field(default_factory=deque)
    served_bytes: float = 0.0
    """Counts against others; never much less than those had who were served while this flow did not ask."""

    @property
    def next_bytes(self) -> float:
        return self.waiting[0].size_bytes

    @property
    def ready(self) -> bool:
        """Somebody waits, and this flow's own limit lets it go."""
        return bool(self.waiting) and self.bucket.wait_s(self.next_bytes) == 0


class FairShare:
    """All flows of one direction under one limit."""

    def __init__(self, rate_bytes_s: float, now_s: float) -> None:
        """``rate_bytes_s`` is infinite for no limit, as everywhere here."""
        self._bucket = Bucket(rate_bytes_s, now_s)
        self._flows: list[Flow] = []
        self._floor_bytes = 0.0

    def open(self, rate_bytes_s: float, now_s: float) -> Flow:
        """A migration begins, with a limit of its own."""
        flow = Flow(Bucket(rate_bytes_s, now_s), served_bytes=self._floor_bytes)
        self._flows.append(flow)
        return flow

    def close(self, flow: Flow) -> None:
        """A migration is over. Its claims must have been withdrawn."""
        self._flows.remove(flow)

    @property
    def rate_bytes_s(self) -> float:
        """The shared limit."""
        return self._bucket.rate_bytes_s

    def rate_of(self, flow: Flow) -> float:
        """The most that this flow can get, if no other asks."""
        return min(flow.bucket.rate_bytes_s, self.rate_bytes_s)

    def part_of(self, flow: Flow) -> float:
        """What this flow can count on, if all ask."""
        return min(flow.bucket.rate_bytes_s, self.rate_bytes_s / len(self._flows))

    # -- a frame ------------------------------------------------------------------------------------

    def ask(self, flow: Flow, size_bytes: float, now_s: float) -> Claim:
        """One frame more that waits; call ``grant`` next."""
        if not any(other.waiting for other in self._flows):
            self._bucket.refill(now_s)
        if not flow.waiting:
            flow.bucket.refill(now_s)
            self._lift(flow)
        claim = Claim(flow, size_bytes)
        flow.waiting.append(claim)
        return claim

    def withdraw(self, claim: Claim) -> None:
        """Its stream has ended; nothing if it was granted already."""
        if claim in claim.flow.waiting:
            claim.flow.waiting.remove(claim)

    def grant(self, now_s: float) -> list[Claim]:
        """Those that may go now, in order; their bytes are spent."""
        granted = []
        while (flow := self._next(now_s)) is not None and self._bucket.wait_s(flow.next_bytes) == 0:
            granted.append(self._serve(flow))
        return granted

    def wait_s(self, now_s: float) -> float:
        """Until ``grant`` has more to say; infinite if nobody waits."""
        flow = self._next(now_s)
        if flow is not None:
            return self._bucket.wait_s(flow.next_bytes)
        held_back = [flow.bucket.wait_s(flow.next_bytes) for flow in self._flows if flow.waiting]
        return min(held_back, default=math.inf)

    def _next(self, now_s: float) -> Flow | None:
        """Of the flows that their own limit lets go, the one served least.

        The shared limit saves for all that wait, also for those held back: else each would wait twice.
        """
        waiting = [flow for flow in self._flows if flow.waiting]
        for flow in waiting:
            flow.bucket.refill(now_s, flow.next_bytes)
        self._bucket.refill(now_s, sum(flow.next_bytes for flow in waiting))
        return min((flow for flow in waiting if flow.ready), key=lambda flow: flow.served_bytes, default=None)

    def _serve(self, flow: Flow) -> Claim:
        self._floor_bytes = max(self._floor_bytes, flow.served_bytes)
        for other in self._flows:
            if other is not flow and not other.ready:  # held back, or asks for nothing
                self._lift(other)
        claim = flow.waiting.popleft()
        flow.bucket.spend(claim.size_bytes)
        self._bucket.spend(claim.size_bytes)
        flow.served_bytes += claim.size_bytes
        return claim

    def _lift(self, flow: Flow) -> None:
        """Forget that it was served less than others, but for what may be caught up with."""
        flow.served_bytes = max(flow.served_bytes, self._floor_bytes - self.rate_bytes_s * LAG_S)

    # -- changes ------------------------------------------------------------------------------------

    def change(self, rate_bytes_s: float, now_s: float) -> None:
        """Another shared limit from now on, also for those who wait."""
        self._bucket.change(rate_bytes_s, now_s)

    def change_flow(self, flow: Flow, rate_bytes_s: float, now_s: float) -> None:
        """Another limit for one migration from now on, also for those who wait."""
        flow.bucket.change(rate_bytes_s, now_s)
