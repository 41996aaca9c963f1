"""HandOver: the source's half of the decision who runs the guest, from READY on.

From the moment GO is journalled only the destination's answer counts (G2, G3).
"""

from __future__ import annotations

import logging

from migd.errors import PeerError, VerificationError
from migd.migration.journal import Mark
from migd.source.attempt import Attempt, Verify
from migd.source.phases import Phases
from migd.wire import messages
from migd.wire.messages import Aborted, Started

log = logging.getLogger(__name__)


class DestinationAborted(PeerError):
    """The destination's durable word that it will never run this guest."""


class HandOver:
    """Asks the destination to start the guest; once it runs there, verifies late and lets go."""

    def __init__(self, attempt: Attempt, phases: Phases) -> None:
        self._attempt = attempt
        self._phases = phases
        self._peer = attempt.peer
        self._result = attempt.result

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
        """
        self._result.total_s = self._attempt.elapsed_s
        self._result.downtime.guest_s = (started.resumed_at_ns - started.stopped_at_ns) / 1e9
        await self._attempt.note(Mark.STARTED)
        untracked = await self._verify_late()
        told = await self._tell_verdict(untracked)
        if untracked:
            pausing = "was told to pause its guest" if told else "could NOT be told to pause its guest"
            raise VerificationError(
                f"{untracked} pages changed without being tracked; the destination {pausing}, and the source "
                f"keeps its RAM: decide with both before you resume either"
            )
        # Before the guest's check: it may be on its way back already, and its name is to be free here.
        await self._attempt.guest.release()
        await self._attempt.note(Mark.RELEASED)
        await self._await_check()

    async def _verify_late(self) -> int:
        if self._phases.verified_strictly:
            return 0
        if self._attempt.options.verify is Verify.OFF:
            self._result.verification = "off"
            return 0
        untracked = (await self._phases.tracking.untracked()).count()
        self._result.verification = f"late: {untracked} pages differ" if untracked else "late: ok"
        return untracked

    async def _tell_verdict(self, untracked: int) -> bool:
        """Whether the destination was reached."""
        migration, detail = self._attempt.migration, self._result.verification
        try:
            await self._peer.control.send(
                messages.Verdict(migration=migration, ok=not untracked, detail=detail)
            )
        except PeerError as error:
            log.warning("%s: the verdict (%s) could not be delivered: %s", migration, detail, error)
            return False
        return True

    async def _await_check(self) -> None:
        """The guest's own check, if it makes one: a figure for the result, no condition."""
        try:
            checked = await self._peer.expect(messages.Checked, self._attempt.limits.check_s)
        except PeerError as error:
            log.info("%s: no self-check of the guest: %s", self._attempt.migration, error)
            return
        self._result.checked_pages, self._result.wrong_pages = checked.pages, checked.wrong
