"""Resolution: what becomes of a guest that is paused here with GO in the journal, where no session decides.

The destination is asked first, and what it answers is done. Only where it cannot know, cannot be reached, or
the verdict on the guest was bad, the operator's word counts: the side that is to keep the guest.
"""

from __future__ import annotations

import logging

import msgspec

from migd.errors import MigdError, OutcomeUnknown, PeerError, PeerLost, Refused, VerificationError
from migd.migration.decision import Paused, paused_at_source
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import SourceGuest, Worker
from migd.source.handover import choices
from migd.source.peer import DestinationPeer, NotStarted
from migd.wire import messages
from migd.wire.messages import Aborted, Started
from migd.wire.protocol import Keeper

log = logging.getLogger(__name__)

_UNVERIFIED = "tracking not verified: the source daemon was restarted after GO"
_FORCED = "forced by the operator"


class Resolution:
    """Asks the destination, once for each ``run``, and does what it says; until then the guest is paused."""

    def __init__(
        self, last: Record, guest: SourceGuest, peer: DestinationPeer, journal: Journal, worker: Worker
    ) -> None:
        """``last``: of the source's journal."""
        self.migration = last.migration
        self._last = last
        self._guest = guest
        self._peer = peer
        self._journal = journal
        self._worker = worker

    async def run(self, keeper: Keeper | None = None) -> str:
        """What was decided, for people.

        OutcomeUnknown if the destination does not answer, VerificationError if the operator has to decide and
        did not; Refused, with what is true, if that is not what the operator wanted. PeerAborted if the
        destination cannot do it.
        """
        try:
            if paused_at_source(self._last.mark) is Paused.KEEP:
                return await self._condemned(keeper)
            return await self._unknown(keeper)
        finally:
            await self._peer.close()

    async def force(self, keeper: Keeper, unknown: MigdError) -> str:
        """The operator's word where GO stayed without an answer; ``unknown`` says why it did.

        Errors as of ``run``; the guest stays paused then, unless the destination has answered meanwhile.
        """
        if keeper is Keeper.DESTINATION and isinstance(unknown, NotStarted):
            raise Refused(f"--force-dest would lose the guest, it is gone at {self._peer.address}: {unknown}")
        if keeper is Keeper.SOURCE:
            try:
                return await self._obey(await self._peer.resolve(keeper, _FORCED), keeper)
            except PeerLost as error:
                log.warning("%s: the destination is not asked: %s", self.migration, error)
        return await self._alone(keeper)

    # -- GO without an answer -----------------------------------------------------------------------

    async def _unknown(self, keeper: Keeper | None) -> str:
        try:
            answer = await self._peer.go()
        except OutcomeUnknown as error:
            if keeper is None:
                raise
            return await self.force(keeper, error)
        return await self._obey(answer, keeper)

    async def _obey(self, answer: Started | Aborted, keeper: Keeper | None) -> str:
        """Do what is true; Refused, with that, if the operator wanted something else."""
        here = isinstance(answer, Aborted)
        done = await self._take_back(answer) if isinstance(answer, Aborted) else await self._let_go()
        if keeper is not None and here is not (keeper is Keeper.SOURCE):
            raise Refused(f"{keeper.option} is refused: {done}")
        return done

    async def _take_back(self, answer: Aborted) -> str:
        await self._mark(Mark.ABORTED, answer.reason)
        await self._guest.resume()
        return f"the destination aborted ({answer.reason}): the guest runs on here"

    async def _let_go(self) -> str:
        """It runs there. The digests of what was sent died with the old daemon, and the verdict says so.

        That daemon may have said that the verdict is bad, without having been able to write it down. So
        what was not verified before GO is let go of only once the destination has answered to the contrary.
        """
        detail = self._last.detail or _UNVERIFIED
        verdict = messages.Verdict(migration=self.migration, ok=True, detail=detail)
        try:
            await self._peer.deliver(verdict)
        except Refused as error:
            await self._mark(Mark.CONDEMNED, str(error))
            raise VerificationError(f"{error}; {choices(self._guest.name)}") from error
        except PeerError as error:
            if not self._last.detail:
                raise OutcomeUnknown(
                    f"the guest was started at {self._peer.address}, which did not say whether it is "
                    f"condemned ({error}); it stays paused here: run `migd resolve`"
                ) from error
            log.warning("%s: the verdict could not be delivered: %s", self.migration, error)
        return await self._release(detail)

    async def _release(self, detail: str) -> str:
        await self._guest.release()
        await self._mark(Mark.RELEASED, detail)
        return f"the guest runs at {self._peer.address}: released here ({detail})"

    async def _alone(self, keeper: Keeper) -> str:
        """Nobody contradicts. Durable first: a restart then goes on with it."""
        name, address = self._guest.name, self._peer.address
        if keeper is Keeper.SOURCE:
            await self._mark(Mark.ABORTED, f"{_FORCED}, {address} did not say what became of it")
            await self._guest.resume()
            return (
                f"{_FORCED}: guest {name} runs on here. Make sure that it does not run at {address}: there "
                f"would be two"
            )
        await self._mark(Mark.RELEASED, f"{_FORCED}, {address} did not say what became of it")
        await self._guest.release()
        return (
            f"{_FORCED}: guest {name} is let go of here. Make sure that it runs at {address}: there would be "
            f"none"
        )

    # -- a bad verdict ------------------------------------------------------------------------------

    async def _condemned(self, keeper: Keeper | None) -> str:
        name, why, address = self._guest.name, self._last.detail, self._peer.address
        try:
            answer = await self._settle(keeper)
        except Refused as error:
            raise Refused(f"{error}; here it stays paused: {choices(name)}") from error
        except (OutcomeUnknown, PeerLost) as error:
            if keeper is not None:
                return await self._alone(keeper)
            raise VerificationError(
                f"the verdict on guest {name} was bad ({why}), and {address} cannot be told to pause it "
                f"({error}). Here it stays paused: {choices(name)}"
            ) from error
        if isinstance(answer, Aborted):
            return await self._obey(answer, keeper)
        if keeper is Keeper.DESTINATION:
            return await self._release(f"{_FORCED}, although {why}")
        raise VerificationError(
            f"the verdict on guest {name} was bad ({why}): paused here and at {address}; {choices(name)}"
        )

    async def _settle(self, keeper: Keeper | None) -> Started | Aborted:
        """Tell the verdict again, unless the guest is to run on there; then the operator's word."""
        answer = await self._peer.go()
        if isinstance(answer, Started) and keeper is not Keeper.DESTINATION:
            bad = messages.Verdict(migration=self.migration, ok=False, detail=self._last.detail)
            answer = await self._peer.deliver(bad)
        if isinstance(answer, Started) and keeper is not None:
            answer = await self._peer.resolve(keeper, _FORCED)
        return answer

    async def _mark(self, mark: Mark, detail: str) -> None:
        record = msgspec.structs.replace(self._last, mark=mark, detail=detail[:1000])
        await self._worker.run(self._journal.append, record)
