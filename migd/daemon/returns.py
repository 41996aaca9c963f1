"""Returns: what becomes of guests that come back after a restart of their daemon. The journal decides."""

from __future__ import annotations

import logging

from migd.daemon.departures import Departures
from migd.daemon.targets import is_id_of
from migd.destination.handover import HandOver
from migd.errors import GuestError, MigdError
from migd.guest.control import GuestState
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Observer, Passage, Worker
from migd.migration.state import DESTINATION_TRANSITIONS, DestinationState, Progress
from migd.source.resolution import Resolution

log = logging.getLogger(__name__)


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

    async def receive(self, guest: HostedGuest) -> None:
        """A guest has attached again, paused or incoming. Never raises a MigdError."""
        try:
            if guest.state is GuestState.INCOMING:
                await self._incoming(guest)
            elif self._arrived.last(guest.migration) is not None:
                log.error("guest %s was paused by a bad verdict (%s)", guest.name, guest.migration)
            else:
                await self._paused(guest)
        except MigdError as error:
            log.error("guest %s: %s", guest.name, error)  # noqa: TRY400  # the reason is the message

    async def _incoming(self, guest: HostedGuest) -> None:
        """STARTED is durable: it runs. Anything less: GO had not come, so it never will (R13)."""
        last = self._arrived.last(guest.migration)
        if last is not None and last.mark is Mark.STARTED:
            await guest.start()
            log.warning("guest %s: started, as the journal says", guest.name)
            return
        detail = "the destination daemon was restarted before GO"
        self._arrived.append(
            Record(migration=guest.migration, mark=Mark.ABORTED, guest=guest.name, detail=detail)
        )
        await guest.discard()

    async def _paused(self, guest: HostedGuest) -> None:
        """No GO in the journal: it is ours and runs on (G1). GO: only the destination knows (G3)."""
        # Perhaps only its connection was lost: the session may be writing GO just now (G2).
        await self._departures.settled(guest.migration)
        last = self._departed.last(guest.migration)
        if last is None or last.mark is Mark.ABORTED:
            await guest.resume()
            log.warning("guest %s: resumed after a restart, GO had not been sent", guest.name)
            return
        log.warning("guest %s: GO had been sent to %s, asking it", guest.name, last.peer)
        await self._resolution(guest, last).run()

    async def resolve(self, target: str) -> str:
        """Ask the destination about a guest that is paused with GO in the journal: what was decided."""
        guest = self._guest_of(target)
        last = self._departed.last(guest.migration) if guest.migration else None
        if guest.state is not GuestState.PAUSED or last is None or last.mark is Mark.ABORTED:
            raise MigdError(f"{target}: nothing to resolve, the guest is {guest.state}")
        return await self._resolution(guest, last).run()

    def _guest_of(self, target: str) -> HostedGuest:
        """By its name, or by the migration that it is paused for. MigdError if there is none."""
        for guest in self._guests.guests.values():
            if guest.migration and is_id_of(target, guest.migration):
                return guest
        return self._guests.get(target)

    def _resolution(self, guest: HostedGuest, record: Record) -> Resolution:
        peer = self._departures.peer(record.peer, record.migration)
        return Resolution(record, guest, peer, self._departed, self._worker)

    async def revive(self, migration: str) -> HandOver:
        """The hand-over of a guest that was started here before this daemon was. GuestError if it is gone."""
        record = self._arrived.last(migration)
        guest = self._guests.guests.get(record.guest) if record is not None else None
        if guest is None:
            raise GuestError(f"STARTED is in the journal of {migration}, but its guest has not come back")
        progress = Progress(DestinationState.READY, DESTINATION_TRANSITIONS)
        passage = Passage(migration, guest.name, "in", "")
        return HandOver(passage, guest, progress, self._arrived, self._worker, self._limits, self._observer)
