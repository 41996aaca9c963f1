"""A Hypothesis state machine: one session after another over the real ledger and a simulated guest.

Larger than what tests/support/ledger_model.py searches exhaustively: up to 64 pages, sets of pages in every
call, several batches in flight at once, either log, either kind of PageSet. After every step the state
invariant of docs/safety.md holds for every page, and every page's part of the ledger is that of a ledger of
this page alone.

There is one rule, which draws the step: of several rules Hypothesis leaves some out of a history, and one
without requests, say, or without harvests, is about little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from migd.ledger.ledger import Ledger
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from tests.ledger.projected import ProjectedLedger
from tests.support.int_pages import IntPages
from tests.support.world import CompareWorld, World

SOME = st.tuples(st.integers(0, 63), st.integers(1, 24))
"""Neighbours: the first and how many; taken modulo the number of pages."""
CONTRACT = st.sampled_from([FreeContract.ANYTHING, FreeContract.ZERO] * 3 + [FreeContract.NONE])
"""Without one there are no hints: not what most histories should be about."""

OFTEN = {
    "guest writes": 4, "guest writes zeros": 2, "guest frees": 3, "guest answers": 20, "request hints": 8,
    "a hint arrives": 10, "pick": 4, "pick free": 4, "read or push": 10, "send the rest": 3, "barrier": 2,
    "harvest": 8, "look for dirty pages": 2, "harvest what was found": 8, "look for holes": 2,
    "mark holes": 4, "records arrive": 2, "arm": 20, "settle": 3, "finish": 3,
}  # fmt: skip
"""Times as often as a step not named here, where both are possible."""

Steps = dict[str, tuple[bool, Callable[[], object]]]
"""By name: whether it is possible now, and what it does."""


class PageForgotten(AssertionError):
    """A page whose content matters is remembered by nobody, or arrived wrong."""


class LedgerMachine(RuleBasedStateMachine):
    """One guest, its daemon, two streams, a destination."""

    ledger: type[Ledger[Any]] = ProjectedLedger

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[tuple[int, Any]] = []
        self.looked: set[int] | None = None
        self.telling = False

    @initialize(
        pages=st.integers(8, 64),
        compares=st.booleans(),
        contract=CONTRACT,
        sets=st.sampled_from([PageBitmap, IntPages]),
        free=SOME,
        untouched=SOME,
    )
    def begin(
        self, pages: int, compares: bool, contract: FreeContract, sets: Any, free: Any, untouched: Any
    ) -> None:
        kind = CompareWorld if compares else World
        some = [{(run[0] + step) % pages for step in range(run[1])} for run in (free, untouched)]
        self.world = kind(
            self.ledger, pages=pages, contract=contract, sets=sets, free=some[0], untouched=some[1]
        )
        self.world.arm()

    def _some(self, data: Any) -> list[int]:
        first, count = data.draw(SOME, "neighbours")
        return [(first + step) % self.world.pages for step in range(min(count, self.world.pages))]

    @rule(data=st.data())
    def step(self, data: Any) -> None:
        """Whatever may happen next; ``OFTEN`` says what happens more often."""
        steps = {
            **self._guest(data),
            **self._hints(data),
            **self._streams(data),
            **self._log(),
            **self._attempt(data),
        }
        possible = [name for name, (now, _) in steps.items() if now for _ in range(OFTEN.get(name, 1))]
        steps[data.draw(st.sampled_from(possible), "step")][1]()

    @property
    def _armed(self) -> bool:
        """An attempt goes on, and is not within a harvest."""
        return self.world.armed and not self.telling

    @property
    def _behind_barrier(self) -> bool:
        return self._armed and not self.world.ledger._picked

    # -- steps -------------------------------------------------------------------------------

    def _guest(self, data: Any) -> Steps:
        runs = not self.world.paused
        return {
            "guest writes": (runs, lambda: self.world.write(*self._some(data))),
            "guest writes zeros": (runs, lambda: self.world.write(*self._some(data), content=0)),
            "guest frees": (runs, lambda: self.world.free(*self._some(data))),
            "guest answers": (runs and bool(self.world.requests), lambda: self._answer(data)),
        }

    def _hints(self, data: Any) -> Steps:
        """A hint arrives late, again, in an attempt after its own, between both halves of a harvest."""
        ledger = self.world.ledger
        asks = self._armed and ledger.contract is not FreeContract.NONE
        return {
            "request hints": (asks and not self.world.requests, self.world.request),
            "a hint arrives": (bool(self.answers), lambda: self._deliver(data)),
            "distrust the hints": (asks and bool(self.answers), ledger.distrust_hints),
        }

    def _answer(self, data: Any) -> None:
        """Into the channel, where it stays; perhaps only a part of it."""
        epoch, free = self.world.answer()
        if data.draw(st.booleans(), "a part of it"):
            free = free & self.world.set(*self._some(data))
        self.answers.append((epoch, free))

    def _deliver(self, data: Any) -> None:
        self.world.hint(self.answers[-data.draw(st.integers(1, min(3, len(self.answers))), "last but")])

    def _streams(self, data: Any) -> Steps:
        world = self.world
        return {
            "pick": (self._armed, lambda: world.pick(*self._stream(data))),
            "pick free": (self._armed, lambda: world.pick_free(*self._stream(data))),
            "read or push": (bool(world.batches), lambda: self._go_on(data)),
            "send the rest": (self._armed, self._iterate),
            "barrier": (self._armed and not world.batches, world.barrier),
            "records arrive": (any(world.streams), lambda: world.arrive(*self._stream(data))),
        }

    def _stream(self, data: Any) -> tuple[int, int]:
        return data.draw(st.integers(0, 1), "stream"), data.draw(st.integers(1, 40), "pages")

    def _go_on(self, data: Any) -> None:
        """The next step of any batch."""
        batch = data.draw(st.sampled_from(self.world.batches), "batch")
        if batch.read:
            self.world.push(batch)
        else:
            self.world.read(batch)

    def _iterate(self) -> None:
        for batch in list(self.world.batches):
            self.world.push(batch if batch.read else self.world.read(batch))
        self.world.iterate()

    def _log(self) -> Steps:
        blind = not self.world.sees_writes and self.world.ledger._harvested
        marks = self._behind_barrier and self.looked is not None and not blind
        return {
            "look for dirty pages": (self._behind_barrier, self._look),
            "harvest what was found": (self.telling, self._tell),
            "harvest": (self._behind_barrier, self.world.harvest),
            "look for holes": (self._behind_barrier and not self.world.paused, self._look_for_holes),
            "mark holes": (marks, self._mark_holes),
        }

    def _look(self) -> None:
        self.world.look()
        self.telling = True

    def _tell(self) -> None:
        self.world.tell()
        self.telling = False

    def _look_for_holes(self) -> None:
        self.looked = set(range(self.world.pages)) - self.world.touched

    def _mark_holes(self) -> None:
        self.world.ledger.mark_holes(self.world.set(*self.looked or ()))
        self.looked = None

    def _attempt(self, data: Any) -> Steps:
        final = self.world.harvested
        return {
            "arm": (not self.world.armed, self.world.arm),
            "cancel": (self.world.armed, self._end),
            "pause": (self._armed and not self.world.paused, self.world.pause),
            "settle": (self._behind_barrier and final, lambda: self._settle(data)),
            "finish": (self._armed and final, lambda: self._finish(data)),
        }

    def _end(self) -> None:
        self.world.cancel()
        self.looked = None
        self.telling = False

    def _settle(self, data: Any) -> None:
        free = self.world.set(*set(range(self.world.pages)) - self.world.allocated)
        self.world.ledger.settle(free, trim=data.draw(st.booleans(), "trim"))

    def _finish(self, data: Any) -> None:
        bitmap = not self.world.sees_writes or data.draw(st.booleans(), "the guest gives its bitmap")
        self._arrive_at_the_end(bitmap=bitmap, trim=data.draw(st.booleans(), "trim"))

    def _arrive_at_the_end(self, *, bitmap: bool, trim: bool) -> None:
        """The rest of a migration, and what the guest finds at the destination."""
        self._iterate()
        lost = self.world.finish(bitmap=bitmap, trim=trim)
        if lost:
            raise PageForgotten(f"pages {sorted(lost)} are lost")
        if stale := self.world.stale():
            raise PageForgotten(f"pages {sorted(stale)} are skipped and hold old content")
        self._end()

    def teardown(self) -> None:
        """However far it came, the migration can be brought to its end, and is right."""
        if not hasattr(self, "world") or not self.world.armed:
            return
        if self.telling:
            self._tell()
        self._arrive_at_the_end(bitmap=not self.world.sees_writes, trim=False)

    # -- after every step ----------------------------------------------------------------------------

    @invariant()
    def every_page_is_right_or_remembered(self) -> None:
        if not self.world.armed:
            return
        self.world.ledger.check()
        if wrong := self.world.forgotten():
            raise PageForgotten(f"nobody remembers pages {sorted(wrong)}")

    @invariant()
    def pages_do_not_depend_on_each_other(self) -> None:
        ledger = self.world.ledger
        if isinstance(ledger, ProjectedLedger):
            assert not ledger.disagreement()
