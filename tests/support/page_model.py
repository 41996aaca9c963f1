"""One page as the model check sees it: in guest, dirty log, reader, streams and at the destination.

What a page holds is ZERO, CURRENT (what the guest's page holds now) or OLD (anything else). A write makes
every CURRENT copy OLD, so the number of writes is unbounded.

The destination never reads before END. So it is not stepped: a page keeps, for each stream, the last record
since the barrier, and the set of values it may hold from before. Streams race, so a page with records in two
of them may end up with either. Streams are interchangeable, hence sorted.

A method of ``PageModel`` that takes a page and gives one is a rule of the world; a mutant breaks one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.int_pages import IntPages

ZERO, OLD, CURRENT = 1, 2, 4
"""Values of a page; also bits of a set of values."""
NOTHING, PICKED, FREEING = 0, 8, 16
"""States of a reader besides the value it has read."""

IDLE, RUNNING, PAUSED, HARVESTED, ENDED = range(5)
"""Phases of a session."""


class Page(NamedTuple):
    """All that matters of one page, the ledger's view of it aside."""

    allocated: bool
    content: int
    touched: bool = True
    intact: bool = True
    """The guest finds in its own memory what it wrote there."""
    logged: bool = False
    """The dirty log has it."""
    found: bool = False
    """A harvest has found it, and has not told the ledger yet."""
    hole: bool = False
    """A look for holes found it untouched, and has not told the ledger yet."""
    hints: int = 0
    """Bit e: a hint of epoch e is in the channel. There it stays: to arrive now, later, twice, or never."""
    listed: bool = False
    """On the list of a guest that takes its list before it is asked (W23)."""
    reader: int = NOTHING
    streams: tuple[int, int] = (0, 0)
    """Of either stream: the last record since the barrier, or 0."""
    before: int = ZERO
    """Set of values at the destination up to the barrier."""
    digest: int = 0
    """What a log that compares takes for the bytes last sent (tests.support.compare_model)."""


class Standing(NamedTuple):
    """What the session and its ledger say of one page."""

    phase: int
    trusted: bool
    """False while a guest that lies was not caught: no state counts yet (R7)."""
    ledger: Ledger[IntPages]
    """As if it had this page only; to look at, never to call."""


class PageModel:
    """What may happen to one page, and what must never be true of it."""

    contract = FreeContract.ANYTHING
    liar = False
    """The guest hints what it likes."""
    contents: tuple[tuple[str, int], ...] = (("", CURRENT),)
    """What the guest may write besides zeros, and how a step names it."""
    names: tuple[tuple[int, str], ...] = ((ZERO, "zeros"), (OLD, "an old copy"), (CURRENT, "a copy"))
    """What a record may carry."""

    # -- rules that a mutant of the world breaks --------------------------------------------------------

    def log(self, page: Page) -> Page:
        """The dirty log takes note of a write."""
        return page._replace(logged=True)

    def after_hint(self, page: Page, applied: bool) -> Page:
        """The ledger was told of a hint; ``applied``: the page is skipped now, and was not before."""
        return page

    def after_record(self, page: Page) -> Page:
        """A record of the page was put into a stream."""
        return page

    def fresh(self) -> int:
        """What the destination's memory may hold before the first byte."""
        return ZERO

    def listed(self, page: Page) -> bool:
        """Whether a guest that takes its list at arming has the page on it."""
        return False

    def hinted(self, page: Page) -> bool:
        """Whether the guest names the page in an answer that it gives now."""
        return self.liar or not page.allocated

    def drained(self, page: Page) -> int:
        """Set of values at the destination when every stream is empty."""
        return page.streams[0] | page.streams[1] or page.before

    def arrived(self, page: Page) -> int:
        """Set of values that the guest may find at the destination."""
        return self.drained(page)

    # -- rules that depend on the kind of log -----------------------------------------------------------

    def look(self, page: Page, standing: Standing) -> Page:
        """The first half of a harvest: found and cleared in one step (R3)."""
        return page._replace(found=page.logged, logged=False)

    def told(self, page: Page) -> Page:
        """The second half is over."""
        return page._replace(found=False)

    def at_arming(self, page: Page) -> int:
        """The digest of a page before anything was sent."""
        return 0

    def at_record(self, page: Page, copy: int) -> int:
        """The digest after ``copy``, which was read of the page, was sent."""
        return page.digest

    def remembered(self, page: Page, standing: Standing) -> bool:
        """Whether somebody will still send the page, whatever the destination holds."""
        return page.logged or page.found or bool(standing.ledger.to_send)

    # -- the page's part in what happens to all -----------------------------------------------------------

    def initial_pages(self, touched: bool) -> Iterator[Page]:
        """Every page that a guest may begin with."""
        for allocated in (False, True):
            empty = not touched or (not allocated and self.contract is FreeContract.ZERO)
            yield Page(allocated, ZERO if empty else CURRENT, touched, before=self.fresh())

    def armed(self, page: Page) -> Page:
        return page._replace(logged=False, listed=self.listed(page), digest=self.at_arming(page))

    def voided(self, page: Page) -> Page:
        """The attempt was cancelled; hints are in their channel still."""
        return page._replace(
            logged=False, found=False, hole=False, reader=NOTHING, streams=(0, 0), before=self.fresh()
        )

    def behind_barrier(self, page: Page) -> Page:
        return page._replace(streams=(0, 0), before=self.drained(page))

    def answered(self, page: Page, epoch: int) -> Page:
        return page._replace(hints=page.hints | self.hinted(page) << epoch)

    # -- what may happen to it alone ------------------------------------------------------------------------

    def guest_moves(self, page: Page, p: int, logs: bool) -> Iterator[tuple[str, Page]]:
        """What the guest may do with page ``p``; ``logs``: a dirty log is armed."""
        if page.allocated:
            for name, value in self.contents:
                yield f"guest writes {name}{p}", self.written(page, value, logs)
            yield f"guest writes zeros to {p}", self.written(page, ZERO, logs)
            freed = page._replace(allocated=False)
            zeroes = self.contract is FreeContract.ZERO
            yield f"guest frees {p}", self.written(freed, ZERO, logs) if zeroes else freed
        else:
            taken = page._replace(allocated=True)
            for name, value in self.contents:
                yield f"guest allocates and writes {name}{p}", self.written(taken, value, logs)
            if self.contract is FreeContract.ZERO:
                yield f"guest allocates {p} and counts on zeros", taken

    def written(self, page: Page, value: int, logs: bool) -> Page:
        aged = self.aged(page)._replace(content=value, touched=True, intact=True)
        return self.log(aged) if logs else aged

    def aged(self, page: Page) -> Page:
        """What was the page's content is not any more."""
        low, high = sorted(OLD if value == CURRENT else value for value in page.streams)
        return page._replace(
            reader=OLD if page.reader == CURRENT else page.reader,
            streams=(low, high),
            before=page.before & ~CURRENT | OLD if page.before & CURRENT else page.before,
        )

    def recorded(self, page: Page, p: int, needed: bool) -> Iterator[tuple[str, Page]]:
        """What was read of the page goes to the end of either stream, if a record is ``needed``."""
        value = ZERO if page.reader == FREEING else page.reader
        after = self.after_record(page._replace(reader=NOTHING, digest=self.at_record(page, value)))
        if not needed:
            yield f"no record for zero page {p}", after
            return
        name = dict(self.names)[value]
        last = page.streams
        for stream in (0, 1) if last[0] != last[1] else (0,):
            other = last[1 - stream]
            which = "another stream than the last" if other else "a stream"
            pair = (min(value, other), max(value, other))
            yield f"record: {name} of {p} on {which}", after._replace(streams=pair)

    # -- the invariant --------------------------------------------------------------------------------------

    def wrong_page(self, page: Page, p: int, standing: Standing) -> str | None:
        """Why this must never be of page ``p``, or None: the invariant of docs/safety.md, R6, R11 and R17."""
        if not page.intact:
            return f"R6: page {p} of the guest is damaged at the source"
        if standing.phase == IDLE or not standing.trusted:
            return None
        ledger = standing.ledger
        states = (ledger.to_send, ledger.in_flight, ledger.sent, ledger.zero, ledger.skipped, ledger.hole)
        if sum(map(bool, states)) != 1:
            return f"R17: page {p} is in no state, or in two"
        possible, right = self.drained(page), page.content
        if ledger.skipped and not ledger.free_pending and possible != ZERO:
            return f"R11: page {p} is skipped and may not read as zero"
        if not (page.allocated or self.contract is FreeContract.ZERO):
            return None
        if standing.phase == ENDED:
            return None if self.arrived(page) == right else f"page {p} is lost"
        if self.remembered(page, standing) or page.reader == PICKED:
            return None
        if page.reader == FREEING:
            kept = right == ZERO or ledger._doubted
            return None if kept else f"page {p} is to become zero and nobody remembers its content"
        if page.reader != NOTHING:
            return None if page.reader == right else f"page {p} was read too early and nobody remembers"
        owed = ledger.skipped and ledger.free_pending and right == ZERO
        return None if possible == right or owed else f"page {p} is forgotten"
