"""The guest's end of a hint channel: right answers, at any time, in any form, among anything else.

What a right guest says is never false: a page it names was free at one moment after it had read the request
(R5). It may say so late, twice, with another epoch, in ranges that end within pages, or among garbage.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from migd.guest import hints
from migd.guest.hints import (
    Bitmap,
    Done,
    End,
    Greet,
    Hello,
    HintDecoder,
    HintFrame,
    Ranges,
    Request,
    Strength,
)
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from tests.simulation.memory import Memory
from tests.simulation.sockets import MemorySocket


@dataclass(frozen=True)
class Manners:
    """How a guest behaves on its hint channel; all probabilities."""

    silent: float = 0.0
    slow: float = 0.1
    twice: float = 0.1
    stale: float = 0.1
    """An answer to an earlier request again, behind a later one."""
    garbage: float = 0.05
    flood: float = 0.0
    ragged: float = 0.3
    """Ranges that reach into pages in use, whose other half is free."""


class HintAnswers:
    """Serves one hint socket until either end closes it."""

    def __init__(
        self,
        sock: MemorySocket,
        memory: Memory,
        manners: Manners,
        dice: random.Random,
        awake: Callable[[], bool],
    ) -> None:
        self._sock = sock
        self._memory = memory
        self._manners = manners
        self._dice = dice
        self._awake = awake
        self._loop = asyncio.get_running_loop()
        self._decoder = HintDecoder()
        self._told: list[list[bytes]] = []
        sock.watch(self._readable)

    def close(self) -> None:
        self._sock.close()

    def _readable(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        for frame in self._decoder.feed(data):
            self._take(frame)

    def _take(self, frame: HintFrame) -> None:
        dice, manners = self._dice, self._manners
        match frame:
            case Greet():
                hello = Hello(self._memory.contract, Strength.STRONG, PAGE_BYTES, self._memory.pages)
                self._later(self._delay_s(), lambda: self._send([hints.encode(hello)]))
            case Request(epoch):
                if dice.random() < manners.silent:
                    return
                self._later(self._delay_s(), lambda: self._look(epoch))
            case Done():
                if dice.random() < manners.stale and self._told:
                    self._later(self._delay_s(), lambda: self._send(self._told[-1]))

    def _look(self, epoch: int) -> None:
        """At the free list, now; the answer goes a little later still."""
        if not self._awake():
            return
        answer = self._answer(epoch, self._memory.free)
        self._told.append(answer)
        self._later(self._delay_s(), lambda: self._tell(answer))

    def _tell(self, answer: list[bytes]) -> None:
        dice, manners = self._dice, self._manners
        if len(self._told) > 1 and dice.random() < manners.stale:
            self._send(dice.choice(self._told[:-1]))
        if dice.random() < manners.garbage:
            self._send([dice.randbytes(dice.randrange(1, 200))])
        if dice.random() < manners.flood:
            self._send([hints.encode(Ranges(7, ((5, 1),) * 1200))])
        self._send(answer)
        if dice.random() < manners.twice:
            self._later(self._delay_s(), lambda: self._send(answer))

    def _delay_s(self) -> float:
        if self._dice.random() < self._manners.slow:
            return self._dice.random() * self._dice.choice([0.15, 0.15, 3.0])
        return self._dice.random() ** 3 * 0.04

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        self._loop.call_later(seconds, act)

    def _send(self, answer: list[bytes]) -> None:
        if not self._sock.closed:
            try:
                for piece in answer:
                    self._sock.send(piece)
            except BrokenPipeError:
                self.close()

    def _answer(self, epoch: int, free: list[int]) -> list[bytes]:
        pages, dice = self._memory.pages, self._dice
        end = hints.encode(End(epoch, len(free)))
        if dice.random() < 0.4:
            bits = PageBitmap.of(pages, free).to_bytes()
            return [hints.encode(Bitmap(epoch, 0, pages, bits)), end]
        ranges = [(start * PAGE_BYTES, (stop - start) * PAGE_BYTES) for start, stop in _runs(free)]
        if dice.random() < self._manners.ragged:
            ranges = [self._ragged(*pair) for pair in ranges]
        cut = dice.randrange(len(ranges) + 1)
        parts = [ranges[:cut], ranges[cut:]]
        return [*(hints.encode(Ranges(epoch, tuple(part))) for part in parts if part), end]

    def _ragged(self, start: int, length: int) -> tuple[int, int]:
        """Reaching into its neighbours, which are in use but for these bytes."""
        limit = self._memory.pages * PAGE_BYTES
        before, after = (self._dice.randrange(PAGE_BYTES // 2 - 1) for _ in range(2))
        low, high = max(0, start - before), min(limit, start + length + after)
        return low, high - low


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    return list(PageBitmap.of(max(pages, default=0) + 1, pages).runs())
