"""Returns: what becomes of guests that come back after a restart of their daemon. The journal decides."""

from __future__ import annotations

import asyncio
import logging
from weakref import WeakValueDictionary

from migd.daemon.departures import Departures
from migd.daemon.targets import is_id_of
from migd.destination.absent import AbsentGuest
from migd.destination.handover import HandOver
from migd.errors import GuestError, MigdError, Refused, ResourceError
from migd.guest.control import GuestState
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.limits import Limits
from migd.migration.decision import (
    Incoming,
    Paused,
    awaits_verdict,
    incoming_at_destination,
    paused_at_source,
)
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import LoadedGuest, Observer, Passage, Worker
from migd.migration.state import DESTINATION_TRANSITIONS, DestinationState, Progress
from migd.source.resolution import Resolution
from migd.wire.protocol import Keeper

log = logging.getLogger(__name__)

_REVIVED = {
    Mark.STARTED: DestinationState.STARTING,
    Mark.VERIFIED: DestinationState.COMPLETED,
    Mark.CONDEMNED: DestinationState.FAILED,
}
"""Where a hand-over goes on after a restart."""


COMES_BACK_S = 3.0
"""A guest looks for its daemon every 0.2 s (``RETRY_S`` in migd/guest/stub.py): one that has not come back by
then is gone, or stopped."""

_LOOKS = 30


class Returns:
    """Guests paused or incoming from before this daemon was started, and hand-overs of its predecessor."""

    def __init__(
        self,
        guests: GuestRegistry,
        departures: Departures,
        departed: Journal,
        arrived: Journal,
        worker: Worker,
        limits: Limits,
        observer: Observer,
    ) -> None:
        """``departed`` and ``arrived`` are the journals of either role."""
        self._guests = guests
        self._departures = departures
        self._departed = departed
        self._arrived = arrived
        self._worker = worker
        self._limits = limits
        self._observer = observer
        self._revived: dict[str, HandOver] = {}
        self._deciding: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def receive(self, guest: HostedGuest) -> None:
        """A guest has attached again, with its RAM. Never raises a MigdError."""
        try:
            if guest.state is GuestState.INCOMING:
                await self._incoming(guest)
            elif guest.state is GuestState.RUNNING:
                await self._running(guest)
            elif self._arrived.last(guest.migration) is not None:
                await self._paused_here(guest)
            else:
                await self._paused(guest)
        except MigdError as error:
            log.error("guest %s: %s", guest.name, error)  # noqa: TRY400  # the reason is the message

    async def _incoming(self, guest: HostedGuest) -> None:
        last = self._arrived.last(guest.migration)
        match incoming_at_destination(last.mark if last is not None else None):
            case Incoming.START:
                await guest.start()
                log.warning("guest %s: started, as the journal says", guest.name)
            case Incoming.KEEP:
                log.error("guest %s is not started: the verdict on it was bad", guest.name)
            case Incoming.ABORT:
                detail = "the destination daemon was restarted before GO"
                record = Record(migration=guest.migration, mark=Mark.ABORTED, guest=guest.name, detail=detail)
                try:
                    self._arrived.append(record)
                except ResourceError as error:  # GO is answered the same without it
                    log.warning("guest %s: %s", guest.name, error)
                await guest.discard()

    async def _running(self, guest: HostedGuest) -> None:
        """It may have arrived here just before the restart: then its verdict is still to come.

        It waits from the start, so that it cannot leave while the journal is read.
        """
        guest.await_verdict()
        last = await self._worker.run(self._arrived.newest_of, guest.name)
        if awaits_verdict(last.mark if last is not None else None):
            log.info("guest %s: the verdict on its arrival is still to come", guest.name)
        else:
            guest.judged()

    async def _paused_here(self, guest: HostedGuest) -> None:
        """Where it has run, for the migration that it came by."""
        done = await (await self.revive(guest.migration)).found_paused()
        log.error("guest %s was paused by a bad verdict (%s): %s", guest.name, guest.migration, done)

    async def _paused(self, guest: HostedGuest) -> None:
        """Where it was to leave from (G1, G3, G4)."""
        # Perhaps only its connection was lost: the session may be writing GO just now (G2).
        await self._departures.settled(guest.migration)
        async with self._lock(guest.migration):
            log.warning("guest %s: %s", guest.name, await self._decide(guest, None))

    async def _decide_alone(self, guest: HostedGuest, keeper: Keeper | None) -> str:
        """What the journal says of a paused guest is done, or what its destination does."""
        last = self._departed.last(guest.migration)
        match paused_at_source(last.mark if last is not None else None):
            case Paused.RESUME:
                if keeper is Keeper.DESTINATION:
                    raise Refused(f"{keeper.option} is refused: guest {guest.name} has not left, it is ours")
                await guest.resume()
                return "resumed, it will not run at the destination"
            case Paused.LET_GO:
                if keeper is Keeper.SOURCE:
                    raise Refused(
                        f"{keeper.option} is refused: guest {guest.name} was let go of, and ends here"
                    )
                await guest.release()
                return "it had been let go of, and ends here"
            case Paused.ASK | Paused.KEEP:
                assert last is not None
                log.warning("guest %s: GO had been sent to %s, asking it", guest.name, last.peer)
                peer = self._departures.peer(last.peer, last.migration)
                return await Resolution(last, guest, peer, self._departed, self._worker).run(keeper)

    async def _decide(self, guest: HostedGuest, keeper: Keeper | None) -> str:
        """The same, and a session that did not know hears of it: its guest had only lost its connection."""
        migration = guest.migration
        try:
            return await self._decide_alone(guest, keeper)
        finally:
            last = self._departed.last(migration)
            if last is not None and last.mark in (Mark.ABORTED, Mark.RELEASED):
                left = Keeper.SOURCE if last.mark is Mark.ABORTED else Keeper.DESTINATION
                self._departures.overtaken(migration, left, last.detail)

    def _lock(self, migration: str) -> asyncio.Lock:
        """Of those who decide about a guest here: two of them might decide differently."""
        return self._deciding.setdefault(migration, asyncio.Lock())

    # -- at the source ------------------------------------------------------------------------------

    async def resolve(self, target: str, keeper: Keeper | None = None) -> str:
        """Decide about a guest that was left paused: what was decided.

        OutcomeUnknown, VerificationError or Refused with what is true if it stays as it is.
        """
        guest = self.guest_of(target)
        if guest is None:
            guest = self._guests.get(target)
        migration = guest.migration
        if migration and self._departures.acts(migration):
            raise MigdError(f"{target}: nothing to resolve yet, its migration still goes on")
        async with self._lock(migration):
            if guest.state is not GuestState.PAUSED or guest.migration != migration:
                raise MigdError(f"{target}: nothing to resolve, the guest is {guest.state}")
            return await self._decide(guest, keeper)

    def guest_of(self, target: str) -> HostedGuest | None:
        """By its name, or by the migration that it is paused for."""
        for guest in self._guests.guests.values():
            if guest.migration and is_id_of(target, guest.migration):
                return guest
        return self._guests.guests.get(target)

    # -- at the destination -------------------------------------------------------------------------

    async def revive(self, migration: str) -> HandOver:
        """The hand-over of a guest that was started here before this daemon was, always the same one.

        GuestError while its outcome hangs on a guest that has not come back.
        """
        last = self._arrived.last(migration)
        if last is None:
            raise GuestError(f"migration {migration} is not known here")
        guest = self._came_back(last)
        if guest is None and last.mark is Mark.STARTED:
            raise GuestError(f"STARTED is in the journal of {migration}, but its guest has not come back")
        return self._revive(last, guest or AbsentGuest(last.guest))

    def bereaved(self, migration: str) -> HandOver | None:
        """The hand-over of a guest that was started here and has not come back; else None."""
        last = self._arrived.last(migration)
        if last is None or last.mark is not Mark.STARTED or self._came_back(last) is not None:
            return None
        return self._revive(last, AbsentGuest(last.guest))

    async def comes_back(self, last: Record) -> bool:
        """Whether a guest attaches within ``COMES_BACK_S`` that may only have lost its connection."""
        for _ in range(_LOOKS):
            if self._came_back(last) is not None:
                return True
            await asyncio.sleep(COMES_BACK_S / _LOOKS)
        return False

    def _revive(self, last: Record, guest: LoadedGuest) -> HandOver:
        found = self._revived.get(last.migration)
        if found is None or (found.gone and not guest.gone):
            passage = Passage(last.migration, last.guest, "in", "")
            progress = Progress(_REVIVED.get(last.mark, DestinationState.ABORTED), DESTINATION_TRANSITIONS)
            found = self._revived[last.migration] = HandOver(
                passage, guest, progress, self._arrived, self._worker, self._limits, self._observer, last
            )
        return found

    def _came_back(self, last: Record) -> HostedGuest | None:
        """The guest itself, not one that has its name by now."""
        guest = self._guests.guests.get(last.guest)
        if guest is None or guest.gone:
            return None
        runs = guest.state is GuestState.RUNNING and last.mark is not Mark.CONDEMNED
        return guest if runs or guest.migration == last.migration else None
