"""SocketHints: the daemon's end of a hint channel. Checks every record (R7); never raises at the session."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass, field

from migd.guest import hints
from migd.guest.hints import Bitmap, End, Hello, HintDecoder, HintFrame, Ranges
from migd.limits import Limits
from migd.migration.ports import HintSink
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract

log = logging.getLogger(__name__)

MAX_REJECTED = 1000
"""Bad records before the channel is closed and everything is sent (R7): a few are noise on a serial port."""

_WEAK_ANSWER_BYTES = 200 * PAGE_BYTES

_READ_BYTES = 1 << 14
"""At a time: zlib may inflate what arrives a thousandfold."""


def _flood_bytes(pages: int) -> int:
    """More than this for one request is a flood: the worst honest answer is a range for every 2nd page.

    Each of those has 16 bytes. What nobody asked for, or came too late, counts as well: it is dropped (R4),
    but unpacking it costs as much.
    """
    return (4 << 20) + 16 * pages


@dataclass
class _Answer:
    """The answer to one request as it arrives."""

    epoch: int
    sink: HintSink
    expires_s: float
    seen: PageBitmap
    reach: int = 0
    """Below which page it has spoken. Where an allocator answers in another order, only END tells."""
    ended: bool = False
    advanced: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, free: PageBitmap) -> None:
        self.seen |= free
        self.reach = max(self.reach, free.stop())
        self.advanced.set()

    def end(self) -> None:
        self.ended = True
        self.reach = self.seen.pages
        self.advanced.set()


class SocketHints:
    """See ``migd.migration.ports.HintChannel``. Owns the socket until ``close``."""

    def __init__(self, sock: socket.socket, pages: int, limits: Limits) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._pages = pages
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._decoder = HintDecoder()
        self._hello: Hello | None = None
        """The newest: a guest that was restarted may be another kernel."""
        self._declared = asyncio.Event()
        self._answer: _Answer | None = None
        self._heard_bytes = 0
        """Since the last request, or the beginning: as they came, and as bitmaps."""
        self._refused = 0
        self._garbage_seen = 0
        self.distrusted = False
        self._open = True
        self._loop.add_reader(sock, self._readable)
        self._tell(hints.Greet())

    @property
    def rejected(self) -> int:
        """Records refused so far, those included that do not even parse."""
        return self._refused + self._decoder.rejected_frames

    @property
    def answer_bytes(self) -> int:
        """Nothing where the allocator itself answers; for an agent some 200 pages (docs/performance.md)."""
        weak = self._hello is not None and self._hello.strength == hints.Strength.WEAK
        return _WEAK_ANSWER_BYTES if weak else 0

    # -- the session's side -------------------------------------------------------------------------

    async def declare(self, timeout_s: float) -> FreeContract:
        """The guest's free-page contract (R12); NONE if it declares none in time, or one unknown here."""
        if self._hello is None:
            self._tell(hints.Greet())  # the first one may be lost: an agent ended before it had read it
        try:
            async with asyncio.timeout(timeout_s):
                await self._declared.wait()
        except TimeoutError:
            return FreeContract.NONE
        hello = self._hello
        assert hello is not None
        fits = hello.page_bytes == PAGE_BYTES and hello.pages == self._pages
        if not fits or hello.version != hints.VERSION:
            log.warning("hints refused: the guest declares %s", hello)
            return FreeContract.NONE
        known = hello.contract in list(FreeContract)
        return FreeContract(hello.contract) if known else FreeContract.NONE

    async def request(self, epoch: int, sink: HintSink) -> None:
        """Ask; answers reach ``sink`` as they arrive, for ``hint_window_s``."""
        expires = self._loop.time() + self._limits.hint_window_s
        self._answer = _Answer(epoch, sink, expires, PageBitmap(self._pages))
        self._heard_bytes = 0
        self._tell(hints.Request(epoch))

    def reach(self, epoch: int) -> int:
        """See ``migd.migration.ports.HintChannel``."""
        answer = self._answer
        if answer is None or answer.epoch != epoch or self._loop.time() > answer.expires_s:
            return self._pages
        return answer.reach

    async def reached(self, epoch: int, page: int, timeout_s: float) -> None:
        """See ``migd.migration.ports.HintChannel``."""
        answer = self._answer
        if answer is None or answer.epoch != epoch:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while answer.reach < min(page, self._pages):
                    answer.advanced.clear()
                    await answer.advanced.wait()

    def answered(self, epoch: int) -> bool:
        """Whether the answer to ``epoch``, the last request, is complete."""
        return self._answer is not None and self._answer.epoch == epoch and self._answer.ended

    async def done(self) -> None:
        """Nobody listens any more (R15); the count of rejected records begins anew with the next request."""
        if self._answer is not None:
            self._tell(hints.Done(self._answer.epoch))
            self._answer = None

    def close(self) -> None:
        """Give the channel up."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()

    # -- the guest's side ---------------------------------------------------------------------------

    def _tell(self, frame: HintFrame) -> None:
        """A dozen bytes: if even they do not fit, the guest does not read, and no hints come."""
        if not self._open:
            return
        try:
            self._sock.send(hints.encode(frame))
        except OSError as error:
            log.info("hint channel: %s", error.strerror)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._heard_bytes += len(data)
        if self._heard_bytes > _flood_bytes(self._pages):
            self._distrust("a flood")
            return
        for frame in self._decoder.feed(data):
            self._take(frame)
        if self._decoder.garbage_bytes > self._garbage_seen:
            self._garbage_seen = self._decoder.garbage_bytes
            self._refused += 1
        if self.rejected > MAX_REJECTED:
            self._distrust("too many bad records")

    def _take(self, frame: HintFrame) -> None:
        if isinstance(frame, Hello):
            self._hello = frame
            self._declared.set()
            return
        answer = self._answer
        if answer is None or self.distrusted or self._loop.time() > answer.expires_s:
            self._heard_bytes += len(frame.bits) if isinstance(frame, Bitmap) else 0
            return
        match frame:
            case Ranges(epoch, ranges):
                self._deliver(answer, epoch, self._from_ranges(ranges))
            case Bitmap(epoch, start, pages, bits):
                self._deliver(answer, epoch, self._from_bitmap(start, pages, bits))
            case End(epoch):  # of an earlier one: late, and nothing to hold against the guest
                if epoch == answer.epoch:
                    answer.end()
            case _:
                self._refused += 1

    def _deliver(self, answer: _Answer, epoch: int, free: PageBitmap) -> None:
        """To the ledger, which refuses a wrong epoch; a page named twice in one answer is refused here."""
        self._heard_bytes += free.window_bytes  # what it costs, not what it took to send
        if epoch == answer.epoch:
            if not free.isdisjoint(answer.seen):
                self._refused += 1
                return
            answer.add(free)
        answer.sink(epoch, free)

    def _from_ranges(self, ranges: tuple[tuple[int, int], ...]) -> PageBitmap:
        """Byte ranges rounded *inwards* to whole pages (R7)."""
        free = PageBitmap(self._pages)
        last_stop = 0
        for start, length in sorted(ranges):
            first, stop = -(-start // PAGE_BYTES), (start + length) // PAGE_BYTES
            if not length or stop > self._pages or first < last_stop:
                self._refused += 1
            elif first < stop:
                free.add_run(first, stop)
                last_stop = stop
        return free

    def _from_bitmap(self, start: int, pages: int, bits: bytes) -> PageBitmap:
        first, rest = divmod(start, PAGE_BYTES)
        beyond = bits[-1] >> (pages % 8) if pages % 8 else 0
        if rest or first % 64 or first + pages > self._pages or beyond:
            self._refused += 1
            return PageBitmap(self._pages)
        return PageBitmap.from_bytes(bits, self._pages, first)

    def _distrust(self, why: str) -> None:
        log.warning("hint channel closed: %s (%d bad records)", why, self.rejected)
        self.distrusted = True
        if self._answer is not None:
            self._answer.end()
        self.close()
