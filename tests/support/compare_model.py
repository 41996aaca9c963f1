"""The model of tests/support/ledger_model.py with a log that compares content instead of seeing writes (R19).

Here bytes can come back: a page holds ZERO, A or B, and a write may store what was there before. So whatever
is a copy of a page - in a reader, in a stream, at the destination, the digest of what was last sent - is one
of these values, and nothing ages. Which bytes are A is a matter of names: every page that is not zero begins
with A.

A page that is skipped as free is nobody's until the guest is paused; then its bitmap decides. Until then the
invariant holds for such a page in a weaker sense: somebody will ask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.ledger_model import HARVESTED, ZERO, Model, State, replaced

A, B = 2, 4


class CompareModel(Model):
    """``state.memory`` and ``state.digests`` instead of ``kernel`` and ``nonzero``."""

    sees_writes = False
    contents = (("A to ", A), ("B to ", B))
    names = ((ZERO, "zeros"), (A, "A"), (B, "B"))

    # -- what a mutant replaces -------------------------------------------------------------------------

    def at_arming(self, state: State) -> tuple[int, ...]:
        """Digests before anything was sent."""
        return (0,) * self.pages

    def at_look(self, state: State) -> tuple[int, ...]:
        """Digests after a comparison."""
        return state.digests

    def at_record(self, state: State, p: int, copy: int) -> int:
        """The digest of page p after ``copy``, which was read of it, was sent."""
        return copy

    def compared(self, state: State) -> int:
        """Pages whose digest is compared; zero pages and holes must be zero besides."""
        return self.view(state.ledger).sent.bits

    # -- the log ------------------------------------------------------------------------------------------

    def initial(self) -> Iterator[State]:
        for state in super().initial():
            memory = tuple(A if state.nonzero >> p & 1 else ZERO for p in range(self.pages))
            yield state._replace(memory=memory, digests=(0,) * self.pages, nonzero=0)

    def _arm(self, state: State) -> State | None:
        armed = super()._arm(state)
        return None if armed is None else armed._replace(digests=self.at_arming(state))

    def _write(self, state: State, p: int, value: int) -> State:
        return state._replace(memory=replaced(state.memory, p, value or ZERO), touched=state.touched | 1 << p)

    def content(self, state: State, p: int) -> int:
        return state.memory[p]

    def differing(self, state: State) -> int:
        """What a look at all of RAM would find now."""
        ledger, compared = self.view(state.ledger), self.compared(state)
        clear = ledger.zero.bits | ledger.hole.bits
        differs = 0
        for p in range(self.pages):
            page, content = 1 << p, state.memory[p]
            if (compared & page and content != state.digests[p]) or (clear & page and content != ZERO):
                differs |= page
        return differs

    def look(self, state: State) -> tuple[int, State]:
        return self.differing(state), state._replace(digests=self.at_look(state))

    def record(self, state: State, p: int, value: int) -> State:
        if value == ZERO:  # it is looked at as a zero page, and its digest is not
            return state
        return state._replace(digests=replaced(state.digests, p, self.at_record(state, p, value)))

    def remembered(self, state: State) -> int:
        """To send; differing, or still on its way, while one more look is to come; skipped or about to be,
        while the bitmap is to come."""
        ledger: Any = self.view(state.ledger)
        pages: int = ledger.to_send.bits | max(0, state.found - 1)
        if state.phase < HARVESTED:
            pages |= self.differing(state) | ledger.in_flight.bits
        if not ledger._settled:
            pages |= ledger.skipped.bits | ledger._freeing.bits
        return pages
