"""Hinting: when a source asks its guest for free pages, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import math

from migd.migration.convergence import Standing, hints_pay
from migd.migration.ports import HintChannel
from migd.ram.contract import FreeContract
from migd.source.attempt import Attempt

_AHEAD_PAGES = 1 << 14
"""64 MiB. An agent in a Linux guest answers from the lowest page on, 64 MiB in 20 ms even under emulation;
memory is sent from the lowest page on as well, at a fifth of that."""

_FOLLOWED = 4
"""A guest of which most is free is sent faster than it answers: it is waited for, in all, so many times as
long as for the beginning."""

_FOLLOWED_SHARE = 2
"""As long as it calls more than one page free in so many."""


class Hinting:
    """The hints of one attempt. A slow, dead or hostile guest costs at most 5 ``hint_first_s`` each time."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._channel = attempt.guest.hints
        self._ledger = attempt.ledger
        self._asked_pages = 0
        self._applied_before = 0
        self._holes_before = 0
        self._epoch = 0
        self._asked_s: float | None = None
        """When, of the last request that may be answered."""
        self._waited_s = 0.0
        """For its answer, so far."""
        self._followed_s = 0.0
        """Of it, for what came behind the beginning."""
        self._following = asyncio.Lock()
        self._answered = False

    async def contract(self, *, sees_writes: bool = True, missing: str = "") -> FreeContract:
        """What the guest expects of free pages; NONE, and why, where its hints are not used (R12, R19).

        ``missing``: why there is no log that sees writes, and how to get one.
        """
        result = self._attempt.result
        if not self._attempt.options.hints:
            return FreeContract.NONE
        if self._channel is None:
            result.hints = "the guest has no hint channel"
            return FreeContract.NONE
        if not sees_writes and not self._attempt.guest.reports_free_at_pause:
            result.hints = "not used: the compare log needs the guest's free pages at the pause"
            result.hints += f" ({missing})" if missing else ""
            return FreeContract.NONE
        contract = await self._channel.declare(self._attempt.limits.hint_first_s)
        if contract is FreeContract.NONE:
            result.hints = "the guest declared no free-page contract"
        return contract

    def pay(self, standing: Standing) -> bool:
        """Whether asking again before the next iteration is worth it."""
        applied = self._ledger.tally.hints_applied - self._applied_before
        found = max(0, self._ledger.hole.count() - self._holes_before)  # while the guest was asked
        policy = self._attempt.policy
        if self._channel is None or self._ledger.contract is FreeContract.NONE:
            return False
        return hints_pay(
            applied,
            self._asked_pages - found,
            standing.left_bytes,
            policy,
            standing.rate_bytes_s,
            self._channel.answer_bytes,
            self._waited_s,
        )

    async def request(self) -> None:
        """A new epoch. Before memory is read the answer should be ``ahead`` of that."""
        channel = self._channel
        self._asked_s = None
        if channel is None or self._ledger.contract is FreeContract.NONE or channel.distrusted:
            return
        self._asked_pages = self._ledger.to_send.count()
        self._applied_before = self._ledger.tally.hints_applied
        self._holes_before = self._ledger.hole.count()
        self._answered |= channel.answered(self._epoch)
        self._epoch = self._ledger.issue()
        await channel.request(self._epoch, self._ledger.hint)
        self._asked_s, self._waited_s, self._followed_s = self._attempt.clock.now(), 0.0, 0.0

    async def ahead(self, patience_s: float = math.inf) -> None:
        """Wait for it, not longer than ``patience_s`` nor than ``hint_first_s`` since the request (G6)."""
        if self._channel is None or self._asked_s is None:
            return
        left_s = self._asked_s + self._attempt.limits.hint_first_s - self._attempt.clock.now()
        await self._wait(self._channel, _AHEAD_PAGES, min(patience_s, max(0.0, left_s)))

    async def follow(self, page: int) -> int:
        """Below which page a stream may read that has this one next; 0 after a wait: that may be another now.

        What lies ahead of the answer is as likely to be spared as what lies behind it.
        """
        if self._channel is None or self._asked_s is None:
            return self._ledger.pages
        async with self._following:  # streams wait together, not one after the other
            reach = self._channel.reach(self._epoch)
            if page < reach:
                return reach
            spared = self._ledger.tally.hints_applied - self._applied_before
            left_s = _FOLLOWED * self._attempt.limits.hint_first_s - self._followed_s
            if spared * _FOLLOWED_SHARE <= reach or left_s <= 0:
                return self._ledger.pages
            self._followed_s += await self._wait(self._channel, page + 1, left_s)
            return 0 if page < self._channel.reach(self._epoch) else self._ledger.pages

    async def _wait(self, channel: HintChannel, page: int, patience_s: float) -> float:
        """Until the answer has reached the page; how long that took."""
        began = self._attempt.clock.now()
        await channel.reached(self._epoch, page, patience_s)
        waited_s = self._attempt.clock.now() - began
        self._waited_s += waited_s
        self.check()
        return waited_s

    def check(self) -> None:
        """R7: a channel that broke its protocol too often spares nothing."""
        channel = self._channel
        if channel is None or self._ledger.contract is FreeContract.NONE:
            return
        if channel.distrusted:
            self._ledger.distrust_hints()
            self._attempt.result.hints = f"refused: the guest sent {channel.rejected} bad records"

    async def done(self) -> None:
        """Nobody listens any more (R15)."""
        if self._channel is not None:
            result, tally = self._attempt.result, self._ledger.tally
            result.hints_rejected = self._channel.rejected
            self._answered |= self._channel.answered(self._epoch)
            if self._ledger.contract is not FreeContract.NONE:
                result.hints = self._outcome(used=bool(tally.hints_applied or tally.trimmed))
            await self._channel.done()

    def _outcome(self, *, used: bool) -> str:
        if used:
            return "used"
        return "no page was free" if self._answered else "none came in time"
