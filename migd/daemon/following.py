"""Following: a migration watched by whoever asks, from wherever it is to its end, or found in the past."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from migd.control import commands
from migd.control.commands import Remembered, Reply
from migd.daemon.departures import POLL_S, Departures
from migd.daemon.history import History
from migd.daemon.targets import newest, refuse_ambiguous
from migd.destination.reception import Reception
from migd.destination.session import DestinationSession
from migd.errors import MigdError
from migd.migration.ports import Worker
from migd.migration.stats import Result
from migd.source.session import SourceSession


class Following:
    """Both directions, now and in the past. Whoever stops listening stops nothing."""

    def __init__(
        self, departures: Departures, reception: Reception, history: History, worker: Worker
    ) -> None:
        self._departures = departures
        self._reception = reception
        self._history = history
        self._worker = worker

    async def attach(self, target: str) -> AsyncIterator[Reply]:
        """Events of the migration and its result; at once if it is over. MigdError if there is none."""
        session = newest(target, self._going_on())
        match session:
            case SourceSession():
                async for reply in self._departures.follow(session):
                    yield reply
            case DestinationSession():
                async for reply in _watch(session):
                    yield reply
            case None:
                yield _last_word(await self._last(target))

    async def past(self, request: commands.Past) -> list[Remembered]:
        """Migrations that are over, the newest last."""
        if request.target:
            found = await self._worker.run(self._history.about, request.target)
            return found[-request.limit :]
        return await self._worker.run(self._history.newest, request.limit)

    def _going_on(self) -> list[SourceSession | DestinationSession]:
        """Those that leave last: a guest that has just arrived may be on its way already.

        One that is over goes on until it is in the history.
        """
        arriving = [session for session in self._reception.sessions.values() if not session.over.is_set()]
        leaving = [
            session
            for session in self._departures.sessions.values()
            if not session.ended or self._departures.acts(session.migration)
        ]
        return [*arriving, *leaving]

    async def _last(self, target: str) -> Remembered:
        found = await self._worker.run(self._history.about, target)
        if not found:
            raise MigdError(f"{target!r} is in no migration here, and none is remembered: see `migd history`")
        refuse_ambiguous(target, (entry.record.migration for entry in found if entry.record.guest != target))
        return found[-1]


def _last_word(entry: Remembered) -> Reply:
    if isinstance(entry.record, Result):
        return commands.Finished(result=entry.record)
    return commands.Arrived(record=entry.record)


async def _watch(session: DestinationSession) -> AsyncIterator[Reply]:
    """Until the guest runs here for good, or never will: its own check may go on."""
    while not (session.ended or session.over.is_set()):
        done, total = session.balance_pages()
        yield commands.Moving(state=session.state, done_pages=done, total_pages=total)
        try:
            async with asyncio.timeout(POLL_S):
                await session.over.wait()
        except TimeoutError:
            continue
    yield commands.Arrived(record=session.record)
