"""FrameLink: frames over one channel; and Dialogue: the control connection of a migration on top of one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from migd.errors import PeerAborted, PeerLost, ProtocolError, Refused
from migd.limits import Limits
from migd.migration.bandwidth import Unlimited
from migd.migration.ports import Bandwidth, Clock, Link, Worker
from migd.ram.bitmap import Run
from migd.tasks import guarded
from migd.transport.channel import Channel
from migd.wire import messages
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder
from migd.wire.messages import Message
from migd.wire.protocol import Codec, FrameType

M = TypeVar("M", bound=Message)
P = ParamSpec("P")
T = TypeVar("T")

_INBOX_MESSAGES = 8
"""Beyond this many unread messages the link is not read any further: the peer feels TCP's back-pressure."""


_APPLIED_S = 0.002
"""Between two questions how much the peer has applied."""

_LEAST_DEBT_BYTES = 64 << 10
"""More than any frame that is sent where a limit allows hardly anything: one page, or a few runs."""


class FrameLink:
    """See ``migd.migration.ports.Link``. Frames of concurrent senders do not mix; one task receives."""

    def __init__(self, channel: Channel, bandwidth: Bandwidth | None = None) -> None:
        self._channel = channel
        self._bandwidth = bandwidth or Unlimited()
        self._paid_bytes = 0
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._sending = asyncio.Lock()
        self.sent = self._encoder.account
        self.received = self._decoder.account
        self.sent_bytes = 0
        self.received_bytes = 0
        self._backlog: list[memoryview] = []

    async def turn(self) -> None:
        owed_bytes = self.sent_bytes - self._paid_bytes
        self._paid_bytes = self.sent_bytes
        # What a limit allowed that was lowered since is not held against the stream for seconds.
        await self._bandwidth.take(min(owed_bytes, max(_LEAST_DEBT_BYTES, 2 * self._bandwidth.frame_bytes)))

    async def send(self, message: Message) -> None:
        async with self._sending:
            await self._put(self._encoder.message(message))

    async def send_runs(self, kind: FrameType, runs: list[Run]) -> None:
        await self.turn()
        async with self._sending:
            await self._put(self._encoder.runs(kind, runs))

    async def send_state(self, chunk: memoryview) -> None:
        await self.turn()
        async with self._sending:
            await self._put(self._encoder.state(chunk))

    async def _put(self, data: bytes | memoryview) -> None:
        await self._flush()
        await self._channel.send(data)
        self.sent_bytes += len(data)

    async def _flush(self) -> None:
        for data in self._backlog:
            await self._channel.send(data)
        self._backlog.clear()

    async def receive(self, lend: Callable[[], Awaitable[memoryview]] | None = None) -> Frame:
        frame: Frame | None = None
        while frame is None:
            if self.starved and lend is not None:
                self.lend(await lend())
            frame = self._advance(await self._channel.receive_into(self._decoder.next_buffer()))
        return frame

    def lend(self, buffer: memoryview | None) -> None:
        self._decoder.lend(buffer)

    @property
    def starved(self) -> bool:
        return self._decoder.starved

    @property
    def at_boundary(self) -> bool:
        return self._decoder.at_boundary

    def _advance(self, received: int) -> Frame | None:
        self.received_bytes += received
        if received:
            return self._decoder.advance(received)
        if self._decoder.at_boundary:
            raise PeerLost("the peer closed the connection")
        raise PeerLost("the connection ended inside a frame")

    # -- in a worker thread -------------------------------------------------------------------------

    async def in_thread(self, worker: Worker, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._sending:
            with self._channel.held():
                return await worker.run(job, *args, **kwargs)

    async def flush(self) -> None:
        async with self._sending:
            await self._flush()

    @property
    def congested(self) -> bool:
        return bool(self._backlog)

    def send_pages_now(self, runs: list[Run], digests: bytes, codec: Codec, payload: memoryview) -> None:
        self._put_now(self._encoder.pages(runs, digests, codec, len(payload)))
        self._put_now(payload)

    def send_runs_now(self, kind: FrameType, runs: list[Run]) -> None:
        self._put_now(self._encoder.runs(kind, runs))

    def _put_now(self, data: bytes | memoryview) -> None:
        self.sent_bytes += len(data)
        sent = 0 if self._backlog else self._channel.send_now(data)
        if sent < len(data):
            self._backlog.append(memoryview(data)[sent:])

    def receive_now(self) -> Frame | None:
        frame: Frame | None = None
        while frame is None:
            if self.starved:
                return None
            received = self._channel.receive_now(self._decoder.next_buffer())
            if received is None:
                return None
            frame = self._advance(received)
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
        self._pings = 0
        self._pong = asyncio.Event()
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
                    self._pong.set()
                case messages.Abort(reason=reason):
                    raise PeerAborted(f"the peer aborted: {reason}")
                case _:
                    await self._inbox.put(message)

    async def _ping(self) -> None:
        while True:
            await self._clock.sleep(self._limits.ping_s)
            silence = self._clock.now() - self._heard
            if silence > self._limits.dead_s:
                raise PeerLost(f"no sign of life from the peer for {silence:.0f} s")
            await self._send_ping()

    async def _send_ping(self) -> None:
        nonce, self._pings = self._pings, self._pings + 1
        await self._link.send(messages.Ping(migration=self._migration, nonce=nonce))

    async def applied(self, up_to_bytes: int) -> None:
        while self.peer_applied_bytes < up_to_bytes:
            self._pong.clear()
            await self._send_ping()
            await self._pong.wait()
            if self.peer_applied_bytes < up_to_bytes:
                await self._clock.sleep(_APPLIED_S)

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
