"""Byte channels: the smallest interface that a plain socket with the loop's fast calls and TLS both fit."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from migd.errors import PeerLost

USER_TIMEOUT_MS = 15_000
"""TCP_USER_TIMEOUT: the kernel gives up on unacknowledged data after this long."""

_PATIENCE_MS = 10
"""How long a thread waits for the socket before it leaves the waiting to the loop: longer than a busy peer
needs for the third of a socket buffer after which the kernel wakes a sender (1 MB, 1 to 5 ms), so short that
streams of a slow network do not occupy the threads."""


class Channel(Protocol):
    """An ordered byte channel. Every call raises PeerLost once it is broken.

    The ``_now`` calls are for a worker thread, while the loop is within ``held``: a thread that has bytes in
    its hands moves them itself, since handing them to the loop and back costs as much as copying 1 MiB.
    """

    async def send(self, data: bytes | memoryview) -> None:
        """Returns when the channel has accepted all bytes."""

    async def receive_into(self, view: memoryview) -> int:
        """At least one byte into ``view``, or 0 at the end."""

    def held(self) -> AbstractContextManager[None]:
        """While entered, ``close`` lets the calls in progress fail before it gives the descriptor up."""

    def send_now(self, data: bytes | memoryview) -> int:
        """How many bytes the channel took without waiting for long, perhaps none."""

    def receive_now(self, view: memoryview) -> int | None:
        """At least one byte into ``view``, 0 at the end, None if nothing came without waiting for long."""

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
        self._writable, self._readable = select.poll(), select.poll()
        self._writable.register(sock, select.POLLOUT)
        self._readable.register(sock, select.POLLIN)

    async def send(self, data: bytes | memoryview) -> None:
        with self.held():
            await self._loop.sock_sendall(self._sock, data)

    async def receive_into(self, view: memoryview) -> int:
        with self.held():
            return await self._loop.sock_recv_into(self._sock, view)

    def send_now(self, data: bytes | memoryview) -> int:
        sent = 0
        while sent < len(data):
            try:
                sent += self._sock.send(data[sent:])
            except BlockingIOError:
                if not self._writable.poll(_PATIENCE_MS):
                    break
        return sent

    def receive_now(self, view: memoryview) -> int | None:
        while True:
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                if not self._readable.poll(_PATIENCE_MS):
                    return None

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
    def held(self) -> Iterator[None]:
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
