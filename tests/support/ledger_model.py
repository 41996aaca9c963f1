"""An explicit-state model of one migration around the *real* ledger, and a breadth-first search over it.

Everything that may happen next is an action; the search takes all of them in all orders. The world around
the ledger is as hostile as docs/safety.md allows: hints arrive late, repeatedly or never, the guest answers
any request at any time, writes while a page is read, an attempt is cancelled at any moment and repeated.

Three abstractions keep it finite, and lose nothing:

- What a page holds is ZERO, CURRENT (what the guest's page holds now) or OLD (anything else). A write makes
  every CURRENT copy OLD, so the number of writes is unbounded.
- The destination never reads before END. So it is not stepped: per page the model keeps, for each stream,
  the last record since the barrier, and the set of values the page may hold from before. Streams race, so
  a page with records in two of them may end up with either. Streams are interchangeable, hence sorted.
- A hint, once in the channel, stays there: it can be delivered now, later, twice, or never.

Both halves of a harvest, the look and what the ledger makes of it, are steps of their own if a search asks
for it (``awaits``): the session does nothing in between, while guest and hints go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from migd.errors import LedgerError
from migd.ledger.ledger import Ledger, Tally
from migd.ram.contract import FreeContract
from tests.support.int_pages import IntPages

ZERO, OLD, CURRENT = 1, 2, 4
"""Values of a page; also bits of a set of values."""
NOTHING, PICKED, FREEING = 0, 8, 16
"""States of a reader besides the value it has read."""

IDLE, RUNNING, PAUSED, HARVESTED, ENDED = range(5)


class State(NamedTuple):
    """Sets of pages are ints, bit p is page p."""

    phase: int
    kernel: int  # the dirty log
    allocated: int
    nonzero: int  # pages of the guest that hold something
    unread: int  # bit e: the request of epoch e lies in the guest's socket
    hints: int  # bit e * pages + p: hint (e, p) is in the channel
    old_list: int  # for the guest that answers from a list taken before the request (W23)
    scanned: int  # touched pages + 1 of a hole scan that waits to be applied, else 0
    touched: int
    readers: tuple[int, ...]  # of each page
    streams: tuple[tuple[int, int], ...]  # of each page: last record since the barrier in either stream
    before: tuple[int, ...]  # of each page: set of values at the destination up to the barrier
    cancels: int
    distrusted: bool
    ledger: tuple[Any, ...]
    found: int = 0  # pages + 1 that a harvest has found and not yet told the ledger of, else 0
    memory: tuple[int, ...] = ()  # what each page holds, where a log compares (tests.support.compare_model)
    digests: tuple[int, ...] = ()  # of each page, what that log takes for the bytes last sent


Step = tuple[str, State]
Outcome = tuple[tuple[Any, ...], Any]
"""A ledger after a call, and the result of the call."""


class Model:
    """The world; a test-only subclass breaks one thing in it."""

    contract = FreeContract.ANYTHING
    liar = False
    """The guest hints what it likes; a state counts only after the hints were distrusted (R7)."""
    sees_writes = True
    contents: tuple[tuple[str, int], ...] = (("", 1),)
    """What the guest may write besides zeros: in the name of the step, and for ``_write``."""
    names: tuple[tuple[int, str], ...] = ((ZERO, "zeros"), (OLD, "an old copy"), (CURRENT, "a copy"))
    """Of what a record may carry."""

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
        self.ledger_class, self.pages, self.epochs, self.cancels = ledger, pages, epochs, cancels
        self.contract, self.liar, self.holes, self.awaits = contract, liar, holes, awaits
        self.all = (1 << pages) - 1
        self._table = [IntPages(pages, bits) for bits in range(1 << pages)]
        first = ledger(pages, IntPages)
        self._sets = [name for name, value in vars(first).items() if isinstance(value, IntPages)]
        fixed = {"pages", "_sets", "tally"}
        self._scalars = [name for name in vars(first) if name not in {*self._sets, *fixed}]
        self._calls: dict[Any, Outcome | None] = {}
        self._views: dict[Any, Ledger[IntPages]] = {}
        self._fixed = {"pages": pages, "_sets": IntPages, "tally": Tally()}

    # -- the ledger as a value ------------------------------------------------------------------------

    def thaw(self, frozen: tuple[Any, ...]) -> Ledger[IntPages]:
        ledger = object.__new__(self.ledger_class)
        attributes, table, pages, every = vars(ledger), self._table, self.pages, self.all
        attributes.update(self._fixed)
        packed = frozen[0]
        for name in self._sets:
            attributes[name] = table[packed & every]
            packed >>= pages
        attributes.update(zip(self._scalars, frozen[1:], strict=True))
        return ledger

    def freeze(self, ledger: Ledger[IntPages]) -> tuple[Any, ...]:
        attributes, packed = vars(ledger), 0
        for name in reversed(self._sets):
            packed = packed << self.pages | attributes[name].bits
        return (packed, *[attributes[name] for name in self._scalars])

    def call(self, frozen: tuple[Any, ...], method: str, *arguments: Any, **options: Any) -> Outcome | None:
        """The ledger after a call and what the call returned; None if it refused.

        A ledger is a value here, so what a call does to it is computed once: few ledgers, many worlds.
        """
        key = (frozen, method, arguments)
        if key not in self._calls:
            ledger = self.thaw(frozen)
            try:
                result = getattr(ledger, method)(*arguments, **options)
            except LedgerError:
                self._calls[key] = None
            else:
                self._calls[key] = (self.freeze(ledger), result)
        return self._calls[key]

    def view(self, frozen: tuple[Any, ...]) -> Ledger[IntPages]:
        """The ledger to look at, never to call."""
        if frozen not in self._views:
            self._views[frozen] = self.thaw(frozen)
        return self._views[frozen]

    # -- what a mutant of the world replaces ------------------------------------------------------------

    def log(self, kernel: int, page: int) -> int:
        return kernel | page

    def after_hint(self, kernel: int, page: int) -> int:
        return kernel

    def after_record(self, kernel: int, page: int) -> int:
        return kernel

    def guest_runs(self, phase: int) -> bool:
        return phase < PAUSED

    def fresh(self) -> int:
        return ZERO

    def answer(self, state: State) -> int:
        return self.all if self.liar else self.all & ~state.allocated

    def drained(self, before: int, streams: tuple[int, int]) -> int:
        return streams[0] | streams[1] or before

    # -- what depends on the kind of log -----------------------------------------------------------------

    def content(self, state: State, p: int) -> int:
        """What page p holds, and so what the destination must hold in the end."""
        return CURRENT if state.nonzero >> p & 1 else ZERO

    def look(self, state: State) -> tuple[int, State]:
        """The first half of a harvest: what it finds, and the state after it (R3: in one step)."""
        return state.kernel, state._replace(kernel=0)

    def told(self, state: State) -> State:
        """The second half is over."""
        return state._replace(found=0)

    def record(self, state: State, p: int, value: int) -> State:
        """A record with this content of page p was put into a stream."""
        return state._replace(kernel=self.after_record(state.kernel, 1 << p))

    def remembered(self, state: State) -> int:
        """Pages that somebody will still send, whatever the destination holds."""
        return state.kernel | max(0, state.found - 1) | self.view(state.ledger).to_send.bits

    # -- the search --------------------------------------------------------------------------------------

    def initial(self) -> Iterator[State]:
        untouched = self.all if self.holes else 0
        for allocated in range(1 << self.pages):
            zero_when_free = self.contract is FreeContract.ZERO
            nonzero = (allocated if zero_when_free else self.all) & ~untouched
            yield State(
                IDLE, 0, allocated, nonzero, 0, 0, 0, 0, self.all & ~untouched,
                (NOTHING,) * self.pages, ((0, 0),) * self.pages, (self.fresh(),) * self.pages,
                self.cancels, False, self.freeze(self.ledger_class(self.pages, IntPages)),
            )  # fmt: skip

    def steps(self, state: State) -> Iterator[Step]:
        """Every action that is possible, with the state after it."""
        if self.guest_runs(state.phase):
            yield from self._guest(state)
        for name, after in (*self._session(state), *self._hints(state), *self._senders(state)):
            if after is not None:
                yield name, after

    def _guest(self, state: State) -> Iterator[Step]:
        for p in range(self.pages):
            page = 1 << p
            if state.allocated & page:
                for name, value in self.contents:
                    yield f"guest writes {name}{p}", self._write(state, p, value)
                yield f"guest writes zeros to {p}", self._write(state, p, 0)
                freed = state._replace(allocated=state.allocated & ~page)
                if self.contract is FreeContract.ZERO:
                    freed = self._write(freed, p, 0)
                yield f"guest frees {p}", freed
            else:
                taken = state._replace(allocated=state.allocated | page)
                for name, value in self.contents:
                    yield f"guest allocates and writes {name}{p}", self._write(taken, p, value)
                if self.contract is FreeContract.ZERO:
                    yield f"guest allocates {p} and counts on zeros", taken
        for epoch in range(1, self.epochs + 1):
            if state.unread >> epoch & 1:
                yield (
                    f"guest answers epoch {epoch}",
                    state._replace(
                        unread=state.unread & ~(1 << epoch),
                        hints=state.hints | self.answer(state) << epoch * self.pages,
                    ),
                )

    def _write(self, state: State, p: int, nonzero: int) -> State:
        page = 1 << p
        readers, streams, before = list(state.readers), list(state.streams), list(state.before)
        if readers[p] == CURRENT:
            readers[p] = OLD
        low, high = (OLD if value == CURRENT else value for value in streams[p])
        streams[p] = (low, high) if low <= high else (high, low)
        if before[p] & CURRENT:
            before[p] = before[p] & ~CURRENT | OLD
        return state._replace(
            kernel=self.log(state.kernel, page) if state.phase != IDLE else 0,
            nonzero=state.nonzero | page if nonzero else state.nonzero & ~page,
            touched=state.touched | page,
            readers=tuple(readers),
            streams=tuple(streams),
            before=tuple(before),
        )

    def _with(self, state: State, method: str, *arguments: Any, **changes: Any) -> State | None:
        """The state after a call of the ledger; None if the ledger refuses."""
        outcome = self.call(state.ledger, method, *arguments)
        return None if outcome is None else state._replace(ledger=outcome[0], **changes)

    def _session(self, state: State) -> Iterator[tuple[str, State | None]]:
        phase = state.phase
        nobody = (NOTHING,) * self.pages
        if phase == IDLE:
            yield "arm", self._arm(state)
            return
        if state.cancels:
            yield (
                "cancel",
                self._with(
                    state,
                    "cancel",
                    phase=IDLE,
                    kernel=0,
                    scanned=0,
                    readers=nobody,
                    streams=((0, 0),) * self.pages,
                    before=(self.fresh(),) * self.pages,
                    cancels=state.cancels - 1,
                    distrusted=False,
                    found=0,
                ),
            )
        if phase == ENDED:
            return
        if state.found:
            yield "harvest", self._harvest(state)
            return
        if phase == RUNNING:
            yield "pause", state._replace(phase=PAUSED)
            if self.holes:
                yield "look for holes", state._replace(scanned=state.touched + 1)
        if state.scanned:
            yield (
                "mark holes",
                self._with(state, "mark_holes", self._table[self.all & ~(state.scanned - 1)], scanned=0),
            )
        if not self.awaits:
            yield "harvest", self._harvest(self._look(state))
        elif not self.view(state.ledger)._picked:
            yield "look for dirty pages", self._look(state)
        yield (
            "barrier",
            self._with(
                state,
                "barrier",
                streams=((0, 0),) * self.pages,
                before=tuple(map(self.drained, state.before, state.streams)),
            ),
        )
        if phase == HARVESTED:
            yield "settle", self._settle(state)
            yield "END", self._with(state, "finish", phase=ENDED)

    def _arm(self, state: State) -> State | None:
        outcome = self.call(state.ledger, "arm", self.contract, sees_writes=self.sees_writes)
        if outcome is None:
            return None
        free = self.all & ~state.allocated
        return state._replace(ledger=outcome[0], phase=RUNNING, kernel=0, old_list=free)

    def _look(self, state: State) -> State:
        found, after = self.look(state)
        return after._replace(found=found + 1)

    def _harvest(self, state: State) -> State | None:
        after = self._with(state, "harvest", self._table[state.found - 1])
        if after is None:
            return None
        return self.told(after)._replace(phase=HARVESTED if state.phase == PAUSED else state.phase)

    def _settle(self, state: State) -> State | None:
        free = self._table[self.all & ~state.allocated]
        outcome = self.call(state.ledger, "settle", free, trim=not self.liar)
        return None if outcome is None else state._replace(ledger=outcome[0])

    def _hints(self, state: State) -> Iterator[tuple[str, State | None]]:
        asked = self.view(state.ledger)._next_epoch > self.epochs
        if not asked and not state.distrusted and state.phase != ENDED and not state.found:
            outcome = self.call(state.ledger, "issue")
            if outcome is not None:
                after, epoch = outcome
                unread = state.unread | 1 << epoch
                yield f"request epoch {epoch}", state._replace(unread=unread, ledger=after)
        if state.phase == ENDED:
            return
        for epoch in range(1, self.epochs + 1):
            for p in range(self.pages):
                if state.hints >> (epoch * self.pages + p) & 1:
                    kernel = self.after_hint(state.kernel, 1 << p)
                    after = self._with(state, "hint", epoch, self._table[1 << p], kernel=kernel)
                    yield f"hint {p} of epoch {epoch} arrives", after
        if self.liar and state.phase != IDLE and not state.distrusted and not state.found:
            yield "distrust the hints", self._with(state, "distrust_hints", distrusted=True)

    def _senders(self, state: State) -> Iterator[tuple[str, State | None]]:
        if state.phase in (IDLE, ENDED) or state.found:
            return
        for method, reader in (("pick", PICKED), ("pick_free", FREEING)):
            outcome = self.call(state.ledger, method, 1)
            if outcome is not None and outcome[1]:
                p = outcome[1].stop() - 1
                if state.readers[p] == NOTHING:
                    readers = replaced(state.readers, p, reader)
                    yield f"{method} {p}", state._replace(ledger=outcome[0], readers=readers)
        for p, reader in enumerate(state.readers):
            if reader == PICKED:
                readers = replaced(state.readers, p, self.content(state, p))
                yield f"read {p}", state._replace(readers=readers)
            elif reader != NOTHING:
                yield from self._push(state, p, reader)

    def _push(self, state: State, p: int, reader: int) -> Iterator[tuple[str, State | None]]:
        """The record of a read page goes to the end of either stream."""
        page, record = self._table[1 << p], True
        if reader == FREEING:
            outcome = self.call(state.ledger, "freed", page)
        elif reader == ZERO:
            asked = self.call(state.ledger, "zero_records", page)
            record = asked is not None and bool(asked[1])
            outcome = self.call(state.ledger, "zeroed", page)
        else:
            outcome = self.call(state.ledger, "sent_pages", page)
        if outcome is None:
            return
        value = ZERO if reader == FREEING else reader
        after = self.record(state._replace(ledger=outcome[0]), p, value)
        after = after._replace(readers=replaced(state.readers, p, NOTHING))
        if not record:
            yield f"no record for zero page {p}", after
            return
        name = dict(self.names)[value]
        last = state.streams[p]
        for stream in (0, 1) if last[0] != last[1] else (0,):
            other = last[1 - stream]
            pair = (value, other) if value <= other else (other, value)
            which = "another stream than the last" if other else "a stream"
            yield (
                f"record: {name} of {p} on {which}",
                after._replace(streams=replaced(after.streams, p, pair)),
            )

    # -- the invariant -------------------------------------------------------------------------------------

    def wrong(self, state: State) -> str | None:
        """Why a state must never be, or None: the state invariant of docs/safety.md, R11 and R17."""
        if state.phase == IDLE or (self.liar and not state.distrusted):
            return None
        ledger = self.view(state.ledger)
        total = union = 0
        for name in ("to_send", "in_flight", "sent", "zero", "skipped", "hole"):
            bits = vars(ledger)[name].bits
            total += bits.bit_count()
            union |= bits
        if total != self.pages or union != self.all:
            return "R17: a page is in no state, or in two"
        remembered = self.remembered(state)
        owed = ledger.free_pending.bits & ledger.skipped.bits
        for p in range(self.pages):
            page, reader = 1 << p, state.readers[p]
            possible = self.drained(state.before[p], state.streams[p])
            right = self.content(state, p)
            if ledger.skipped.bits & ~ledger.free_pending.bits & page and possible != ZERO:
                return f"R11: page {p} is skipped and may not read as zero"
            if not (state.allocated & page or self.contract is FreeContract.ZERO):
                continue
            if state.phase == ENDED:
                if possible != right:
                    return f"page {p} is lost"
            elif remembered & page or reader == PICKED:
                pass
            elif reader == FREEING:
                if right != ZERO and not ledger._doubted.bits & page:
                    return f"page {p} is to become zero and nobody remembers its content"
            elif reader != NOTHING:
                if reader != right:
                    return f"page {p} was read too early and nobody remembers"
            elif possible != right and not (owed & page and right == ZERO):
                return f"page {p} is forgotten"
        return None


def replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


@dataclass
class Search:
    """What a search found. ``trace``: the shortest way to the first wrong state, empty if there is none."""

    states: int = 0
    transitions: int = 0
    ends: int = 0
    complete: bool = True
    depth: int = 0
    """Every state that fewer steps reach was visited."""
    reason: str = ""
    trace: list[str] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reached = f"{self.states} states to depth {self.depth}"
        lines = [f"{reached}, {self.transitions} transitions, {self.ends} at END"]
        if self.trace:
            lines += [f"{self.reason}, after {len(self.trace)} steps:"]
            lines += [f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1)]
        return "\n".join(lines)


def search(model: Model, *, max_states: int) -> Search:
    """Breadth first from every initial state; stops at the first wrong one or at ``max_states``."""
    found = Search()
    order: list[State] = list(model.initial())
    origin: list[tuple[int, str]] = [(-1, "")] * len(order)
    seen = set(order)
    at = 0
    while at < len(order):
        state = order[at]
        for name, after in model.steps(state):
            found.transitions += 1
            if after in seen:
                continue
            seen.add(after)
            order.append(after)
            origin.append((at, name))
            found.actions[name.translate(_NO_DIGITS)] += 1
            found.ends += after.phase == ENDED
            reason = model.wrong(after)
            if reason is not None:
                found.states, found.complete, found.reason = len(order), False, reason
                found.trace = _trace(origin, len(order) - 1)
                return found
        at += 1
        if len(order) >= max_states:
            found.complete = False
            break
    found.states = len(order)
    found.depth = len(_trace(origin, at - 1))
    return found


_NO_DIGITS = str.maketrans("0123456789", "#" * 10)


def _trace(origin: list[tuple[int, str]], at: int) -> list[str]:
    steps: list[str] = []
    while origin[at][0] >= 0:
        at, name = origin[at]
        steps.append(name)
    return steps[::-1]
