"""FrameLink: frames over one channel; and Dialogue: the control connection of a migration on top of one."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from migd.errors import PeerError, PeerLost, ProtocolError, Refused
from migd.limits import Limits
from migd.migration.ports import Clock, Link
from migd.ram.bitmap import Run
from migd.tasks import guarded
from migd.transport.channel import Channel
from migd.wire import messages
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder
from migd.wire.messages import Message
from migd.wire.protocol import Codec, FrameType

M = TypeVar("M", bound=Message)

_INBOX_MESSAGES = 8
"""Beyond this many unread messages the link is not read any further: the peer feels TCP's back-pressure."""


class FrameLink:
    """See ``migd.migration.ports.Link``. Frames of concurrent senders do not mix; one task receives."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._sending = asyncio.Lock()
        self.sent = self._encoder.account
        self.received = self._decoder.account
        self.sent_bytes = 0

    async def send(self, message: Message) -> None:
        async with self._sending:
            await self._put(self._encoder.message(message))

    async def send_pages(self, runs: list[Run], digests: bytes, codec: Codec, payload: memoryview) -> None:
        async with self._sending:
            await self._put(self._encoder.pages(runs, digests, codec, len(payload)))
            await self._put(payload)

    async def send_runs(self, kind: FrameType, runs: list[Run]) -> None:
        async with self._sending:
            await self._put(self._encoder.runs(kind, runs))

    async def send_state(self, chunk: memoryview) -> None:
        async with self._sending:
            await self._put(self._encoder.state(chunk))

    async def _put(self, data: bytes | memoryview) -> None:
        await self._channel.send(data)
        self.sent_bytes += len(data)

    async def receive(self) -> Frame:
        frame: Frame | None = None
        while frame is None:
            received = await self._channel.receive_into(self._decoder.next_buffer())
            if not received:
                if self._decoder.at_boundary:
                    raise PeerLost("the peer closed the connection")
                raise PeerLost("the connection ended inside a frame")
            frame = self._decoder.advance(received)
        return frame

    def close(self) -> None:
        self._channel.close()


class Dialogue:
    """See ``migd.migration.ports.Conversation``."""

    def __init__(self, link: Link, migration: str, clock: Clock, limits: Limits) -> None:
        self._link = link
        self._migration = migration
        self._clock = clock
        self._limits = limits
        self._heard = clock.now()
        self._inbox: asyncio.Queue[Frame | Message] = asyncio.Queue(_INBOX_MESSAGES)
        self.peer_applied_bytes = 0
        self.applied_bytes = 0

    async def run(self) -> None:
        await guarded(self._read(), self._ping())

    async def _read(self) -> None:
        while True:
            frame = await self._link.receive()
            self._heard = self._clock.now()
            if frame.type is FrameType.STATE:
                await self._inbox.put(frame)
                continue
            message = frame.message()
            if isinstance(message, messages.Refuse):  # whose id is not ours if HELLO was unreadable
                raise Refused(f"the destination refused: {message.reason}")
            if message.migration != self._migration:
                raise ProtocolError(f"a {frame.type.name} of another migration ({message.migration})")
            match message:
                case messages.Ping(nonce=nonce):
                    pong = messages.Pong(
                        migration=self._migration, nonce=nonce, applied_bytes=self.applied_bytes
                    )
                    await self._link.send(pong)
                case messages.Pong(applied_bytes=applied):
                    self.peer_applied_bytes = applied
                case messages.Abort(reason=reason):
                    raise PeerError(f"the peer aborted: {reason}")
                case _:
                    await self._inbox.put(message)

    async def _ping(self) -> None:
        nonce = 0
        while True:
            await self._clock.sleep(self._limits.ping_s)
            silence = self._clock.now() - self._heard
            if silence > self._limits.dead_s:
                raise PeerLost(f"no sign of life from the peer for {silence:.0f} s")
            await self._link.send(messages.Ping(migration=self._migration, nonce=nonce))
            nonce += 1

    async def send(self, message: Message) -> None:
        await self._link.send(message)

    async def send_state(self, chunk: memoryview) -> None:
        await self._link.send_state(chunk)

    async def expect(self, kind: type[M], timeout_s: float) -> M:
        found = await self.next(kind.__name__.upper(), timeout_s)
        if not isinstance(found, kind):
            raise ProtocolError(f"{_name(found)} where {kind.__name__.upper()} was due")
        return found

    async def next(self, what: str, timeout_s: float | None) -> Frame | Message:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._inbox.get()
        except TimeoutError as error:
            raise PeerLost(f"no {what} from the peer within {timeout_s:g} s") from error

    def close(self) -> None:
        self._link.close()


def _name(found: Frame | Message) -> str:
    return found.type.name if isinstance(found, Frame) else type(found).__name__.upper()
