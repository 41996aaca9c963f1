"""Workload: what a stub guest does with its memory, one small step at a time.

Every step is an operation on at most one run of 64 pages and ends at a safe point, so that whoever drives it
may pause, arm or answer between any two.

What a guest does (its kind) and what its memory looks like are chosen apart: the live set is a share of RAM,
in runs of some length; the rest was never touched, or is zero, or holds old data.
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

PACKED_FROM = 0.9
"""A larger live set lies from page 0 upwards: scattered, it would be searched ever longer for ever less."""

_CATCH_UP_S = 0.05
"""A guest that fell behind its rate (a slice lost to the scheduler, a pause) makes up for at most this."""

MAX_APART_PAGES = MAX_RUN_PAGES - 2
"""The longest run that an allocation finds together with the free pages on both its sides."""
MAX_APART_LIVE = 0.4
"""Single pages put down at random, none next to another, leave no room for one more at 0.43 (Renyi's parking
problem on a line of pages); longer runs come further."""

_ZEROS = memoryview(bytes(MAX_RUN_PAGES * PAGE_BYTES))

Counter = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""Whatever arrives in a device state stays small enough to be counted on, and stamped as a u64."""
Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class WorkloadKind(StrEnum):
    IDLE = "idle"
    CHURN = "churn"
    HOG = "hog"
    WRITE_HEAVY = "write-heavy"


class Rest(StrEnum):
    """What the pages beside the live set hold once a guest is ready."""

    UNTOUCHED = "untouched"
    ZEROED = "zeroed"
    FREED = "freed"
    """Old data, as the hog leaves it."""


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
    live_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)]
    seed: Unsigned
    contract: FreeContract
    fill: tuple[str, ...]
    rest: Rest = Rest.UNTOUCHED
    """A hog's is FREED, but for the share that HOG_FRACTION leaves."""
    run_pages: Annotated[int, msgspec.Meta(ge=0, le=MAX_APART_PAGES)] = 0
    """Live runs have 1 to this many pages, and a free page on either side; 0: up to 64, wherever they fit."""


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
        self._packed = plan.live_fraction > PACKED_FROM
        self._hogs = plan.kind is WorkloadKind.HOG or plan.rest is not Rest.UNTOUCHED
        hog_fraction = HOG_FRACTION if plan.kind is WorkloadKind.HOG else 1.0
        self._hog_pages = max(self._live_pages, int(machine.pages * hog_fraction))
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
        aim = self._hog_pages if self._hogs else self._live_pages
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
            self.progress.phase = Phase.FILL_HOG if self._hogs else Phase.STEADY
            return
        self._store(run, stamp=False)
        self.live.append(run)

    def _fill_hog(self) -> None:
        missing = self._hog_pages - self._machine.allocator.owned_pages
        length = min(missing, MAX_RUN_PAGES)
        run = self._machine.allocate_next(length, self.progress.cursor) if missing > 0 else None
        if run is None:
            self.progress.phase = Phase.FREE_HOG
            return
        if self.plan.rest is Rest.ZEROED:
            self._machine.write(run[0], _ZEROS[: (run[1] - run[0]) * PAGE_BYTES], stamp=False)
        else:
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
        return MAX_RUN_PAGES if self._packed else 1 + self._random.below(self.plan.run_pages or MAX_RUN_PAGES)

    def _allocate(self, length: int) -> PageRun | None:
        if self._packed:
            return self._machine.allocate(length, self.live[-1][1] if self.live else 0)
        near = self._random.below(self._machine.pages)
        return (
            self._allocate_apart(length, near)
            if self.plan.run_pages
            else self._machine.allocate(length, near)
        )

    def _allocate_apart(self, length: int, near: int) -> PageRun | None:
        """A run with a free page on either side, so that two runs never touch and become one."""
        room = self._machine.allocate(length + 2, near)
        if room is None:
            return None
        start, stop = room[0] + 1, room[1] - 1
        allocator = self._machine.allocator
        if start >= stop:
            allocator.free(*room)
            return None
        allocator.free(room[0], start)
        allocator.free(stop, room[1])
        return start, stop

    def _store(self, run: PageRun, *, stamp: bool) -> None:
        self._machine.write(run[0], self._content.take(run[1] - run[0]), stamp=stamp)
