"""Resolution: what becomes of a guest that a restarted source daemon finds paused with GO in the journal."""

from __future__ import annotations

import logging

import msgspec

from migd.errors import PeerError
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import SourceGuest, Worker
from migd.source.peer import DestinationPeer
from migd.wire import messages
from migd.wire.messages import Aborted

log = logging.getLogger(__name__)

_UNVERIFIED = "tracking not verified: the source daemon was restarted after GO"


class Resolution:
    """Asks the destination, once for each ``run``, and does what it says; until then the guest is paused."""

    def __init__(
        self, go: Record, guest: SourceGuest, peer: DestinationPeer, journal: Journal, worker: Worker
    ) -> None:
        self.migration = go.migration
        self._go = go
        self._guest = guest
        self._peer = peer
        self._journal = journal
        self._worker = worker

    async def run(self) -> str:
        """What was decided, for people. OutcomeUnknown if the destination does not answer."""
        try:
            answer = await self._peer.go()
            if isinstance(answer, Aborted):
                return await self._take_back(answer)
            return await self._let_go()
        finally:
            await self._peer.close()

    async def _take_back(self, answer: Aborted) -> str:
        await self._mark(Mark.ABORTED, answer.reason)
        await self._guest.resume()
        return f"the destination aborted ({answer.reason}): the guest runs on here"

    async def _let_go(self) -> str:
        """It runs there. The digests of what was sent died with the old daemon, and the verdict says so."""
        try:
            await self._peer.control.send(
                messages.Verdict(migration=self.migration, ok=True, detail=_UNVERIFIED)
            )
        except PeerError as error:
            log.warning("%s: the verdict could not be delivered: %s", self.migration, error)
        await self._guest.release()
        await self._mark(Mark.RELEASED, _UNVERIFIED)
        return f"the guest runs at {self._peer.address}: released here ({_UNVERIFIED})"

    async def _mark(self, mark: Mark, detail: str) -> None:
        record = msgspec.structs.replace(self._go, mark=mark, detail=detail)
        await self._worker.run(self._journal.append, record)
