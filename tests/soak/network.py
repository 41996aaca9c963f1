"""Network: the way between two daemons, through a proxy that cuts, loses or spoils it where it is told to.

A proxy listens on loopback and forwards every connection to one daemon; all those of a migration share a
``Weather``: what the next fault is, and when it strikes. Threads, since sockets are all it knows.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from enum import StrEnum

_CHUNK_BYTES = 1 << 18
_CONNECT_S = 5.0
_LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: close sends RST."""


class Stroke(StrEnum):
    """What happens to a connection."""

    RST = "rst"
    FIN = "fin"
    BLACKHOLE = "blackhole"
    """Nothing passes any more, on any connection, and nobody says so."""
    FLIP = "flip"
    """One bit of one byte."""


@dataclass(frozen=True)
class Blow:
    """A stroke, and the byte at which it falls: of all that went one way, over all connections.

    Without a byte it falls when ``Weather.strike`` is called. ``everywhere``: on all connections at once.
    """

    stroke: Stroke
    at_byte: int | None = None
    backwards: bool = False
    """Counted, and spoilt, on the way back to the source."""
    everywhere: bool = True


@dataclass(frozen=True)
class Road:
    """How a connection is without faults."""

    delay_s: float = 0.0
    """For each chunk."""
    chunk_bytes: int = _CHUNK_BYTES


class Weather:
    """One fault, or none, over all connections of a proxy; ``clear`` before each attempt."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._lifted = threading.Event()
        self.clear()

    def clear(self, blow: Blow | None = None, road: Road | None = None) -> None:
        """The next fault, and what the way is like until then; what was swallowed before is cut."""
        with self._lock:
            self._blow = blow
            self.road = road or Road()
            self._passed = {False: 0, True: 0}
            self.struck = False
            self._lifted.set()
            self._lifted = threading.Event()
            self._black = False

    def strike(self) -> None:
        """A fault without a byte falls now."""
        with self._lock:
            if self._blow is not None and not self.struck:
                self._fall(self._blow, None)

    def add(self, link: _Link) -> None:
        with self._lock:
            self._links.add(link)

    def remove(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def cut(self) -> None:
        """Every connection, now."""
        with self._lock:
            self._fall(Blow(Stroke.RST), None)

    def passed(self, link: _Link, data: bytes, *, backwards: bool) -> bytes:
        """What of ``data`` may go on, perhaps spoilt."""
        with self._lock:
            blow, before = self._blow, self._passed[backwards]
            self._passed[backwards] += len(data)
            if blow is None or self.struck or blow.at_byte is None or blow.backwards is not backwards:
                return data
            at = blow.at_byte - before
            if at >= len(data):
                return data
            if blow.stroke is Stroke.FLIP:
                self.struck = True
                return data[:at] + bytes([data[at] ^ 1 << blow.at_byte % 8]) + data[at + 1 :]
            self._fall(blow, link)
            return data[:at]

    def wait(self) -> bool:
        """In a black hole, until it is lifted: True, and the connection is to be cut. False: go on."""
        with self._lock:
            black, lifted = self._black, self._lifted
        if black:
            lifted.wait()
        return black

    def _fall(self, blow: Blow, link: _Link | None) -> None:
        self.struck = True
        if blow.stroke is Stroke.BLACKHOLE:
            self._black = True
            return
        hit = set(self._links) if blow.everywhere or link is None else {link}
        for other in hit:
            other.doom = blow.stroke
            if other is not link:  # whose own thread still has bytes to send
                other.end()


class _Link:
    """One connection and its other half."""

    def __init__(self, source: socket.socket, destination: socket.socket) -> None:
        self.source = source
        self.destination = destination
        self.doom: Stroke | None = None
        self._left = 2

    def end(self) -> None:
        """Wake both threads; the connections are closed when both have ended."""
        for sock in (self.source, self.destination):
            with contextlib.suppress(OSError):
                if self.doom is Stroke.FIN:
                    sock.shutdown(socket.SHUT_RDWR)
                else:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                    sock.shutdown(socket.SHUT_RD)

    def half_ended(self) -> bool:
        """The last of the two threads closes."""
        self._left -= 1
        if self._left:
            return False
        self.source.close()
        self.destination.close()
        return True


class Proxy:
    """Forwards to ``target`` (HOST:PORT) in the weather there is; ``close`` ends every connection."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.weather = Weather()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._closing = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                source, _ = self._listener.accept()
                try:
                    destination = socket.create_connection(self._target, _CONNECT_S)
                except OSError:
                    source.close()
                    continue
                destination.settimeout(None)
                self._join(_Link(source, destination))

    def _join(self, link: _Link) -> None:
        for sock in (link.source, link.destination):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.weather.add(link)
        for backwards in (False, True):
            threading.Thread(target=self._pump, args=(link, backwards), daemon=True).start()

    def _pump(self, link: _Link, backwards: bool) -> None:
        reader, writer = (link.destination, link.source) if backwards else (link.source, link.destination)
        weather = self.weather
        with contextlib.suppress(OSError):
            while data := reader.recv(weather.road.chunk_bytes):
                if weather.road.delay_s:
                    time.sleep(weather.road.delay_s)
                if weather.wait():
                    link.doom = Stroke.RST
                if link.doom is None:
                    writer.sendall(weather.passed(link, data, backwards=backwards))
                if link.doom is not None:
                    link.end()
                    break
            else:
                if link.doom is None:
                    writer.shutdown(socket.SHUT_WR)
        with self._closing:
            if link.half_ended():
                weather.remove(link)

    def close(self) -> None:
        """No new connection; those there are end with their daemons, or now."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.weather.clear()
        self.weather.cut()
