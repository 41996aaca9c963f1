"""FaultProxy: a TCP proxy on loopback that treats chosen connections badly, at a chosen byte.

Connections are numbered as they come; of a migration 0 is the control connection and 1, 2, ... its streams.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

_CHUNK_BYTES = 1 << 16
_LOOK_S = 0.05
"""How often a pump looks whether it is to end, or the network is cut."""
_PIECE_BYTES = 200
"""What is repeated, left out or swapped."""

_RST = struct.pack("ii", 1, 0)
"""SO_LINGER without waiting: close sends a reset."""


class Kind(StrEnum):
    RST = "reset"
    FIN = "fin"
    BLACK_HOLE = "black-hole"
    """Nothing goes in either direction any more, and nobody is told."""
    HALF_OPEN = "half-open"
    """The other end is closed; this one is not told."""
    FLIP = "flip"
    DUPLICATE = "duplicate"
    DROP = "drop"
    SWAP = "swap"
    NEVER = "never-connects"
    """It is accepted and leads nowhere."""
    DRIBBLE = "dribble"
    """One byte at a time, for the first bytes."""
    SLOW = "slow"
    """A hundredth of what a test's network carries."""


DRIBBLED_BYTES = 600
SLOW_BYTES_S = 300_000


@dataclass(frozen=True)
class Fault:
    """What happens to one connection; ``back`` on the way from the destination."""

    kind: Kind
    connection: int = 1
    at_byte: int = 0
    back: bool = False

    def __str__(self) -> str:
        way = "back" if self.back else "there"
        return f"{self.kind}-{self.connection}-{way}-{self.at_byte}"


class FaultProxy:
    """Close it, or leave the context: every thread and socket of it ends."""

    def __init__(self, target: str, fault: Fault | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._fault = fault
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(_LOOK_S)
        self._pipes: list[_Pipe] = []
        self._closing = threading.Event()
        self._cut = threading.Event()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def cut(self, *, silent: bool) -> None:
        """The network is lost: connections are reset, or nothing passes any more. None can be made."""
        self._cut.set()
        for pipe in self._pipes:  # also those that are over already
            if silent:
                pipe.silence()
            else:
                pipe.reset()

    def mend(self) -> None:
        """New connections pass again; those that were cut stay so."""
        self._cut.clear()

    def close(self) -> None:
        self._closing.set()
        self._acceptor.join()
        self._listener.close()
        for pipe in self._pipes:
            pipe.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            hit = self._fault is not None and self._fault.connection == len(self._pipes)
            mine = self._fault if hit else None
            self._pipes.append(_Pipe(near, self._far(mine), mine))

    def _far(self, fault: Fault | None) -> socket.socket | None:
        """The connection to the target, unless there is to be none."""
        if self._cut.is_set() or (fault is not None and fault.kind is Kind.NEVER):
            return None
        with contextlib.suppress(OSError):
            return socket.create_connection(self._target)
        return None


class _Pipe:
    """One proxied connection, and a thread for each direction; the last one that ends closes it."""

    def __init__(self, near: socket.socket, far: socket.socket | None, fault: Fault | None) -> None:
        self._ends = [near] if far is None else [near, far]
        self._silent = threading.Event()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        if far is None:
            if fault is None:  # nobody listens
                self.reset()
                near.close()
            return
        self._pumping = threading.Semaphore(1)
        for source, sink, back in ((near, far, False), (far, near, True)):
            mine = fault if fault is not None and fault.back is back else None
            self._threads.append(threading.Thread(target=self._run, args=(source, sink, mine), daemon=True))
        for thread in self._threads:
            thread.start()

    def silence(self) -> None:
        self._silent.set()

    def reset(self) -> None:
        for sock in self._ends:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        self._over.set()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        for sock in self._ends:
            sock.close()

    def _run(self, source: socket.socket, sink: socket.socket, fault: Fault | None) -> None:
        source.settimeout(_LOOK_S)
        with contextlib.suppress(OSError):
            self._pump(source, sink, fault)
        if not self._pumping.acquire(blocking=False):
            for sock in self._ends:
                sock.close()

    def _pump(self, source: socket.socket, sink: socket.socket, fault: Fault | None) -> None:
        chunks = self._chunks(source)
        for data in chunks if fault is None else _suffering(chunks, fault, self._strike):
            self._deliver(sink, data)
        if not self._silent.is_set() and not self._over.is_set():
            sink.shutdown(socket.SHUT_WR)

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        """What comes, until its end; none while silent."""
        while not self._over.is_set():
            if self._silent.is_set():
                self._over.wait(_LOOK_S)
                continue
            try:
                data = source.recv(_CHUNK_BYTES)
            except TimeoutError:
                continue
            if not data:
                return
            yield data

    def _deliver(self, sink: socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._over.is_set() and not self._silent.is_set():
            with contextlib.suppress(TimeoutError):
                view = view[sink.send(view) :]

    def _strike(self, kind: Kind) -> None:
        """What hits the whole connection."""
        match kind:
            case Kind.RST:
                self.reset()
            case Kind.FIN:
                for sock in self._ends:
                    sock.shutdown(socket.SHUT_WR)
            case Kind.HALF_OPEN:
                self._ends[1].shutdown(socket.SHUT_RDWR)
                self._silent.set()
            case _:
                self._silent.set()


def _suffering(chunks: Iterator[bytes], fault: Fault, strike: Callable[[Kind], None]) -> Iterator[bytes]:
    """The bytes of one direction with the fault in them; ``strike`` for what is done to the connection."""
    if fault.kind in (Kind.DRIBBLE, Kind.SLOW):
        yield from _throttled(chunks, fault.kind)
        return
    position = 0
    for data in chunks:
        within = fault.at_byte - position
        position += len(data)
        if not 0 <= within < len(data):
            yield data
            continue
        before, piece, rest = (
            data[:within],
            data[within : within + _PIECE_BYTES],
            data[within + _PIECE_BYTES :],
        )
        match fault.kind:
            case Kind.FLIP:
                yield before + bytes([piece[0] ^ 1]) + piece[1:] + rest
            case Kind.DUPLICATE:
                yield before + piece + piece + rest
            case Kind.DROP:
                yield before + rest
            case Kind.SWAP:
                yield before
                yield next(chunks, b"") + piece + rest
            case _:
                yield before
                strike(fault.kind)


def _throttled(chunks: Iterator[bytes], kind: Kind) -> Iterator[bytes]:
    dribbled = DRIBBLED_BYTES
    for data in chunks:
        if kind is Kind.SLOW:
            yield data
            time.sleep(len(data) / SLOW_BYTES_S)
            continue
        for position in range(min(dribbled, len(data))):
            yield data[position : position + 1]
        yield data[dribbled:]
        dribbled = max(0, dribbled - len(data))
