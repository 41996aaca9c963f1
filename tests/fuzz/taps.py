"""Taps: they stand between two ends of a connection, pass everything on, and keep what went by."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

from migd.guest import control

_READ_BYTES = 1 << 16
_LOOK_S = 0.2


@dataclass
class Heard:
    """What was said on one connection, in either direction."""

    forth: bytearray = field(default_factory=bytearray)
    back: bytearray = field(default_factory=bytearray)


class TcpTap:
    """Listens on loopback and passes on to ``address``; connections in the order in which they came."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self.heard: list[Heard] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """The address to connect to."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = Heard()
        self.heard.append(heard)
        beyond_reader, beyond_writer = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(
            _pass_on(reader, beyond_writer, heard.forth), _pass_on(beyond_reader, writer, heard.back)
        )

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_READ_BYTES):
            kept += data
            writer.write(data)
            await writer.drain()
    writer.close()


class GuestTap:
    """A guest socket in front of a daemon's: passes on packets with their descriptors, and the hint bytes.

    A thread of its own, ended by ``close``. One guest.
    """

    def __init__(self, path: Path, daemon: Path) -> None:
        self._daemon = daemon
        self._listener = control.new_socket()
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.from_guest: list[tuple[bytes, int]] = []
        """Packets, each with the number of its descriptors."""
        self.from_daemon: list[tuple[bytes, int]] = []
        self.blobs: list[bytes] = []
        """What came in descriptors when the guest was paused: its device state, and its free bitmap."""
        self.hints = Heard()
        """Forth is what the guest says."""
        self._open = True
        self._ways: dict[socket.socket, tuple[socket.socket, bytearray | None]] = {}
        self._thread = threading.Thread(target=self._run, name="guest-tap")
        self._thread.start()

    def _run(self) -> None:
        self._listener.settimeout(_LOOK_S)
        while self._open:
            with contextlib.suppress(TimeoutError):
                guest, _ = self._listener.accept()
                self._pump(guest)
        self._listener.close()

    def _pump(self, guest: socket.socket) -> None:
        daemon = control.new_socket()
        daemon.connect(str(self._daemon))
        self._ways = {guest: (daemon, None), daemon: (guest, None)}
        try:
            while self._open and guest in self._ways:
                for sock in select.select(list(self._ways), [], [], _LOOK_S)[0]:
                    if sock in self._ways:
                        self._pass_on(sock, guest)
        finally:
            for sock in {*self._ways, guest, daemon}:
                sock.close()

    def _pass_on(self, sock: socket.socket, guest: socket.socket) -> None:
        to, kept = self._ways[sock]
        if kept is None:
            data, fds, _, _ = socket.recv_fds(sock, control.MAX_PACKET_BYTES, control.MAX_PACKET_FDS)
            (self.from_guest if sock is guest else self.from_daemon).append((data, len(fds)))
            if sock is not guest and b'"attached"' in data:
                fds[-1] = self._hint_tap(fds[-1])
            if b'"paused"' in data and len(fds) == 2:
                self.blobs = [control.blob_bytes(fd) for fd in fds]
        else:
            data, fds = sock.recv(_READ_BYTES), []
            kept += data
        if not data:
            for end in (sock, to):
                self._ways.pop(end, None)
                end.close()
            return
        with contextlib.suppress(BrokenPipeError):
            if kept is None:
                socket.send_fds(to, [data], fds)
            else:
                to.sendall(data)
        control.close_all(fds)

    def _hint_tap(self, theirs: int) -> int:
        """The descriptor that the guest gets instead of its hint socket."""
        daemon = socket.socket(fileno=theirs)
        ours, guests = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ways[daemon] = (ours, self.hints.back)
        self._ways[ours] = (daemon, self.hints.forth)
        with guests:
            return os.dup(guests.fileno())

    def close(self) -> None:
        self._open = False
        self._thread.join()
