"""A real TCP connection over loopback: one end as migd holds it, the other a socket the test speaks on."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from migd.limits import Limits
from migd.migration.ports import Bandwidth
from migd.transport.channel import SocketChannel
from migd.transport.link import Dialogue, FrameLink
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder
from migd.wire.messages import Message

ID = "0123456789abcdef" * 2


class Clock:
    """The daemon's clock, without the daemon."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@dataclass
class Peer:
    """The other end, without any code of ``migd.transport``: bytes out, whole frames in."""

    sock: socket.socket
    encoder: FrameEncoder = field(default_factory=FrameEncoder)
    decoder: FrameDecoder = field(default_factory=FrameDecoder)

    async def say(self, message: Message) -> None:
        await self.send(self.encoder.message(message))

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hear(self) -> Frame:
        """The next frame. ConnectionError at the end of the connection."""
        loop = asyncio.get_running_loop()
        while True:
            received = await loop.sock_recv_into(self.sock, self.decoder.next_buffer())
            if not received:
                raise ConnectionError
            frame = self.decoder.advance(received)
            if frame is not None:
                return frame

    async def heard(self) -> Message:
        return (await self.hear()).message()


@asynccontextmanager
async def connected(bandwidth: Bandwidth | None = None) -> AsyncIterator[tuple[FrameLink, Peer]]:
    """A link and its peer, both closed afterwards."""
    ours, theirs = tcp_pair()
    theirs.setblocking(False)
    link = FrameLink(SocketChannel(ours), bandwidth)
    try:
        yield link, Peer(theirs)
    finally:
        link.close()
        theirs.close()


@asynccontextmanager
async def in_dialogue(
    limits: Limits | None = None,
) -> AsyncIterator[tuple[Dialogue, Peer, asyncio.Task[None]]]:
    """A dialogue whose ``run`` is running, its peer, and the task that runs it (awaited afterwards)."""
    async with connected() as (link, peer):
        dialogue = Dialogue(link, ID, Clock(), limits or Limits())
        running = asyncio.create_task(dialogue.run())
        try:
            yield dialogue, peer, running
        finally:
            running.cancel()
            await asyncio.wait({running})
            if not running.cancelled():
                running.exception()
