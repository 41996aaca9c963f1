"""DaemonLink: a guest's end of one control connection to its daemon, on an event loop."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from migd.errors import GuestError
from migd.guest import control

_UCRED = struct.Struct("3i")


class DaemonLink:
    """One connection. Owns the socket until ``close``; packets come in order through ``receive``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._packets: asyncio.Queue[tuple[control.ToGuest, list[int]] | None] = asyncio.Queue()
        self._closed = False
        self._loop.add_reader(sock, self._readable)

    @classmethod
    def connect(cls, path: Path, attach: control.Attach, fds: Sequence[int]) -> DaemonLink:
        """Connect and say who we are. OSError if there is no daemon."""
        sock = control.new_socket()
        try:
            sock.connect(str(path))
            sock.setblocking(False)
            control.send(sock, attach, list(fds))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    @property
    def daemon_pid(self) -> int:
        pid, _, _ = _UCRED.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(pid)

    def _readable(self) -> None:
        try:
            packet = control.receive_from_daemon(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, GuestError):
            packet = None
        self._packets.put_nowait(packet)
        if packet is None:
            self._loop.remove_reader(self._sock)

    async def receive(self) -> tuple[control.ToGuest, list[int]] | None:
        """The next packet with its descriptors, now ours; None once the daemon is gone."""
        return await self._packets.get()

    def send(self, message: control.FromGuest, fds: Sequence[int] = ()) -> None:
        """A daemon that is gone, or does not read, is noticed by ``receive``."""
        try:
            control.send(self._sock, message, list(fds))
        except OSError:
            self._packets.put_nowait(None)

    def close(self) -> None:
        """Let go, of descriptors that nobody took as well."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        while not self._packets.empty():
            packet = self._packets.get_nowait()
            control.close_all(packet[1] if packet is not None else [])
