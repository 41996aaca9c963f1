"""A model of one migration around the *real* ledger, for tests/support/search.py to walk through.

Everything that may happen next is an action; the search takes all of them in all orders. The world around
the ledger is as hostile as docs/safety.md allows: hints arrive late, repeatedly or never, the guest answers
any request at any time, writes while a page is read, an attempt is cancelled at any moment and repeated.
Both halves of a harvest, the look and what the ledger makes of it, are steps of their own if a search asks
for it (``awaits``): the session does nothing in between, while guest and hints go on.

A state is a session and its pages (tests/support/page_model.py), which move together: a step of one page
happens if the session, that is to say the ledger, takes part. What either makes of a step is worked out once
for each of them and remembered, since there are few sessions and few pages, and many states. So a state is a
number: an index of a session, and for each page an index of it.

What is left out, and why nothing is lost by it:

- One page at a time is picked, hinted and reported, where production has hundreds in one call. A call of the
  ledger for several pages is the calls for each of them (tests/ledger/test_ledger_projection.py): for two
  pages in every ledger that the search meets, for up to 64 in random histories. For the same reason what is
  right for one page is right for any number: looked at through one page, their histories are its own.
- Production reports a page as sent when its whole shipment is in the stream, and asks which zero pages need
  a record when it picks them. Meanwhile only hints can come, and find a page in flight either way.
- Production sends its FREE records before any other of an iteration, and looks for holes once. The model may
  at any time: it has these orders, and more.

What is not covered: the bytes of a page and of a frame, several blocks of RAM, pages beyond the bounds of a
search, more epochs and attempts than it allows, and whether anything ever ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.int_pages import IntPages
from tests.support.ledger_values import Frozen, LedgerValues
from tests.support.page_model import (
    ENDED,
    FREEING,
    HARVESTED,
    IDLE,
    NOTHING,
    PAUSED,
    PICKED,
    RUNNING,
    ZERO,
    Page,
    PageModel,
    Standing,
)

PAGE_BITS = 20
"""Of a state, for the index of each page."""
_PAGE = (1 << PAGE_BITS) - 1

Label: TypeAlias = tuple[Any, ...]
"""Of a step that a session and one page take together: its kind, the page's number, and what else."""
GUEST, HINT, PICK, READ, RECORD = "guest", "hint", "pick", "read", "record"


class Session(NamedTuple):
    """All that is not of one page."""

    phase: int
    cancels: int
    """How many are left."""
    ledger: Frozen
    unread: int = 0
    """Bit e: the request of epoch e lies in the guest's socket."""
    looked: bool = False
    """Holes were looked for and not marked yet."""
    found: bool = False
    """Dirty pages were looked for and not harvested yet."""
    distrusted: bool = False


class Joint(NamedTuple):
    """A step that all pages take together with the session."""

    name: str
    page: Callable[[Page, Standing], Page]
    named: Callable[[Page, Standing], bool]
    """Whether the session is told of the page."""
    session: Callable[[Session, int], Session | None]
    """What it makes of it; None: it refuses."""


class _Site:
    """What was worked out of one session, in differences of a state's number."""

    __slots__ = ("alone", "answers", "aspects", "joints", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.answers: dict[Label, tuple[int, int] | None] = {}
        """Its part in a step with one page, and the outcome; None if it refuses."""
        self.alone: list[tuple[str, int]] = []
        self.joints: list[_JointHere] | None = None
        self.aspects: list[int] = []
        """Index of each page's Standing."""


class _JointHere(NamedTuple):
    """A step of all pages as this session takes it."""

    joint: Joint
    pages: dict[int, tuple[int, bool]]
    """By index of a Standing and of a page: the page after the step, and whether the session is told."""
    sessions: list[int | None]
    """By the set of pages it is told of: what becomes of the session; None if it refuses."""


class Model(LedgerValues, PageModel):
    """The world; a test-only subclass breaks one thing in it."""

    def __init__(
        self,
        ledger: type[Ledger[IntPages]],
        *,
        pages: int,
        epochs: int,
        cancels: int = 0,
        contract: FreeContract = FreeContract.ANYTHING,
        liar: bool = False,
        holes: bool = False,
        awaits: bool = False,
    ) -> None:
        super().__init__(ledger, pages)
        self.epochs, self.cancels, self.contract = epochs, cancels, contract
        self.liar, self.holes, self.awaits = liar, holes, awaits
        self._above = PAGE_BITS * pages
        self._sites: list[_Site] = []
        self._site_of: dict[Session, int] = {}
        self._pages: list[Page] = []
        self._page_of: dict[Page, int] = {}
        self._offers: list[list[tuple[Any, ...] | None]] = [[] for _ in range(pages)]
        self._aspects: list[Standing] = []
        self._aspect_of: dict[tuple[Any, ...], int] = {}
        self._joint_pages: defaultdict[str, dict[int, tuple[int, bool]]] = defaultdict(dict)
        self._verdicts: list[dict[int, str | None]] = [{} for _ in range(pages)]

    def _with(self, session: Session, method: str, *arguments: Any, **changes: Any) -> Session | None:
        """The session after a call of its ledger; None if the ledger refuses."""
        outcome = self.call(session.ledger, method, *arguments)
        return None if outcome is None else session._replace(ledger=outcome[0], **changes)

    # -- what a mutant replaces -----------------------------------------------------------------------

    def guest_runs(self, phase: int) -> bool:
        return phase < PAUSED

    def harvested(self, session: Session, dirty: int) -> Session | None:
        """The second half of a harvest: the ledger is told."""
        phase = HARVESTED if session.phase == PAUSED else session.phase
        return self._with(session, "harvest", dirty, found=False, phase=phase)

    def settled(self, session: Session, free: int) -> Session | None:
        """The guest's bitmap at the pause."""
        return self._with(session, "settle", free)

    # -- steps of the session alone -----------------------------------------------------------------------

    def _alone(self, session: Session) -> Iterator[tuple[str, Session | None]]:
        phase, busy = session.phase, session.found
        if phase == RUNNING and not busy:
            yield "pause", session._replace(phase=PAUSED)
        if phase == HARVESTED and not busy:
            yield "END", self._with(session, "finish", phase=ENDED)
        asked = session.ledger[self._epoch_at] > self.epochs
        if not asked and not session.distrusted and phase != ENDED and not busy:
            outcome = self.call(session.ledger, "issue")
            if outcome is not None:
                ledger, epoch = outcome
                asking = session._replace(unread=session.unread | 1 << epoch, ledger=ledger)
                yield f"request epoch {epoch}", asking
        if self.liar and phase not in (IDLE, ENDED) and not session.distrusted and not busy:
            yield "distrust the hints", self._with(session, "distrust_hints", distrusted=True)

    # -- steps of a session and one page ------------------------------------------------------------------

    def _offer(self, page: Page, p: int) -> Iterator[tuple[Label, tuple[list[tuple[str, Page]], ...]]]:
        """Steps that page ``p`` is ready for, and what becomes of it by the outcome on the session's side."""
        yield (GUEST,), tuple(list(self.guest_moves(page, p, logs)) for logs in (False, True))
        for epoch in range(1, self.epochs + 1):
            if page.hints >> epoch & 1:
                name = f"hint {p} of epoch {epoch} arrives"
                yield (HINT, p, epoch), tuple([(name, self.after_hint(page, hit))] for hit in (False, True))
        if page.reader == NOTHING:
            for method, reader in (("pick", PICKED), ("pick_free", FREEING)):
                yield (PICK, p, method), ([(f"{method} {p}", page._replace(reader=reader))],)
        elif page.reader == PICKED:
            yield (READ,), ([(f"read {p}", page._replace(reader=page.content))],)
        else:
            records = tuple(list(self.recorded(page, p, needed)) for needed in (False, True))
            yield (RECORD, p, page.reader), records

    def _answer(self, session: Session, label: Label) -> tuple[Session, int] | None:
        """The session's part in such a step and its outcome; None if it has no part in it."""
        kind, phase = label[0], session.phase
        if kind == GUEST:
            return (session, phase != IDLE) if self.guest_runs(phase) else None
        if phase == ENDED:
            return None
        if kind == HINT:
            return self._result(session, self.call(session.ledger, "hint", label[2], 1 << label[1]))
        if phase == IDLE or session.found:
            return None
        if kind == PICK:
            outcome = self.call(session.ledger, label[2], 1)
            picked = outcome is not None and outcome[1] == 1 << label[1]
            return (session._replace(ledger=outcome[0]), 0) if outcome is not None and picked else None
        if kind == READ:
            return session, 0
        return self._report(session, 1 << label[1], label[2])

    def _report(self, session: Session, page: int, reader: int) -> tuple[Session, int] | None:
        """What a reader holds goes into a stream; the outcome says whether it needs a record."""
        if reader == ZERO:
            asked = self.call(session.ledger, "zero_records", page)
            needed = asked is not None and bool(asked[1])
            after = self._with(session, "zeroed", page)
            return None if after is None else (after, needed)
        after = self._with(session, "freed" if reader == FREEING else "sent_pages", page)
        return None if after is None else (after, True)

    @staticmethod
    def _result(session: Session, outcome: tuple[Frozen, Any] | None) -> tuple[Session, int] | None:
        return None if outcome is None else (session._replace(ledger=outcome[0]), outcome[1])

    # -- steps of a session and all pages -------------------------------------------------------------------

    def _together(self, session: Session) -> Iterator[str]:
        """The names of those that it may take; see ``_joints``."""
        phase = session.phase
        if self.guest_runs(phase):
            for epoch in range(1, self.epochs + 1):
                if session.unread >> epoch & 1:
                    yield f"guest answers epoch {epoch}"
        if phase == IDLE:
            yield "arm"
            return
        if session.cancels:
            yield "cancel"
        if phase == ENDED:
            return
        if session.found:
            yield "harvest what was found"
            return
        if phase == RUNNING and self.holes:
            yield "look for holes"
        if session.looked:
            yield "mark holes"
        if not self.awaits:
            yield "harvest"
        elif not self.thaw(session.ledger)._picked:
            yield "look for dirty pages"
        yield "barrier"
        if phase == HARVESTED:
            yield "settle"

    @cached_property
    def _joints(self) -> dict[str, Joint]:
        """Every step that all pages take together."""
        steps = [
            Joint("arm", lambda page, _: self.armed(page), _nobody, self._arm),
            Joint("cancel", lambda page, _: self.voided(page), _nobody, self._cancel),
            Joint("barrier", lambda page, _: self.behind_barrier(page), _nobody, self._barrier),
            Joint("settle", _same, lambda page, _: not page.allocated, self.settled),
            Joint("look for holes", _looked_for_holes, _nobody, lambda s, _: s._replace(looked=True)),
            Joint("mark holes", _marked, lambda page, _: page.hole, self._mark_holes),
            Joint("look for dirty pages", self.look, _nobody, lambda s, _: s._replace(found=True)),
            Joint("harvest what was found", self._tell, lambda page, _: page.found, self.harvested),
            Joint("harvest", self._look_and_tell, self._looked, self.harvested),
        ]
        for epoch in range(1, self.epochs + 1):
            name = f"guest answers epoch {epoch}"
            steps.append(Joint(name, self._answered_by(epoch), _nobody, self._reads(epoch)))
        return {step.name: step for step in steps}

    def _tell(self, page: Page, _: Standing) -> Page:
        return self.told(page)

    def _look_and_tell(self, page: Page, standing: Standing) -> Page:
        return self.told(self.look(page, standing))

    def _looked(self, page: Page, standing: Standing) -> bool:
        return self.look(page, standing).found

    def _answered_by(self, epoch: int) -> Callable[[Page, Standing], Page]:
        return lambda page, _: self.answered(page, epoch)

    def _reads(self, epoch: int) -> Callable[[Session, int], Session]:
        return lambda session, _: session._replace(unread=session.unread & ~(1 << epoch))

    def _arm(self, session: Session, _: int) -> Session | None:
        return self._with(session, "arm", self.contract, phase=RUNNING)

    def _cancel(self, session: Session, _: int) -> Session | None:
        void = {"phase": IDLE, "looked": False, "found": False, "distrusted": False}
        return self._with(session, "cancel", cancels=session.cancels - 1, **void)

    def _barrier(self, session: Session, _: int) -> Session | None:
        return self._with(session, "barrier")

    def _mark_holes(self, session: Session, holes: int) -> Session | None:
        return self._with(session, "mark_holes", holes, looked=False)

    # -- states as numbers ----------------------------------------------------------------------------------

    def initial(self) -> Iterator[int]:
        idle = Session(IDLE, self.cancels, self.freeze(self.ledger_class(self.pages, IntPages)))
        for pages in product(*[list(self.initial_pages(not self.holes))] * self.pages):
            yield self._number(idle, pages)

    def _number(self, session: Session, pages: tuple[Page, ...]) -> int:
        state = self._site(session)
        for page in reversed(pages):
            state = state << PAGE_BITS | self._index(page)
        return state

    def _index(self, page: Page) -> int:
        if page not in self._page_of:
            self._page_of[page] = len(self._pages)
            self._pages.append(page)
            for offers in self._offers:
                offers.append(None)
        return self._page_of[page]

    def _site(self, session: Session) -> int:
        if session not in self._site_of:
            self._site_of[session] = len(self._sites)
            site = _Site(session)
            self._sites.append(site)
            site.aspects = [self._aspect(session, p) for p in range(self.pages)]
        return self._site_of[session]

    def _aspect(self, session: Session, p: int) -> int:
        trusted = session.distrusted or not self.liar
        ledger = self.thaw(session.ledger, p)
        sets = tuple(bool(vars(ledger)[name]) for name in self._sets)
        key = (session.phase, trusted, ledger._settled, sets)
        if key not in self._aspect_of:
            self._aspect_of[key] = len(self._aspects)
            self._aspects.append(Standing(session.phase, trusted, ledger))
        return self._aspect_of[key]

    # -- the search ---------------------------------------------------------------------------------------

    def steps(self, state: int) -> list[tuple[str, int]]:
        """Every action that is possible, with the state after it."""
        at = state >> self._above
        site = self._sites[at]
        joints = site.joints if site.joints is not None else self._prepare(site, at)
        moves = [(name, state + change) for name, change in site.alone]
        answers, rest = site.answers, state
        for p, offers in enumerate(self._offers):
            offered = offers[rest & _PAGE]
            if offered is None:
                offered = self._prepare_page(rest & _PAGE, p)
            rest >>= PAGE_BITS
            for label, outcomes in offered:
                try:
                    answer = answers[label]
                except KeyError:
                    answer = self._prepare_answer(site, at, label)
                if answer is not None:
                    here = state + answer[0]
                    moves += [(name, here + change) for name, change in outcomes[answer[1]]]
        for joint, known, sessions in joints:
            pages, told, shift = 0, 0, 0
            for p, aspect in enumerate(site.aspects):
                key = aspect << PAGE_BITS | state >> shift & _PAGE
                try:
                    page = known[key]
                except KeyError:
                    page = known[key] = self._prepare_joint(joint, key)
                pages |= page[0] << shift
                told |= page[1] << p
                shift += PAGE_BITS
            session = sessions[told]
            if session is not None:
                moves.append((joint.name, session | pages))
        return moves

    def _prepare(self, site: _Site, at: int) -> list[_JointHere]:
        for name, after in self._alone(site.session):
            if after is not None:
                site.alone.append((name, self._site(after) - at << self._above))
        site.joints = [self._joint_here(self._joints[name], site) for name in self._together(site.session)]
        site.joints = [here for here in site.joints if here.sessions.count(None) < len(here.sessions)]
        return site.joints

    def _joint_here(self, joint: Joint, site: _Site) -> _JointHere:
        sessions: list[int | None] = []
        for told in range(1 << self.pages if joint.named is not _nobody else 1):
            after = joint.session(site.session, told)
            sessions.append(None if after is None else self._site(after) << self._above)
        return _JointHere(joint, self._joint_pages[joint.name], sessions)

    def _prepare_answer(self, site: _Site, at: int, label: Label) -> tuple[int, int] | None:
        answer = self._answer(site.session, label)
        change = None if answer is None else (self._site(answer[0]) - at << self._above, answer[1])
        site.answers[label] = change
        return change

    def _prepare_page(self, index: int, p: int) -> tuple[Any, ...]:
        """The page's offers, each with the differences that it makes to the number of a state."""
        offers = []
        for label, outcomes in self._offer(self._pages[index], p):
            changes = tuple(
                tuple((name, self._index(after) - index << PAGE_BITS * p) for name, after in outcome)
                for outcome in outcomes
            )
            offers.append((label, changes))
        self._offers[p][index] = tuple(offers)
        return tuple(offers)

    def _prepare_joint(self, joint: Joint, key: int) -> tuple[int, bool]:
        page, standing = self._pages[key & _PAGE], self._aspects[key >> PAGE_BITS]
        return self._index(joint.page(page, standing)), joint.named(page, standing)

    def ended(self, state: int) -> bool:
        return self._sites[state >> self._above].session.phase == ENDED

    def wrong(self, state: int) -> str | None:
        """Why a state must never be, or None: ``wrong_page`` of each of its pages."""
        for p, aspect in enumerate(self._sites[state >> self._above].aspects):
            key = aspect << PAGE_BITS | state & _PAGE
            state >>= PAGE_BITS
            verdicts = self._verdicts[p]
            if key not in verdicts:
                page = self._pages[key & _PAGE]
                verdicts[key] = self.wrong_page(page, p, self._aspects[aspect])
            if verdicts[key] is not None:
                return verdicts[key]
        return None


def _same(page: Page, _: Standing) -> Page:
    return page


def _nobody(page: Page, _: Standing) -> bool:
    return False


def _looked_for_holes(page: Page, _: Standing) -> Page:
    return page._replace(hole=not page.touched)


def _marked(page: Page, _: Standing) -> Page:
    return page._replace(hole=False)
