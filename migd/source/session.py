"""SourceSession: one migration at its source, from the request to its result.

Ownership: before GO the guest is ours, and ``run`` returns with it running again, whatever failed (G1). From
the moment GO is journalled only the destination's answer decides (G3): STARTED, and the guest is released
after the verdict; ABORTED, and it resumes; none, and it stays paused, outcome unknown.
"""

from __future__ import annotations

import asyncio
import logging

from migd.errors import (
    Cancelled,
    GuestError,
    MigdError,
    OutcomeUnknown,
    PeerError,
    PeerLost,
)
from migd.migration.convergence import Policy
from migd.migration.journal import Mark
from migd.migration.ports import Passage
from migd.migration.state import ADJUSTABLE, CANCELLABLE, SourceState
from migd.migration.stats import Iteration, Result
from migd.source.attempt import Attempt
from migd.source.handover import DestinationAborted, HandOver
from migd.source.hinting import Hinting
from migd.source.phases import Phases
from migd.source.resolution import Resolution
from migd.tasks import guarded
from migd.wire import messages
from migd.wire.messages import Started
from migd.wire.protocol import Keeper

log = logging.getLogger(__name__)

_REASON_GRACE_S = 0.2
"""A data stream may break a moment before the control connection brings the reason."""

_FAREWELL_S = 1.0
"""For the last words of an ended migration: DONE, DISARM, ABORT. They are a courtesy, not a condition."""


class SourceSession:
    """Takes one attempt to its end. ``run`` once; ``cancel`` at any time."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._hinting = Hinting(self._attempt)
        self._phases = Phases(self._attempt, self._hinting)
        self._handover = HandOver(self._attempt, self._phases)
        self._phases_task: asyncio.Task[None] | None = None
        self._cancelled = False
        self._unknown = MigdError("")
        """Why the outcome is unknown, once it is."""

    @property
    def migration(self) -> str:
        return self._attempt.migration

    @property
    def passage(self) -> Passage:
        return self._attempt.passage

    @property
    def result(self) -> Result:
        """Complete when ``run`` has returned."""
        return self._attempt.result

    @property
    def state(self) -> SourceState:
        return self._attempt.state

    @property
    def ended(self) -> bool:
        """True when nothing more will happen; UNKNOWN is no end."""
        return self._attempt.progress.ended

    @property
    def moving_s(self) -> float:
        """From the request until the guest was started at the destination, or it was over, or until now."""
        return self.result.total_s or self._attempt.elapsed_s

    @property
    def wire_bytes(self) -> int:
        """Sent on data streams so far."""
        return self.result.wire_bytes or self._phases.wire_bytes

    def iterations_ended(self) -> list[Iteration]:
        """Iterations whose figures are final."""
        return self._attempt.iterations

    def balance_pages(self) -> tuple[int, int]:
        """(pages that need nothing more at this moment, all pages): for a progress bar."""
        ledger = self._attempt.ledger
        if self.state is SourceState.COMPLETED:
            return (ledger.pages, ledger.pages)
        return (ledger.pages - ledger.to_send.count() if ledger.armed else 0, ledger.pages)

    @property
    def policy(self) -> Policy:
        return self._attempt.policy

    def change_policy(self, policy: Policy) -> bool:
        """From the next decision on; False if there will be none, since the guest is paused or it is over."""
        if self.state not in ADJUSTABLE:
            return False
        self._attempt.policy = policy
        return True

    def cancel(self) -> bool:
        """Ask for the end of the attempt; False if it is too late (GO) or over."""
        if self.state not in CANCELLABLE:
            return False
        self._cancelled = True
        if self._phases_task is not None:
            self._phases_task.cancel()
        return True

    def leave(self) -> None:
        """The daemon ends: where the guest runs elsewhere already, nothing more is waited for."""
        self._handover.leave()

    # -- the whole of it ----------------------------------------------------------------------------

    async def run(self) -> Result:
        """Returns the result, failed or not. Cancelling the task is ``cancel``, until GO was sent."""
        self._attempt.observer.began(self.passage)
        if await self._reach_go():
            await self._go()
        await self._end()
        return self.result

    async def resolve(self) -> Result:
        """Ask the destination again what became of a migration whose outcome is unknown."""
        await self._attempt.enter(SourceState.GOING)
        self.result.error, self.result.exit_code = "", 0
        await self._go()
        await self._end()
        return self.result

    async def force(self, keeper: Keeper) -> Result:
        """The operator's word about an outcome that stays unknown; the result's ``error`` says what was done.

        If it could not be done the outcome is unknown as before, and ``error`` says why.
        """
        attempt = self._attempt
        last = attempt.record(Mark.GO, self._handover.verified)
        resolution = Resolution(last, attempt.guest, attempt.peer, attempt.journal, attempt.worker)
        try:
            said = await resolution.force(keeper, self._unknown)
        except Exception as error:  # noqa: BLE001  # translated, and logged if it is a bug
            attempt.fail(self._translated(error, MigdError), "unknown")
            await attempt.peer.close()
            return self.result
        return await self.overtaken(keeper, said)

    async def overtaken(self, keeper: Keeper, said: str) -> Result:
        """An unknown outcome was decided, not by the destination's answer to this session."""
        attempt = self._attempt
        if keeper is Keeper.SOURCE:
            await attempt.enter(SourceState.ABORTING)
        else:
            await attempt.enter(SourceState.GOING)
            await attempt.enter(SourceState.VERIFYING)
        attempt.fail(MigdError(said), "failed")
        await attempt.enter(SourceState.FAILED)
        await self._end()
        return self.result

    async def _reach_go(self) -> bool:
        """True with GO in the journal; False with the attempt aborted, whatever failed."""
        try:
            await self._before_go()
        except asyncio.CancelledError:
            await self._abort(Cancelled("cancelled before GO: the guest runs on here"))
        except Exception as error:  # noqa: BLE001  # translated, and logged if it is a bug
            await self._abort(self._translated(error, MigdError))
        else:
            return True
        return False

    def _translated(self, error: Exception, kind: type[MigdError]) -> MigdError:
        """Our own bug must neither leave the guest paused (G1) nor take the daemon down: log it whole."""
        if isinstance(error, MigdError):
            return error
        log.error("%s: unexpected failure in %s", self.migration, self.state, exc_info=error)
        return kind(f"unexpected {type(error).__name__}: {error}")

    async def _go(self) -> None:
        """From here on nothing but the destination's own word brings the guest back (G2)."""
        attempt = self._attempt
        try:
            started = await self._handover.go()
        except DestinationAborted as error:
            await self._abort(error)
        except Exception as error:  # noqa: BLE001  # translated, and logged if it is a bug
            await attempt.enter(SourceState.UNKNOWN)
            self._unknown = self._translated(error, OutcomeUnknown)
            attempt.fail(self._unknown, "unknown")
        else:
            await self._finish(started)

    async def _finish(self, started: Started) -> None:
        attempt = self._attempt
        await attempt.enter(SourceState.VERIFYING)
        try:
            await self._handover.finish(started)
        except DestinationAborted as error:
            await self._resume()
            await attempt.note(Mark.ABORTED, str(error))
            attempt.fail(error, "failed")
            await attempt.enter(SourceState.FAILED)
        except Exception as error:  # noqa: BLE001  # translated, and logged if it is a bug
            attempt.fail(self._translated(error, MigdError), "failed")
            await attempt.enter(SourceState.FAILED)
        else:
            self.result.outcome = "completed"
            await attempt.enter(SourceState.COMPLETED)

    async def _end(self) -> None:
        await self._farewell()
        self._attempt.room.close()
        self._account()
        await self._attempt.observer.finished(self.passage, self.result)

    async def _before_go(self) -> None:
        """Every phase up to READY, watched: it ends when peer or guest is lost. Then GO is journalled."""
        await self._attempt.observer.entered(self.passage, self.state)
        if self._cancelled:
            raise Cancelled("cancelled before it began")
        self._phases_task = asyncio.ensure_future(self._watched_phases())
        try:
            await self._phases_task
        except asyncio.CancelledError:
            self._phases_task.cancel()
            await asyncio.wait({self._phases_task})
            raise
        await self._attempt.mark(Mark.GO, self._handover.verified)
        await self._attempt.observer.entered(self.passage, self.state)

    async def _watched_phases(self) -> None:
        if self.state is SourceState.WAITING:
            await guarded(self._attempt.guest.verdict(), self._guest_lost())
            await self._attempt.enter(SourceState.CONNECTING)
        await self._attempt.peer.connect()
        await guarded(self._explained(), self._attempt.peer.watch(), self._guest_lost())
        # No await may come between the last phase and this: from here on `cancel` is too late.
        self._attempt.progress.enter(SourceState.GOING)

    async def _explained(self) -> None:
        try:
            await self._phases.run()
        except PeerLost:
            await self._attempt.clock.sleep(_REASON_GRACE_S)
            raise

    async def _guest_lost(self) -> None:
        await self._attempt.guest.lost()
        raise GuestError(f"the guest process of {self._attempt.guest.name} ended")

    # -- the bad ends -------------------------------------------------------------------------------

    async def _abort(self, error: MigdError) -> None:
        """G1, R15: nothing of this attempt counts; the peer is told, the guest runs on."""
        attempt = self._attempt
        went = self.state is SourceState.GOING
        await attempt.enter(SourceState.ABORTING)
        await self._tell_abort(str(error))
        if self._phases.paused:
            await self._resume()
        if went:
            await attempt.note(Mark.ABORTED, str(error))
        cancelled = isinstance(error, Cancelled)
        attempt.fail(error, "cancelled" if cancelled else "failed")
        await attempt.enter(SourceState.CANCELLED if cancelled else SourceState.FAILED)

    async def _resume(self) -> None:
        try:
            await self._attempt.guest.resume()
        except GuestError as error:
            log.error("%s: the guest cannot be resumed: %s", self.migration, error)  # noqa: TRY400

    async def _tell_abort(self, reason: str) -> None:
        abort = messages.Abort(migration=self.migration, reason=reason[:1000])
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._attempt.peer.control.send(abort)
        except (PeerError, TimeoutError):
            log.debug("%s: the peer does not hear of the end", self.migration)

    async def _farewell(self) -> None:
        """Every exit path tells the guest that nobody listens any more (R15)."""
        await self._attempt.peer.close()
        for farewell in (self._hinting.done, self._disarm):
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await farewell()
            except (MigdError, TimeoutError) as error:
                log.debug("%s: farewell: %s", self.migration, error)

    async def _disarm(self) -> None:
        if self._phases.tracking.close() and self.state is not SourceState.COMPLETED:
            await self._attempt.guest.disarm()

    def _account(self) -> None:
        """Figures into the result; what was sent or skipped counts no more (R15), unless GO may yet be."""
        result, ledger = self.result, self._attempt.ledger
        result.states = [str(state) for state in self._attempt.progress.path]
        result.total_s = result.total_s or self._attempt.elapsed_s
        result.count(ledger.balance(), ledger.tally)
        self._phases.account()
        if self.state is not SourceState.UNKNOWN:
            ledger.cancel()
            self._phases.forget()
