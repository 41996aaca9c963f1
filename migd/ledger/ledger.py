"""The ledger: which pages still have to go, and why. Everything that decides about a page goes through it.

Pure accounting: no I/O, no clock, no threads. Rules carry the numbers of docs/safety.md. Every page is in
exactly one of six states (R17)::

                      hint                     pick               sent
     +------------- to_send -----------------> in_flight -------------------> sent
     |   harvest       ^  ^  harvest            |   |  zeroed                  |
     v                 |  +---------------------|---+-----> zero               | hint: free_pending,
    skipped <----------|------------------------+   freed                      | pick_free, freed
     ^                 +---- harvest ------------------------------------------+
     +---------------------------------------------------------------------------
    hole: never touched at arming; leaves only by harvest

Two overlays are not states. ``exposed``: a record with content was built for the page in this attempt, so
the destination may hold stale bytes of it. ``free_pending``: the page was hinted free but the destination's
copy still has to be zeroed by a FREE record (R11); END waits for it.

One record per page and iteration: a hint for a page already picked in this iteration is remembered in
``free_pending`` and its FREE is picked in the next one, behind the barrier, so that no stream can overtake
another (R9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from migd.errors import LedgerError
from migd.ledger.pages import PageSet, PageSetFactory
from migd.ram.contract import FreeContract

P = TypeVar("P", bound=PageSet)


@dataclass(frozen=True)
class Balance:
    """The six states at one moment, in pages; ``total`` equals their sum (R17)."""

    total: int
    to_send: int
    in_flight: int
    sent: int
    zero: int
    skipped_free: int
    hole: int
    free_pending: int
    """Not a term of the identity: pages among the others that still owe a FREE record."""


@dataclass
class Tally:
    """Cumulative counts of one attempt, in pages. They only grow; the identity does not use them."""

    sent: int = 0
    resent: int = 0
    zero: int = 0
    free_records: int = 0
    hints_applied: int = 0
    hints_late: int = 0
    """Refused because the page was harvested dirty since the epoch was issued (R4)."""
    hints_stale: int = 0
    """Refused because the epoch is not the open one, or none is (R4, R5)."""
    rescued: int = 0
    """Skipped, but not free in the guest's bitmap at pause (R14). 0 for every right guest."""
    reclaimed: int = 0
    """The same under a log that compares content: normal there, the page was taken into use (R19)."""
    trimmed: int = 0
    """Still to send at pause, but free in that bitmap."""
    dirtied: int = 0


class Ledger(Generic[P]):
    """Page accounting of one guest's RAM, over all its attempts; epochs never repeat (R5)."""

    def __init__(self, pages: int, sets: PageSetFactory[P], *, first_epoch: int = 1) -> None:
        self.pages = pages
        self._sets = sets
        self._next_epoch = first_epoch
        self._begin()
        self.armed = False

    def _begin(self) -> None:
        self.to_send = self._sets.full(self.pages)
        self.in_flight = self._sets(self.pages)
        self.sent = self._sets(self.pages)
        self.zero = self._sets(self.pages)
        self.skipped = self._sets(self.pages)
        self.hole = self._sets(self.pages)
        self.exposed = self._sets(self.pages)
        self.free_pending = self._sets(self.pages)
        self._picked = self._sets(self.pages)
        self._freeing = self._sets(self.pages)
        self._doubted = self._sets(self.pages)  # their FREE was in flight when the hints lost their credit
        self._dirty_since_arming = self._sets(self.pages)
        self._dirty_since_issue = self._sets(self.pages)
        self._cursor = 0  # below it no page can be picked before the barrier
        self._free_cursor = 0  # the same for FREE records
        self.open_epoch: int | None = None
        self.contract = FreeContract.NONE
        self._sees_writes = True
        self._harvested = False
        self._settled = False
        self.tally = Tally()

    # -- an attempt begins and ends -----------------------------------------------------------------

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        """Begin an attempt, after the dirty log was armed (R1): all pages to send (R2), old epochs void.

        A log that does not see writes, but content that is not what was last sent, says nothing of skipped
        pages: then there is no END with any before ``settle`` (R19).
        """
        self._begin()
        self.contract = contract
        self._sees_writes = sees_writes
        self.armed = True

    def cancel(self) -> None:
        """End an attempt, however it ended: nothing sent or skipped counts in the next one (R15)."""
        self._begin()
        self.armed = False

    def mark_holes(self, holes: P) -> None:
        """These pages were found never to have been written: not sent. Looked for after arming (R20)."""
        self._require(self.armed, "holes are looked for after arming (R20)")
        self._require(not self._picked, "holes come before the first pick")
        # It names no page that was not sent yet, so what it finds does not tell whether the look is too old.
        self._require(self._sees_writes or not self._harvested, "a comparing log: holes come before it (R19)")
        # A page may have been written, and harvested, since it was looked at.
        still = (holes & self.to_send) - self._dirty_since_arming
        self.to_send -= still
        self.hole |= still

    # -- hints --------------------------------------------------------------------------------------

    def issue(self) -> int:
        """A new hint epoch; the request carrying it must be sent after this returns (R5)."""
        self._require(self.armed, "hints are requested after arming (R1)")
        self._require(self.contract is not FreeContract.NONE, "the guest declared no contract (R12)")
        self.open_epoch = self._next_epoch
        self._next_epoch += 1
        self._dirty_since_issue = self._sets(self.pages)
        return self.open_epoch

    def hint(self, epoch: int, free: P) -> int:
        """Apply a hint: ``free`` were free when the guest answered ``epoch``. Returns pages newly skipped.

        Refuses what is stale or late (R4, R5), clears migration bits and nothing else (R6).
        """
        if epoch != self.open_epoch:
            self.tally.hints_stale += free.count()
            return 0
        late = free & self._dirty_since_issue
        self.tally.hints_late += late.count()
        applied = self._apply_free(free - late)
        self.tally.hints_applied += applied
        return applied

    def _apply_free(self, free: P) -> int:
        skip = free & self.to_send
        self.to_send -= skip
        self.skipped |= skip
        # Behind content that was built or sent, a FREE record is owed (R11, W22).
        owed = (skip & self.exposed) | (free & self.sent) | ((free & self.in_flight) - self._freeing)
        if owed:
            self.free_pending |= owed
            self._free_cursor = 0
        return skip.count()

    def close_epoch(self) -> None:
        """The hint window is over: whatever still arrives is stale."""
        self.open_epoch = None

    def distrust_hints(self) -> None:
        """The guest broke the hint protocol: everything skipped goes after all (R7), nothing more is."""
        self.close_epoch()
        self.contract = FreeContract.NONE
        self.to_send |= self.skipped
        self.skipped = self._sets(self.pages)
        self._cursor = 0
        self.free_pending = self._sets(self.pages)
        # A FREE on its way cannot be called back: its page goes again behind it.
        self._doubted = self._freeing.copy()

    # -- iterations ---------------------------------------------------------------------------------

    def harvest(self, dirty: P) -> int:
        """Pages the dirty log returned, cleared and re-protected (R3); only between iterations (R9)."""
        self._require(not self._picked, "harvest only behind the barrier (R9)")
        self.sent -= dirty
        self.zero -= dirty
        self.skipped -= dirty
        self.hole -= dirty
        self.free_pending -= dirty
        self.to_send |= dirty
        self._cursor = 0
        self._dirty_since_arming |= dirty
        self._dirty_since_issue |= dirty
        self._harvested = True
        count = dirty.count()
        self.tally.dirtied += count
        return count

    def pick(self, limit: int) -> P:
        """Up to ``limit`` pages, lowest first, for one stream to read now: mark cleared, then read (R8)."""
        picked = self._choose(self.to_send, limit, self._cursor)
        self._cursor = picked.stop() or self.pages
        self.to_send -= picked
        return picked

    def pick_free(self, limit: int) -> P:
        """Up to ``limit`` pages that owe a FREE record and were not picked in this iteration (R9, R11)."""
        picked = self._choose(self.free_pending, limit, self._free_cursor)
        self._free_cursor = picked.stop() or self.pages
        self.free_pending -= picked
        self.sent -= picked
        self.skipped -= picked
        self._freeing |= picked
        return picked

    def _choose(self, pages: P, limit: int, start: int) -> P:
        """Put up to ``limit`` of ``pages`` from ``start`` on, none picked in this iteration, in flight."""
        picked = pages.lowest(limit, start)
        while not picked.isdisjoint(self._picked):
            start = picked.stop()
            picked = picked - self._picked
            if not picked:
                picked = pages.lowest(limit, start)
        self.in_flight |= picked
        self._picked |= picked
        return picked

    def zero_records(self, zero: P) -> P:
        """Which of these picked zero pages need a ZERO record: those the destination may hold (R10)."""
        return zero & self.exposed

    def sent_pages(self, data: P) -> None:
        """Records with content for these picked pages are in their stream, in order."""
        self._require(data.isdisjoint(self._freeing), "a page picked for a FREE record gets no other")
        self._leave_flight(data)
        self.tally.resent += (data & self.exposed).count()
        self.tally.sent += data.count()
        self.exposed |= data
        self.sent |= data

    def zeroed(self, zero: P) -> None:
        """These picked pages were zero; the ZERO records that R10 asks for are in their stream, in order."""
        self._require(zero.isdisjoint(self._freeing), "a page picked for a FREE record gets no other")
        self._leave_flight(zero)
        self.tally.zero += zero.count()
        self.zero |= zero
        # The destination reads zero already, which is all a FREE record would do.
        self.free_pending -= zero

    def freed(self, free: P) -> None:
        """FREE records for these picked pages are in their stream, in order."""
        self._require(not (free - self._freeing), "only a page picked for a FREE record can be freed")
        self._leave_flight(free)
        self._freeing -= free
        self.tally.free_records += free.count()
        again = free & self._doubted
        self._doubted -= again
        self.to_send |= again
        self.skipped |= free - again
        self.exposed -= free

    def _leave_flight(self, pages: P) -> None:
        self._require((pages & self.in_flight).count() == pages.count(), "only a picked page can be sent")
        self.in_flight -= pages

    def barrier(self) -> None:
        """Every stream has a barrier behind what this iteration picked; the next may use any stream (R9)."""
        self._require(not self.in_flight, "a barrier needs every picked page in its stream (R9)")
        self._picked = self._sets(self.pages)
        self._cursor = self._free_cursor = 0
        self.check()

    # -- the end ------------------------------------------------------------------------------------

    def settle(self, free_at_pause: P, *, trim: bool) -> int:
        """The paused guest's own free bitmap, after the final harvest (R14). Returns rescued pages.

        What was skipped but is not free goes after all. With ``trim`` pages that are free and still to
        send are skipped: nothing can reuse them, the guest is paused. Later hints are stale.
        """
        self._require(not self._picked, "the pause bitmap comes behind the barrier")
        self.close_epoch()
        self._settled = True
        rescue = self.skipped - free_at_pause
        self.skipped -= rescue
        self.to_send |= rescue
        self._cursor = 0
        # Hinted, then taken back without a write: the destination's copy is still right.
        kept = self.free_pending - free_at_pause
        self.free_pending -= kept
        rescued = rescue.count() + (kept - rescue).count()
        if self._sees_writes:
            self.tally.rescued += rescued
        else:
            self.tally.reclaimed += rescue.count()
        if trim and self.contract is not FreeContract.NONE:
            self.tally.trimmed += self._apply_free(free_at_pause & self.to_send)
        return rescued

    def finish(self) -> None:
        """END may be sent: LedgerError while anything is to send, in flight or owes a FREE record."""
        self._require(not self.to_send, "END with pages to send")
        self._require(not self.in_flight, "END with pages in flight")
        self._require(not self.free_pending, "END with FREE records pending (R11)")
        known = self._sees_writes or self._settled or not self.skipped
        self._require(known, "END with skipped pages that nobody vouches for (R19)")
        self.check()

    # -- the identity -------------------------------------------------------------------------------

    def balance(self) -> Balance:
        """Counts of the six states."""
        return Balance(
            total=self.pages,
            to_send=self.to_send.count(),
            in_flight=self.in_flight.count(),
            sent=self.sent.count(),
            zero=self.zero.count(),
            skipped_free=self.skipped.count(),
            hole=self.hole.count(),
            free_pending=self.free_pending.count(),
        )

    def check(self) -> Balance:
        """R17: the states are disjoint and cover every page. LedgerError with the figures otherwise."""
        b = self.balance()
        union = self.to_send | self.in_flight | self.sent | self.zero | self.skipped | self.hole
        parts = b.to_send + b.in_flight + b.sent + b.zero + b.skipped_free + b.hole
        if parts != self.pages or union.count() != self.pages:
            raise LedgerError(f"a page is in no state, or in two: {b}")
        return b

    @staticmethod
    def _require(condition: bool, rule: str) -> None:
        if not condition:
            raise LedgerError(rule)
