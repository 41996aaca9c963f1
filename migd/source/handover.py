"""HandOver: the source's half of the decision who runs the guest, from READY on.

From the moment GO is journalled only the destination's answer counts (G2, G3).
"""

from __future__ import annotations

import asyncio
import logging

from migd.errors import PeerError, PeerLost, VerificationError
from migd.migration.journal import Mark
from migd.source.attempt import Attempt, Verify
from migd.source.phases import Phases
from migd.tasks import guarded
from migd.wire import messages
from migd.wire.messages import Aborted, Started

log = logging.getLogger(__name__)


class DestinationAborted(PeerError):
    """The destination's durable word that it will never run this guest."""


def choices(guest: str) -> str:
    """What an operator may say about a condemned guest."""
    return (
        f"`migd resolve {guest} --force-source` has it run on here as it was at the pause, `--force-dest` "
        f"there as it is, with pages that may be wrong"
    )


class HandOver:
    """Asks the destination to start the guest; once it runs there, verifies late and lets go."""

    def __init__(self, attempt: Attempt, phases: Phases) -> None:
        self._attempt = attempt
        self._phases = phases
        self._peer = attempt.peer
        self._result = attempt.result
        self._leaving = asyncio.Event()

    async def go(self) -> Started:
        """GO, durable and sent, and its answer.

        DestinationAborted if the guest is ours again. OutcomeUnknown if no answer came: it is nobody's.
        """
        began = self._attempt.clock.now()
        answer = await self._peer.go()
        if isinstance(answer, Aborted):
            raise DestinationAborted(f"the destination aborted: {answer.reason}")
        self._result.downtime.go_s = self._attempt.clock.now() - began
        return answer

    async def finish(self, started: Started) -> None:
        """The guest runs at the destination: verify late, tell the verdict, let go.

        VerificationError for a bad verdict: the destination pauses its guest, the source keeps the RAM.
        DestinationAborted if its operator has given the guest up before that could be told.
        """
        self._result.total_s = self._attempt.elapsed_s
        self._result.downtime.guest_s = (started.resumed_at_ns - started.stopped_at_ns) / 1e9
        await self._attempt.note(Mark.STARTED, self.verified)
        untracked = await self._verify_late()
        if untracked:
            await self._condemn(untracked)
        await self._tell_good()
        # Before the guest's check: it may be on its way back already, and its name is to be free here.
        await self._attempt.guest.release()
        await self._attempt.note(Mark.RELEASED)
        await self._await_check()

    @property
    def verified(self) -> str:
        """How tracking was verified before GO; empty if it is still to be. Goes into the journal."""
        return self._result.verification if self._phases.verified_strictly else ""

    async def _verify_late(self) -> int:
        if self._phases.verified_strictly:
            return 0
        if self._attempt.options.verify is Verify.OFF:
            self._result.verification = "off"
            return 0
        untracked = (await self._phases.tracking.untracked()).count()
        self._result.verification = f"late: {untracked} pages differ" if untracked else "late: ok"
        return untracked

    async def _tell_good(self) -> None:
        """It runs there whether this arrives or not: without it, it moves on ``verdict_s`` later."""
        migration, detail = self._attempt.migration, self._result.verification
        try:
            await self._peer.control.send(messages.Verdict(migration=migration, ok=True, detail=detail))
        except PeerError as error:
            log.warning("%s: the verdict (%s) could not be delivered: %s", migration, detail, error)

    async def _condemn(self, untracked: int) -> None:
        """Durable before it is told, and told until it is acted upon; always raises."""
        attempt, detail = self._attempt, self._result.verification
        written = await attempt.note(Mark.CONDEMNED, detail)
        bad = messages.Verdict(migration=attempt.migration, ok=False, detail=detail)
        try:
            answer = await self._peer.deliver(bad, attempt.limits.verdict_s)
        except PeerError as error:
            pausing = f"could NOT be told to pause its guest ({error}); `migd resolve` tells it again"
        else:
            if isinstance(answer, Aborted):
                raise DestinationAborted(f"{untracked} pages changed untracked, and {answer.reason}")
            pausing = "has paused its guest"
        if not written:
            await attempt.note(Mark.CONDEMNED, detail)
        raise VerificationError(
            f"{untracked} pages changed without being tracked: the destination {pausing}. It stays paused "
            f"here, too: {choices(attempt.guest.name)}"
        )

    async def _await_check(self) -> None:
        """The guest's own check, if it makes one: a figure for the result, no condition."""
        try:
            checked = await guarded(
                self._peer.expect(messages.Checked, self._attempt.limits.check_s), self._left()
            )
        except PeerError as error:
            log.info("%s: no self-check of the guest: %s", self._attempt.migration, error)
            return
        if checked.pages:
            self._result.checked_pages, self._result.wrong_pages = checked.pages, checked.wrong

    def leave(self) -> None:
        """This daemon ends: the guest's check is not waited for any longer, nor if it is still to come."""
        self._leaving.set()

    async def _left(self) -> None:
        await self._leaving.wait()
        raise PeerLost("this daemon ends")
