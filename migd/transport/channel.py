"""Byte channels: the smallest interface that a plain socket with the loop's fast calls and TLS both fit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from migd.errors import PeerLost

USER_TIMEOUT_MS = 15_000
"""TCP_USER_TIMEOUT: the kernel gives up on unacknowledged data after this long."""


class Channel(Protocol):
    """An ordered byte channel. Both calls raise PeerLost once it is broken."""

    async def send(self, data: bytes | memoryview) -> None:
        """Returns when the channel has accepted all bytes."""

    async def receive_into(self, view: memoryview) -> int:
        """At least one byte into ``view``, or 0 at the end."""

    def close(self) -> None:
        """At once, unsent bytes or not; never raises."""


class SocketChannel:
    """A connected TCP socket, used with the loop's ``sock_*`` calls (4.5 to 5 GB/s on loopback)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._calls = 0
        self._closed = False

    async def send(self, data: bytes | memoryview) -> None:
        with self._call():
            await self._loop.sock_sendall(self._sock, data)

    async def receive_into(self, view: memoryview) -> int:
        with self._call():
            return await self._loop.sock_recv_into(self._sock, view)

    def close(self) -> None:
        """At once; whoever waits in a call gets PeerLost.

        A descriptor that the loop still watches must not be closed under it: the call would never return,
        and neither would the first one on the next socket of the same number. The last call closes it.
        """
        if self._closed:
            return
        self._closed = True
        if self._calls:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        else:
            self._sock.close()

    @contextmanager
    def _call(self) -> Iterator[None]:
        if self._closed:
            raise PeerLost("the connection was closed on this side")
        self._calls += 1
        try:
            yield
        except OSError as error:
            raise PeerLost(f"connection lost: {error.strerror or error}") from error
        finally:
            self._calls -= 1
            if self._closed and not self._calls:
                self._sock.close()
        if self._closed:
            raise PeerLost("the connection was closed on this side")
