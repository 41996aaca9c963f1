"""In-memory unix sockets: what guests and daemons say to each other, with descriptors, in virtual time."""

from __future__ import annotations

import array
import asyncio
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Packet:
    data: bytes
    fds: list[int] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)


class MemorySocket:
    """One end, with as much of ``socket.socket`` as migd uses. What one end sends the other gets later."""

    def __init__(self, dice: random.Random, *, packets: bool) -> None:
        self._dice = dice
        self._packets = packets
        self._loop = asyncio.get_running_loop()
        self._peer: MemorySocket | None = None
        self._inbox: deque[_Packet] = deque()
        self._last_arrival_s = 0.0
        self._under_way: deque[_Packet] = deque()
        self._ended = False
        self._closed = False
        self._watcher: Callable[[], object] | None = None
        self._objects: list[Any] = []

    @classmethod
    def pair(cls, dice: random.Random, *, packets: bool) -> tuple[MemorySocket, MemorySocket]:
        ours, theirs = cls(dice, packets=packets), cls(dice, packets=packets)
        ours._peer, theirs._peer = theirs, ours
        return ours, theirs

    # -- what migd calls ----------------------------------------------------------------------------

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""

    def send(self, data: bytes) -> int:
        self._pass(_Packet(bytes(data)))
        return len(data)

    def sendmsg(
        self, buffers: Iterable[bytes], ancillary: Iterable[tuple[int, int, array.array[int]]]
    ) -> int:
        data = b"".join(buffers)
        fds = [os.dup(fd) for _, _, payload in ancillary for fd in payload]
        self._pass(_Packet(data, fds, self._objects))
        self._objects = []
        return len(data)

    def recv(self, size: int) -> bytes:
        if not self._inbox:
            return self._nothing()
        packet = self._inbox[0]
        piece, packet.data = packet.data[:size], packet.data[size:]
        if not packet.data:
            self._inbox.popleft()
        self._tell()
        return piece

    def recvmsg(self, _size: int, _space: int, _flags: int) -> tuple[bytes, list[Any], int, None]:
        if not self._inbox:
            return self._nothing(), [], 0, None
        packet = self._inbox.popleft()
        self._objects_here = packet.objects
        self._tell()
        fds = array.array("i", packet.fds).tobytes()
        return packet.data, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [], 0, None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watcher = None
        for packet in (*self._inbox, *self._under_way):
            for fd in packet.fds:
                os.close(fd)
        self._inbox.clear()
        self._under_way.clear()
        peer = self._peer
        if peer is not None:
            self._loop.call_later(self._delay_s(peer), peer._end)

    # -- what the simulation calls ------------------------------------------------------------------

    def attach(self, thing: object) -> None:
        """Goes with the next packet, as a descriptor would that stands for no file here."""
        self._objects.append(thing)

    def attached(self) -> list[Any]:
        """What came with the packet received last."""
        return self._objects_here

    _objects_here: list[Any] = []  # noqa: RUF012  # replaced, never changed

    def watch(self, callback: Callable[[], object] | None) -> None:
        """``callback`` is called whenever there is something to receive, or the end."""
        self._watcher = callback
        self._tell()

    @property
    def closed(self) -> bool:
        return self._closed

    # -- on the way ---------------------------------------------------------------------------------

    def _nothing(self) -> bytes:
        if self._ended:
            return b""
        raise BlockingIOError

    def _pass(self, packet: _Packet) -> None:
        peer = self._peer
        if self._closed or self._ended or peer is None or peer._closed:
            for fd in packet.fds:
                os.close(fd)
            raise BrokenPipeError(32, "Broken pipe")
        peer._under_way.append(packet)
        self._loop.call_later(self._delay_s(peer), peer._arrive)

    def _delay_s(self, peer: MemorySocket) -> float:
        """In order, whatever the dice say."""
        arrival = max(peer._last_arrival_s + 1e-9, self._loop.time() + self._dice.random() ** 4 * 2e-3)
        peer._last_arrival_s = arrival
        return arrival - self._loop.time()

    def _arrive(self) -> None:
        if self._under_way:
            self._inbox.append(self._under_way.popleft())
            self._tell()

    def _end(self) -> None:
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        if self._watcher is not None and (self._inbox or self._ended) and not self._closed:
            self._watcher()
