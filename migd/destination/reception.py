"""Reception: routes each new connection by its first frame to a session, a data stream, or a hand-over."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

from migd.destination.handover import HandOver
from migd.destination.session import DestinationServices, DestinationSession
from migd.errors import GuestError, MigdError, PeerError, ProtocolError, Refused, ResourceError
from migd.migration.decision import Asked, go_at_destination
from migd.migration.journal import Mark, Record
from migd.migration.ports import Conversation, Link
from migd.migration.state import DestinationState
from migd.tasks import Runner, guarded
from migd.wire import handshake, messages
from migd.wire.framing import Frame
from migd.wire.protocol import FrameType

log = logging.getLogger(__name__)

_REMEMBERED = 64
"""Sessions that are over and still shown in `status`, and still answer GO from memory."""

_HELLO_SHARE = 2
"""Half of the time that a source waits for the answer to HELLO it may wait for a name to be free."""


class Reception:
    """All incoming migrations of a daemon, by id."""

    def __init__(
        self,
        services: DestinationServices,
        converse: Callable[[Link, str], Conversation],
        revive: Callable[[str], Awaitable[HandOver]],
        about: Callable[[messages.Probe], messages.About],
    ) -> None:
        """``revive`` rebuilds the hand-over of a migration whose guest was started, after a restart.

        ``about`` answers PROBE; ResourceError if this host does not tell how much memory it has.
        """
        self._services = services
        self._converse = converse
        self._revive = revive
        self._about = about
        self.sessions: dict[str, DestinationSession] = {}

    async def serve(self, link: Link, frame: Frame) -> None:
        """One connection from its first frame to its end. Never raises a MigdError."""
        try:
            match frame.type:
                case FrameType.HELLO:
                    await self._open(link, frame)
                case FrameType.STREAM:
                    await self._join(link, frame)
                case FrameType.GO | FrameType.RESOLVE:
                    await self._ask(link, frame)
                case FrameType.PROBE:
                    await self._tell(link, frame)
                case _:
                    raise ProtocolError(f"a connection cannot begin with {frame.type.name}")
        except MigdError as error:
            log.warning("a connection was refused: %s", error)

    async def _open(self, link: Link, frame: Frame) -> None:
        try:
            hello = handshake.read_hello(frame)
            await self._let_go_of(hello.guest)
            if hello.migration in self.sessions or self._services.journal.last(hello.migration) is not None:
                raise Refused(f"migration {hello.migration} was here before")
        except (Refused, ProtocolError) as error:
            await link.send(messages.Refuse(migration=messages.NO_MIGRATION, reason=str(error)[:1000]))
            raise
        session = DestinationSession(hello, self._converse(link, hello.migration), self._services)
        self.sessions[hello.migration] = session
        await session.run()
        self._forget_oldest()

    async def _let_go_of(self, guest: str) -> None:
        """A migration right after one that was cancelled: this side may not have heard of that yet.

        Whether the name is free when the wait is over, ``GuestHost.create`` will say.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._services.limits.hello_s / _HELLO_SHARE):
                while earlier := next(self._undecided(guest), None):
                    await earlier.over.wait()

    def _undecided(self, guest: str) -> Iterator[DestinationSession]:
        for session in self.sessions.values():
            if session.hello.guest == guest and session.undecided and not session.over.is_set():
                yield session

    def _forget_oldest(self) -> None:
        over = [id for id, session in self.sessions.items() if session.over.is_set()]
        for id in over[:-_REMEMBERED]:
            del self.sessions[id]

    async def _tell(self, link: Link, frame: Frame) -> None:
        """Anybody may ask: nothing here changes, and one answer is all there is."""
        question = frame.message()
        assert isinstance(question, messages.Probe)
        try:
            answer: messages.Message = self._about(question)
        except ResourceError as error:
            answer = messages.Refuse(migration=question.migration, reason=str(error)[:1000])
        await link.send(answer)

    async def _join(self, link: Link, frame: Frame) -> None:
        stream = frame.message()
        assert isinstance(stream, messages.Stream)
        session = self.sessions.get(stream.migration)
        if session is None or not hmac.compare_digest(session.token, stream.token):
            raise ProtocolError("a data stream with an unknown migration or a wrong token")
        session.join(stream, link)
        await session.over.wait()

    async def _ask(self, link: Link, frame: Frame) -> None:
        """GO or RESOLVE first: the source lost its connection, or one of us was restarted."""
        question = frame.message()
        assert isinstance(question, messages.Go | messages.Resolve)
        migration = question.migration
        conversation = self._converse(link, migration)
        handover = await self.handover(migration)
        if handover is None:
            await conversation.send(await self._never_heard_of(migration))
            return
        runner = Runner(conversation.run())
        try:
            await conversation.send(await handover.answer(question))
            await guarded(handover.serve(conversation), runner.failure())
        except PeerError as error:
            log.info("%s: %s", migration, error)
        finally:
            await runner.stop()

    async def handover(self, migration: str) -> HandOver | None:
        """The one that decides about this migration; None if its guest was never started here.

        ProtocolError before READY. GuestError if the guest has not come back after a restart.
        """
        session = self.sessions.get(migration)
        if session is None:
            return await self._revived(migration)
        if session.handover is None and session.state is not DestinationState.ABORTED:
            raise ProtocolError(f"{migration} was asked about before READY")
        handover = session.handover
        if handover is None or not handover.gone or handover.mark is Mark.READY:
            return handover
        with suppress(GuestError):  # its process may have come back over another connection
            return await self._revived(migration)
        return handover

    async def _revived(self, migration: str) -> HandOver | None:
        last = self._services.journal.last(migration)
        if go_at_destination(last.mark if last is not None else None) is Asked.STARTED:
            return await self._revive(migration)
        return None

    async def _never_heard_of(self, migration: str) -> messages.Aborted:
        """Durable before it is said: a late GO can never start it (G3)."""
        last = self._services.journal.last(migration)
        reason = last.detail if last is not None and last.mark is Mark.ABORTED else ""
        if not reason:
            reason = "the destination does not know this migration"
            record = Record(migration=migration, mark=Mark.ABORTED, detail=reason)
            await self._services.worker.run(self._services.journal.append, record)
        return messages.Aborted(migration=migration, reason=reason)
