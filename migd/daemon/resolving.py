"""Resolving: `migd resolve`, for a guest that left or arrived here and whose outcome nobody else decides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress

from migd.control import commands
from migd.control.commands import Reply
from migd.daemon.departures import Departures
from migd.daemon.returns import Returns
from migd.daemon.targets import is_id_of, refuse_ambiguous
from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.errors import GuestError, MigdError, OutcomeUnknown, Refused, VerificationError
from migd.guest.control import GuestState
from migd.migration.journal import Journal, Mark, Record
from migd.wire.messages import Aborted
from migd.wire.protocol import Keeper

_WORD = "decided by the operator"


class Resolving:
    """Finds who has the guest: a session that does not know, a guest that was left paused, or an arrival."""

    def __init__(
        self, departures: Departures, returns: Returns, reception: Reception, arrived: Journal
    ) -> None:
        self._departures = departures
        self._returns = returns
        self._reception = reception
        self._arrived = arrived

    async def resolve(self, target: str, keeper: Keeper | None) -> AsyncIterator[Reply]:
        """What was decided. An error, with what is true and what may be done, if the guest stays as it is."""
        known = False
        async for reply in self._departures.resolve(target, keeper):
            known = True
            yield reply
        if known:
            return
        last = self._arrival(target)
        if last is None:
            yield commands.Done(text=await self._returns.resolve(target, keeper))
        else:
            text = await self._decide(last, await self._handover(last), keeper)
            yield commands.Done(text=text, migration=last.migration)

    # -- a guest that arrived here ------------------------------------------------------------------

    def _arrival(self, target: str) -> Record | None:
        """The newest record about a guest that arrived here and is paused, or was lost."""
        guest = self._returns.guest_of(target)
        if guest is not None:
            last = self._arrived.last(guest.migration) if guest.migration else None
            return last if guest.state is GuestState.PAUSED else None
        last = self._arrived.newest_of(target)
        if last is None:
            found = [migration for migration in self._arrived.migrations() if is_id_of(target, migration)]
            refuse_ambiguous(target, found)
            last = self._arrived.last(found[0]) if found else None
        return last if last is not None and last.mark in (Mark.STARTED, Mark.CONDEMNED) else None

    async def _handover(self, last: Record) -> HandOver:
        handover: HandOver | None = None
        with suppress(GuestError):  # it has not come back after a restart
            handover = await self._reception.handover(last.migration)
        handover = handover or self._returns.bereaved(last.migration)
        if handover is None:
            raise MigdError(f"guest {last.guest} was never started here: nothing to resolve")
        return handover

    async def _decide(self, last: Record, handover: HandOver, keeper: Keeper | None) -> str:
        name = last.guest
        if keeper is None:
            raise _undecided(last)
        if keeper is Keeper.SOURCE and last.mark is Mark.STARTED and await self._returns.comes_back(last):
            raise Refused(f"{keeper.option} is refused: guest {name} has come back, and runs here")
        if isinstance(await handover.resolve(keeper, _WORD), Aborted):
            return f"guest {name} is given up here; `migd resolve {name}` at its source has it run on there"
        return (
            f"guest {name} runs on here, with pages that may be wrong; `migd resolve {name} --force-dest` at "
            f"its source lets go of the copy there"
        )


def _undecided(last: Record) -> MigdError:
    name = last.guest
    source = f"`migd resolve {name} --force-source` gives it up here, so that its source has it run on there"
    if last.mark is Mark.STARTED:
        return OutcomeUnknown(
            f"guest {name} was started here and its process is gone. {source}; make sure first that no "
            f"process of it is left"
        )
    return VerificationError(
        f"guest {name} is paused here, its source found untracked writes ({last.detail}). "
        f"`migd resolve {name} --force-dest` has it run on here, with pages that may be wrong; {source}"
    )
