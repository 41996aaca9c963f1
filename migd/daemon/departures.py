"""Departures: the migrations that leave from this daemon, from the request to the result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine

from migd.config import Config
from migd.control import commands
from migd.control.commands import Reply
from migd.daemon import requested
from migd.daemon.targets import newest
from migd.errors import MigdError, Refused, VerificationError
from migd.guest.control import GuestState
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.migration.ports import Bandwidth, Connector
from migd.migration.state import SourceState
from migd.migration.stats import Result
from migd.sizes import UNLIMITED
from migd.source.attempt import Attempt, SourceServices
from migd.source.peer import DestinationPeer
from migd.source.session import SourceSession
from migd.transport.bandwidth import MigrationBandwidth, SharedBandwidth
from migd.transport.tcp import parse_address
from migd.wire.protocol import Keeper

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often whoever follows a migration hears of progress."""

_REMEMBERED = 64
"""Migrations that are over and still shown in `migd status`."""


class Departures:
    """All outgoing migrations, by id; each runs as a task of the daemon, whoever watches it."""

    def __init__(
        self,
        config: Config,
        guests: GuestRegistry,
        services: SourceServices,
        connector: Callable[[str, Bandwidth | None], Connector],
    ) -> None:
        """``connector`` gives the way to a destination's ``HOST:PORT``; ConfigError for a bad one."""
        self._config = config
        self._guests = guests
        self._services = services
        self._connector = connector
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[str, asyncio.Task[Result]] = {}
        self._leaving: dict[str, HostedGuest] = {}
        self._bandwidths: dict[str, MigrationBandwidth] = {}
        self.bandwidth = SharedBandwidth(config.daemon.max_bandwidth, services.clock)
        """Of all of them together."""
        self.sessions: dict[str, SourceSession] = {}

    def own(self, tasks: asyncio.TaskGroup) -> None:
        """The group that the migrations run in, before the first of them."""
        self._tasks = tasks

    async def migrate(self, request: commands.Migrate) -> AsyncIterator[Reply]:
        """Begin, and unless it is to be left alone follow it to its result."""
        session = self._new_session(request)
        task = self._launch(session, session.run())
        yield commands.Accepted(migration=session.migration)
        if not request.detach:
            async for reply in self._watch(session, task):
                yield reply

    async def follow(self, session: SourceSession) -> AsyncIterator[Reply]:
        """A migration from wherever it is to its result; at once if it is over, or unknown."""
        running = self._running.get(session.migration)
        if running is None:
            yield commands.Finished(result=session.result)
            return
        async for reply in self._watch(session, running):
            yield reply

    def cancel(self, target: str) -> str:
        """The id of the migration that will end. MigdError if there is none, or it is too late."""
        session = self.session_of(target)
        if not session.cancel():
            raise MigdError(f"{target}: too late to cancel, the migration is {session.state}")
        return session.migration

    def limit(self, target: str, bytes_s: int) -> str:
        """Give a migration that goes on another bandwidth, 0 for any: its id. MigdError if there is none."""
        migration = self.session_of(target).migration
        self._bandwidths[migration].change(bytes_s)
        return migration

    def limit_of(self, migration: str) -> int:
        """The bandwidth of a migration in bytes per second; 0 for any, and for one that is over."""
        found = self._bandwidths.get(migration)
        return found.limit_bytes_s if found is not None else UNLIMITED

    async def resolve(self, target: str, keeper: Keeper | None = None) -> AsyncIterator[Reply]:
        """Ask the destination about an outcome unknown to a session here; nothing if no session waits.

        ``keeper`` decides where it does not answer. Refused, with what is true, where it decides otherwise.
        """
        unknown = [found for found in self.sessions.values() if found.state is SourceState.UNKNOWN]
        session = newest(target, [found for found in unknown if not self._came_back(found)])
        if session is None:
            return
        if self.acts(session.migration):
            raise MigdError(f"{target}: it is being resolved already")
        last: Reply | None = None
        async for reply in self._watch(session, self._launch(session, session.resolve())):
            if last is not None:
                yield last
            last = reply
        assert last is not None
        if keeper is not None:
            last = await self._decided(session, keeper) or last
        yield last

    async def _decided(self, session: SourceSession, keeper: Keeper) -> Reply | None:
        """What the operator's word has done; None if the destination's answer has done the same."""
        if session.state is SourceState.UNKNOWN:
            result = await self._launch(session, session.force(keeper))
            if session.ended:
                return commands.Done(text=result.error, migration=session.migration)
            return commands.Failed(error=result.error, exit_code=result.exit_code)
        result = session.result
        here = result.outcome != "completed"
        if result.exit_code == VerificationError.exit_code or here is (keeper is Keeper.SOURCE):
            return None
        true = result.error or f"guest {result.guest} runs at {result.peer}"
        raise Refused(f"{keeper.option} is refused, the destination has answered: {true}")

    def overtaken(self, migration: str, keeper: Keeper, said: str) -> None:
        """What a session here did not know was decided without it, when its guest came back."""
        session = self.sessions.get(migration)
        if session is not None and session.state is SourceState.UNKNOWN:
            self._launch(session, session.overtaken(keeper, said))

    def _came_back(self, session: SourceSession) -> bool:
        """Its guest, over another connection: what becomes of it is decided by ``Returns``."""
        leaving = self._leaving[session.migration]
        here = self._guests.guests.get(leaving.name)
        return here is not None and here is not leaving and here.migration == session.migration

    def acts(self, migration: str) -> bool:
        """Whether a session of this migration does something at present."""
        return migration in self._running

    async def settled(self, migration: str) -> None:
        """Returns when no session of this migration acts any more."""
        running = self._running.get(migration)
        if running is not None:
            await asyncio.wait({running})

    async def end(self) -> None:
        """Before GO: cancelled, and the guest runs on. After GO: the hand-over is brought to its end."""
        for session in self.sessions.values():
            session.cancel()
            session.leave()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self._services.limits.go_s)

    def peer(self, address: str, migration: str, bandwidth: Bandwidth | None = None) -> DestinationPeer:
        """The destination daemon at ``HOST:PORT``, not connected yet. ConfigError for a bad address.

        Without a ``bandwidth``, for a few messages, nothing limits it.
        """
        connector = self._connector(address, bandwidth)
        if self._config.migration.insecure_plaintext:
            log.warning("%s: guest memory goes to %s in plaintext, unauthenticated", migration, address)
        return DestinationPeer(connector, migration, self._services.clock, self._services.limits)

    # -- one migration ------------------------------------------------------------------------------

    def _new_session(self, request: commands.Migrate) -> SourceSession:
        guest = self._guests.get(request.guest)
        if guest.state is not GuestState.RUNNING:
            raise Refused(f"guest {guest.name} is {guest.state}, it cannot leave: see `migd status`")
        if guest.name in self._busy():
            raise Refused(f"guest {guest.name} is in a migration already: see `migd status`")
        migration = self._services.entropy.token(16).hex()
        options = requested.options(self._config.migration, request)
        parse_address(request.to)  # before a bandwidth is opened, which has to be closed again
        bandwidth = self.bandwidth.open(requested.max_bandwidth_bytes_s(self._config.migration, request))
        peer = self.peer(request.to, migration, bandwidth)
        attempt = Attempt(migration, guest, guest.ledger, peer, options, self._services)
        session = SourceSession(attempt)
        self._bandwidths[migration] = bandwidth
        self.sessions[migration] = session
        self._leaving[migration] = guest
        guest.pin(migration)
        return session

    def _launch(self, session: SourceSession, work: Coroutine[None, None, Result]) -> asyncio.Task[Result]:
        assert self._tasks is not None
        task = self._tasks.create_task(work)
        self._running[session.migration] = task
        task.add_done_callback(lambda _: self._over(session))
        return task

    def _over(self, session: SourceSession) -> None:
        self._running.pop(session.migration, None)
        if session.ended:  # else its outcome is unknown, and a late verification may still come
            self._leaving.pop(session.migration).unpin(session.migration)
            self._bandwidths.pop(session.migration).close()
        ended = [migration for migration, session in self.sessions.items() if session.ended]
        for migration in ended[:-_REMEMBERED]:
            del self.sessions[migration]

    async def _watch(self, session: SourceSession, task: asyncio.Task[Result]) -> AsyncIterator[Reply]:
        """Events of a migration, then its result. Whoever stops listening does not stop it."""
        shown = 0
        while not task.done():
            await asyncio.wait({task}, timeout=POLL_S)
            done, total = session.balance_pages()
            yield commands.Moving(state=session.state, done_pages=done, total_pages=total)
            ended = session.iterations_ended()
            for iteration in ended[shown:]:
                yield commands.Iterated(iteration=iteration)
            shown = len(ended)
        yield commands.Finished(result=task.result())

    def _busy(self) -> set[str]:
        return {session.passage.guest for session in self.sessions.values() if not session.ended}

    def session_of(self, target: str) -> SourceSession:
        """The one that goes on."""
        session = newest(target, [session for session in self.sessions.values() if not session.ended])
        if session is None:
            raise MigdError(f"{target!r} is in no migration that leaves from here")
        return session
