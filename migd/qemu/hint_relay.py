"""HintRelay: carries hints between the agent in a QEMU guest and the daemon, which knows no physical memory.

The agent names guest-physical addresses, the daemon's pages count through RAM blocks. Frames are taken apart
here and put together again; whatever names no RAM that may be hinted is left out, and nothing else is judged:
the daemon does that (R7). The agent may be absent, QEMU's end may be closed, the daemon may come and go.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress

from migd.guest import hints
from migd.guest.hints import Bitmap, Hello, HintDecoder, HintFrame, Ranges
from migd.qemu.ram_map import RamMap
from migd.ram.page import PAGE_BYTES

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_READ_BYTES = 1 << 12
"""At a time: zlib may inflate it a thousandfold, and each MiB takes 2 ms, for which QEMU is not spoken to."""

_WAITING_BYTES = 4 << 20
"""For the daemon, at most: then QEMU, and in the end the agent, is not read from."""


class HintRelay:
    """One hint port of one QEMU. ``run`` keeps its end of the port open; ``serve`` names the daemon's end.

    A daemon that hangs up wants no more of this guest's hints (R7): the port is closed until the next one
    comes, so that nobody reads what a hostile guest goes on to send.
    """

    def __init__(self, path: str, ram_map: Callable[[], RamMap]) -> None:
        """``path`` of the unix socket behind the port; ``ram_map`` gives the map as it is by now."""
        self._path = path
        self._map = ram_map
        self._loop = asyncio.get_running_loop()
        self._port: socket.socket | None = None
        self._daemon: socket.socket | None = None
        self._decoder = HintDecoder()
        self._to_daemon = bytearray()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled: connected to the port while it is wanted, again and again."""
        try:
            while True:
                await self._wanted.wait()
                if await self._connect():
                    await self._lost.wait()
        finally:
            self._drop_port()
            self.release()

    async def _connect(self) -> bool:
        """False if it is not wanted any more."""
        while self._wanted.is_set():
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                await self._loop.sock_connect(sock, self._path)
                self._open(sock)
                return True
            except OSError as error:
                sock.close()
                log.debug("hint port %s: %s", self._path, error)
                await asyncio.sleep(_RETRY_S)
            except BaseException:
                sock.close()
                raise
        return False

    def _open(self, sock: socket.socket) -> None:
        self._lost.clear()
        self._port, self._decoder = sock, HintDecoder()
        self._listen()
        self.greet()

    def greet(self) -> None:
        """Have the agent say HELLO: it has come, or come back, perhaps in another kernel."""
        self._tell_agent(hints.encode(hints.Greet()))

    # -- the daemon's end ---------------------------------------------------------------------------

    def serve(self, sock: socket.socket) -> None:
        """Carry for this daemon from now on; the socket is ours."""
        self.release()
        sock.setblocking(False)
        self._daemon = sock
        self._loop.add_reader(sock, self._from_daemon)
        self._wanted.set()

    def release(self) -> None:
        """There is no daemon."""
        if self._daemon is not None:
            self._loop.remove_reader(self._daemon)
            self._loop.remove_writer(self._daemon)
            self._daemon.close()
            self._daemon = None
        self._to_daemon.clear()
        self._listen()

    def _from_daemon(self) -> None:
        assert self._daemon is not None
        data = _received(self._daemon)
        if data is None:
            return
        if not data:
            self.release()
            self._wanted.clear()
            self._drop_port()
            return
        self._tell_agent(data)

    def _tell_agent(self, data: bytes) -> None:
        """What does not fit is forgotten: an agent that does not read gets no older requests later."""
        if self._port is None:
            return
        with suppress(BlockingIOError, OSError):
            self._port.send(data)

    # -- the agent's end ----------------------------------------------------------------------------

    def _from_agent(self) -> None:
        assert self._port is not None
        data = _received(self._port)
        if data is None:
            return
        if not data:
            self._drop_port()
            return
        for frame in self._decoder.feed(data):
            for translated in translate(frame, self._map()):
                self._tell_daemon(hints.encode(translated))

    def _drop_port(self) -> None:
        if self._port is not None:
            self._loop.remove_reader(self._port)
            self._port.close()
            self._port = None
        self._lost.set()

    def _tell_daemon(self, data: bytes) -> None:
        if self._daemon is None:
            return
        self._to_daemon += data
        self._flush()

    def _flush(self) -> None:
        assert self._daemon is not None
        try:
            while self._to_daemon:
                del self._to_daemon[: self._daemon.send(self._to_daemon)]
        except BlockingIOError:
            self._loop.add_writer(self._daemon, self._flush)
            if len(self._to_daemon) > _WAITING_BYTES and self._port is not None:
                self._loop.remove_reader(self._port)
            return
        except OSError:
            self.release()
        if self._daemon is not None:
            self._loop.remove_writer(self._daemon)
        self._listen()

    def _listen(self) -> None:
        """To the agent, as little waits for the daemon by now."""
        if self._port is not None:
            self._loop.add_reader(self._port, self._from_agent)


def translate(frame: HintFrame, ram: RamMap) -> Iterator[HintFrame]:
    """The frames for the daemon: pages of RAM blocks instead of guest-physical ones."""
    match frame:
        case Hello(contract, strength, page_bytes, pages, version):
            # The agent names as many pages as its memory map goes up to; beyond RAM it means another guest.
            fits = 0 < pages * PAGE_BYTES <= ram.end
            yield Hello(contract, strength, page_bytes, ram.ram_bytes // PAGE_BYTES if fits else 0, version)
        case Ranges(epoch, ranges):
            pieces = [piece for start, length in ranges for piece in ram.ranges(start, length)]
            for low in range(0, len(pieces), hints.MAX_RANGES_PER_FRAME):
                yield Ranges(epoch, tuple(pieces[low : low + hints.MAX_RANGES_PER_FRAME]))
        case Bitmap(epoch, start, _, _) if start % PAGE_BYTES:
            yield Ranges(epoch, ((start, 0),))  # an empty range: it is refused, and counted
        case Bitmap(epoch, start, pages, bits):
            for offset, count, piece in ram.bitmaps(start, pages, bits):
                if piece.count(0) < len(piece):
                    yield Bitmap(epoch, offset, count, piece)
        case _:
            yield frame


def _received(sock: socket.socket) -> bytes | None:
    """What has come; empty at the end of the connection, None if there is nothing yet."""
    try:
        return sock.recv(_READ_BYTES)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""
