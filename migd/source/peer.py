"""DestinationPeer: the destination daemon as a source session sees it, from HELLO to the last message."""

from __future__ import annotations

from migd.errors import OutcomeUnknown, PeerAborted, PeerError, PeerLost, ProtocolError, Refused
from migd.limits import Limits
from migd.migration.ports import Bandwidth, Clock, Connector, Conversation, Link, M
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import frame_digest
from migd.tasks import Runner, guarded
from migd.wire import messages
from migd.wire.messages import Aborted, Started, Verdict
from migd.wire.protocol import STATE_CHUNK_BYTES, Keeper

_RETRY_S = 0.25


class NotStarted(OutcomeUnknown):
    """The destination answers, and has lost the guest that it was about to start."""


class DestinationPeer:
    """One control conversation and N data links; owns them all until ``close``."""

    def __init__(self, connector: Connector, migration: str, clock: Clock, limits: Limits) -> None:
        self._connector = connector
        self._migration = migration
        self._clock = clock
        self._limits = limits
        self._control: Conversation | None = None
        self._runner: Runner | None = None
        self.links: list[Link] = []

    @property
    def address(self) -> str:
        return self._connector.address

    @property
    def bandwidth(self) -> Bandwidth:
        """For all that goes there."""
        return self._connector.bandwidth

    @property
    def control(self) -> Conversation:
        if self._control is None:
            raise PeerLost(f"{self.address}: not connected")
        return self._control

    async def connect(self) -> None:
        """Open the control connection and keep reading it. PeerLost if nothing answers."""
        self._control = await self._connector.converse(self._migration)
        self._runner = Runner(self._control.run())

    async def watch(self) -> None:
        """Ends only by raising: the peer was lost, refused, aborted, broke the protocol, or stalls."""
        await guarded(self._watch_progress(), self._watch_control())

    async def _watch_control(self) -> None:
        if self._runner is not None:
            await self._runner.failure()

    async def _watch_progress(self) -> None:
        """PeerLost when bytes are due at the destination and none was applied for ``progress_s``."""
        applied, since = 0, self._clock.now()
        while True:
            await self._clock.sleep(self._limits.ping_s)
            now = self.control.peer_applied_bytes
            if now != applied or now >= self._sent_bytes():
                applied, since = now, self._clock.now()
            elif self._clock.now() - since > self._limits.progress_s:
                raise PeerLost(f"{self.address}: nothing was applied for {self._limits.progress_s:g} s")

    def _sent_bytes(self) -> int:
        """Of guest RAM, in records of any kind, on all streams."""
        records = (link.sent for link in self.links)
        return sum(sent.pages + sent.zero + sent.free for sent in records) * PAGE_BYTES

    async def open(self, hello: messages.Hello) -> messages.Accept:
        """Handshake, then all data streams: what may be used. Refused with the reason; PeerLost in time."""
        await self.control.send(hello)
        accept = await self.control.expect(messages.Accept, self._limits.hello_s)
        if not hello.min_version <= accept.version <= hello.max_version:
            raise ProtocolError(
                f"{self.address} accepted with version {accept.version}, which was not offered"
            )
        for index in range(hello.streams):
            link = await self._connector.connect()
            self.links.append(link)
            await link.send(messages.Stream(migration=self._migration, token=accept.token, index=index))
        await self.control.expect(messages.Begin, self._limits.begin_s)
        if not set(accept.features) <= set(hello.features):
            raise ProtocolError(f"{self.address} accepted features that were not offered")
        return accept

    async def expect(self, kind: type[M], timeout_s: float) -> M:
        """The next message, which must be a ``kind``; a lost peer is noticed at once."""
        return await guarded(self.control.expect(kind, timeout_s), self._watch_control())

    async def drained(self) -> None:
        """Returns when all that was sent is in the destination's RAM, and in no buffer on the way."""
        await guarded(self.control.applied(self._sent_bytes()), self._watch_control())

    async def send_state(self, state: bytes) -> messages.Finish:
        """All of the device state, in chunks; returns the FINISH that will announce it."""
        view = memoryview(state)
        chunk_bytes = int(min(STATE_CHUNK_BYTES, max(PAGE_BYTES, self.bandwidth.frame_bytes)))
        for offset in range(0, len(view), chunk_bytes):
            await self.control.send_state(view[offset : offset + chunk_bytes])
        return messages.Finish(
            migration=self._migration, state_bytes=len(view), state_digest=frame_digest(state)
        )

    # -- hand-over ----------------------------------------------------------------------------------

    async def go(self) -> Started | Aborted:
        """Send GO and wait for the answer; after a lost connection send it again on a new one.

        GO is idempotent. OutcomeUnknown when ``go_s`` is over without an answer; NotStarted if the last one
        was that the guest cannot be started.
        """
        deadline = self._clock.now() + self._limits.go_s
        failed: PeerError = PeerLost("no answer")
        while (left := deadline - self._clock.now()) > 0:
            try:
                return await self._ask(messages.Go(migration=self._migration), left)
            except PeerError as error:
                failed = error
                await self.close()
                await self._clock.sleep(min(_RETRY_S, left))
        unknown = (
            f"GO was sent to {self.address} and no answer came within {self._limits.go_s:g} s ({failed}); "
            f"the guest stays paused here"
        )
        if isinstance(failed, PeerAborted):
            raise NotStarted(f"{unknown}: `migd resolve --force-source` has it run on here")
        raise OutcomeUnknown(f"{unknown}: run `migd resolve` when the destination can be reached")

    async def resolve(self, keeper: Keeper, detail: str) -> Started | Aborted:
        """The operator's word, and what is true after it. Refused with the reason, PeerLost, PeerAborted."""
        question = messages.Resolve(migration=self._migration, keeper=keeper, detail=detail)
        return await self._ask(question, self._limits.go_s)

    async def deliver(self, verdict: Verdict, within_s: float | None = None) -> Started | Aborted:
        """Tell a verdict until the destination has acted on it, on new connections after a lost one.

        ``within_s`` is ``go_s`` where somebody waits for it.
        Answers as of ``go``. Refused if something else was decided there; PeerError when the time is over.
        """
        deadline = self._clock.now() + (self._limits.go_s if within_s is None else within_s)
        while True:
            try:
                if self._control is None:
                    answer = await self._ask(messages.Go(migration=self._migration), self._limits.go_s)
                    if isinstance(answer, Aborted):
                        return answer
                await self.control.send(verdict)
                # What is sent on one connection is done in its order: this answer comes behind the verdict.
                return await self._ask(messages.Go(migration=self._migration), self._limits.go_s)
            except Refused:
                raise
            except PeerError:
                await self.close()
                left = deadline - self._clock.now()
                if left <= 0:
                    raise
                await self._clock.sleep(min(_RETRY_S, left))

    async def _ask(self, question: messages.Go | messages.Resolve, timeout_s: float) -> Started | Aborted:
        if self._control is None:
            await self.connect()
        return await guarded(self._answer(question, timeout_s), self._watch_control())

    async def _answer(self, question: messages.Go | messages.Resolve, timeout_s: float) -> Started | Aborted:
        await self.control.send(question)
        name = type(question).__name__.upper()
        while True:
            answer = await self.control.next(f"answer to {name}", timeout_s)
            if isinstance(answer, Started | Aborted):
                return answer
            if not isinstance(answer, messages.Checked):  # which may come behind any verdict that was good
                raise ProtocolError(f"{self.address} answered {name} with something else")

    async def close(self) -> None:
        """Close every connection, at once."""
        if self._runner is not None:
            await self._runner.stop()
            self._runner = None
        if self._control is not None:
            self._control.close()
            self._control = None
        for link in self.links:
            link.close()
        self.links.clear()
