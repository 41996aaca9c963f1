"""Workload: what a stub guest does with its memory, one small step at a time.

Every step is an operation on at most one run of 64 pages and ends at a safe point, so that whoever drives it
may pause, arm or answer between any two.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from typing import Annotated

import msgspec

from migd.guest.allocator import MAX_RUN_PAGES, PageRun
from migd.guest.content import PAGE_BYTES, FileContent
from migd.guest.machine import Machine
from migd.ram.contract import FreeContract

HOG_FRACTION = 0.95
"""How much of RAM the hog fills before it lets go of it."""

_CATCH_UP_S = 0.05
"""A guest that fell behind its rate (a slice lost to the scheduler, a pause) makes up for at most this."""

Counter = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""Whatever arrives in a device state stays small enough to be counted on, and stamped as a u64."""
Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class WorkloadKind(StrEnum):
    IDLE = "idle"
    CHURN = "churn"
    HOG = "hog"
    WRITE_HEAVY = "write-heavy"


DEFAULT_RATES_BYTES_S = {
    WorkloadKind.IDLE: 0,
    WorkloadKind.CHURN: 50_000_000,
    WorkloadKind.HOG: 50_000_000,
    WorkloadKind.WRITE_HEAVY: 0,
}
"""0 = as fast as it goes. 50 MB/s dirties 5 % of a 1 GiB guest in a second, as a busy server does."""


class Phase(StrEnum):
    """Where a workload stands; STEADY is the one that never ends."""

    FILL_LIVE = "fill-live"
    FILL_HOG = "fill-hog"
    FREE_HOG = "free-hog"
    STEADY = "steady"


class WorkloadPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the workload was asked to be. ``rate_bytes_s`` 0 = unlimited."""

    kind: WorkloadKind
    rate_bytes_s: Counter
    live_fraction: Annotated[float, msgspec.Meta(gt=0, le=0.9)]
    seed: Unsigned
    contract: FreeContract
    fill: tuple[str, ...]


class WorkloadProgress(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How far it is, but for its runs."""

    phase: Phase = Phase.FILL_LIVE
    random: Unsigned
    operations: Counter = 0
    fresh_pages: Counter = 0
    """Written by churn to fresh allocations ..."""
    rewritten_pages: Counter = 0
    """... and to pages it had already; the smaller one is next."""
    cursor: Counter = 0


class SeededRandom:
    """SplitMix64: its whole state is one number, which travels with the guest."""

    def __init__(self, state: int) -> None:
        self.state = state & _MASK

    def below(self, bound: int) -> int:
        """A number in 0..bound-1."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) * bound) >> 64


_MASK = (1 << 64) - 1


class Pace:
    """Spreads operations over time; the clock is the caller's."""

    def __init__(self, rate_bytes_s: int) -> None:
        self._rate = rate_bytes_s
        self._due = 0.0

    def spend(self, written_bytes: int, now: float) -> None:
        """An operation of that size was done."""
        if self._rate:
            self._due = max(self._due, now - _CATCH_UP_S) + written_bytes / self._rate

    def wait_s(self, now: float) -> float:
        """Seconds until the next operation is due; 0 if it is."""
        return max(0.0, self._due - now)


class Workload:
    """A plan in progress on a machine. ``live`` are the runs it works on, oldest first."""

    def __init__(self, machine: Machine, content: FileContent, plan: WorkloadPlan) -> None:
        self.plan = plan
        self.live: deque[PageRun] = deque()
        self.hog: deque[PageRun] = deque()
        self.progress = WorkloadProgress(random=plan.seed & _MASK)
        self._machine = machine
        self._content = content
        self._random = SeededRandom(plan.seed)
        self._live_pages = max(1, int(machine.pages * plan.live_fraction))
        self._hog_pages = max(self._live_pages, int(machine.pages * HOG_FRACTION))
        self._pace = Pace(plan.rate_bytes_s)

    def resume(self, progress: WorkloadProgress, live: list[PageRun], hog: list[PageRun]) -> None:
        """Go on from a device state; every one of these pages is owned already."""
        self.progress = progress
        self.live, self.hog = deque(live), deque(hog)
        self._random = SeededRandom(progress.random)

    def snapshot(self) -> WorkloadProgress:
        """For a device state, together with ``live`` and ``hog``."""
        self.progress.random = self._random.state
        return self.progress

    @property
    def ready(self) -> bool:
        """Filled, and for a hog freed: from here on it goes on for ever."""
        return self.progress.phase is Phase.STEADY

    @property
    def filled(self) -> float:
        """How much of what is to be filled before it is ready is filled: 0 to 1."""
        aim = self._hog_pages if self.plan.kind is WorkloadKind.HOG else self._live_pages
        return min(1.0, self._machine.allocator.owned_pages / aim)

    def wait_s(self, now: float) -> float | None:
        """Seconds until there is something to do: 0 at once, None never (idle)."""
        if not self.ready:
            return 0.0
        return None if self.plan.kind is WorkloadKind.IDLE else self._pace.wait_s(now)

    def step(self, now: float) -> None:
        """One operation on one run; the caller asks ``wait_s`` first."""
        before = self._machine.written_pages
        match self.progress.phase:
            case Phase.FILL_LIVE:
                self._fill_live()
            case Phase.FILL_HOG:
                self._fill_hog()
            case Phase.FREE_HOG:
                self._free_hog()
            case Phase.STEADY:
                self._work()
                self._pace.spend((self._machine.written_pages - before) * PAGE_BYTES, now)
        self.progress.operations += 1

    # -- until it is ready --------------------------------------------------------------------------

    def _fill_live(self) -> None:
        missing = self._live_pages - self._machine.allocator.owned_pages
        run = self._allocate(min(missing, self._run_length())) if missing > 0 else None
        if run is None:
            self.progress.phase = Phase.FILL_HOG if self.plan.kind is WorkloadKind.HOG else Phase.STEADY
            return
        self._store(run, stamp=False)
        self.live.append(run)

    def _fill_hog(self) -> None:
        missing = self._hog_pages - self._machine.allocator.owned_pages
        length = min(missing, MAX_RUN_PAGES)
        run = self._machine.allocate(length, self.progress.cursor) if missing > 0 else None
        if run is None:
            self.progress.phase = Phase.FREE_HOG
            return
        self._store(run, stamp=False)
        self.hog.append(run)
        self.progress.cursor = run[1]

    def _free_hog(self) -> None:
        if self.hog:
            self._machine.free(*self.hog.popleft())
        else:
            self.progress.phase = Phase.STEADY

    # -- for ever after -----------------------------------------------------------------------------

    def _work(self) -> None:
        churns = self.plan.kind in (WorkloadKind.CHURN, WorkloadKind.HOG)
        if churns and self.progress.fresh_pages <= self.progress.rewritten_pages and self._replace():
            return
        self._rewrite()

    def _replace(self) -> bool:
        """Write a fresh run and free as much of the oldest ones; False if no page is free."""
        run = self._allocate(self._run_length())
        if run is None:
            return False
        self._store(run, stamp=True)
        self.live.append(run)
        self.progress.fresh_pages += run[1] - run[0]
        while len(self.live) > 1 and self._machine.allocator.owned_pages > self._live_pages:
            self._machine.free(*self.live.popleft())
        return True

    def _rewrite(self) -> None:
        run = self.live[self._random.below(len(self.live))]
        self._store(run, stamp=True)
        self.progress.rewritten_pages += run[1] - run[0]

    def _run_length(self) -> int:
        return 1 + self._random.below(MAX_RUN_PAGES)

    def _allocate(self, length: int) -> PageRun | None:
        return self._machine.allocate(length, self._random.below(self._machine.pages))

    def _store(self, run: PageRun, *, stamp: bool) -> None:
        self._machine.write(run[0], self._content.take(run[1] - run[0]), stamp=stamp)
