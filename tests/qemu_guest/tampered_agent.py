"""An agent that misbehaves, in the guest's own place for it: the real one is beside it, as ``honest``.

Real-time signals tell it how: SIGRTMIN plus the number of a ``Manner``. SIGUSR1 has it go on after a stop.
But for ``ALL`` its answers hold the truth besides: a host that takes nothing else has good hints.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Iterator
from enum import IntEnum
from itertools import islice

import honest

GIB = 1 << 30
LAST = (1 << 64) - 1
HALF_WINDOWS = 3
"""The first one is below 1 MiB."""


class Manner(IntEnum):
    """How it answers."""

    HONEST = 0
    LIES = 1
    """Names what is no RAM, or nobody asked for, and counts wrong."""
    NOISE = 2
    """Damaged frames, and no frames at all, in between; all of RAM is in them."""
    FLOOD = 3
    """The same again and again."""
    HALF = 4
    """Stops after ``HALF_WINDOWS`` of an answer, until SIGUSR1."""
    NO_END = 5
    """Never says that the answer is complete."""
    ALL = 6
    """Calls every page free, those in use as well: the guest dies of it."""


class TamperedGuest(honest.Guest):
    """Answers in the manner of the moment."""

    manner = Manner.HONEST
    goes_on = False

    def answer(self, epoch: int) -> Iterator[bytes]:
        true = list(super().answer(epoch)) if self.manner is not Manner.HALF else super().answer(epoch)
        match self.manner:
            case Manner.LIES:
                return self._lies(epoch, true)
            case Manner.NOISE:
                return self._noise(epoch, true)
            case Manner.FLOOD:
                return self._flood(true[:-1])
            case Manner.HALF:
                return self._half(true)
            case Manner.NO_END:
                return iter(true[:-1])
            case Manner.ALL:
                return iter([everything(epoch, self.pages), true[-1]])
            case _:
                return iter(true)

    def _lies(self, epoch: int, true: list[bytes]) -> Iterator[bytes]:
        yield ranges(epoch, self._not_ram())
        yield ranges(epoch, self._less_than_a_page())
        for wrong_epoch in (0, 1, epoch - 1, epoch + 1, epoch ^ 1 << 32, LAST):
            yield ranges(wrong_epoch, [(0, self.pages * 4096)])
            yield everything(wrong_epoch, self.pages)
        yield from true[:-1]
        yield honest.encode(honest.END, epoch, struct.pack("<Q", LAST))

    def _not_ram(self) -> list[tuple[int, int]]:
        """Below 1 MiB, the PCI hole, beyond RAM, nothing at all, and around the end of all numbers."""
        end = self.pages * 4096
        return [
            (0, 0xA0000),
            (0xA0000, 0x60000),
            (0xC0000000 if end > 0xC0000000 else end, GIB),
            (0xFEC00000, 0x1400000),
            (end, 1 << 40),
            (LAST - 4095, 4096),
            (LAST - 4095, LAST),
            (1 << 20, 0),
        ]

    def _less_than_a_page(self) -> list[tuple[int, int]]:
        """All of every page but its first or its last byte, in 800 places of RAM, free or not."""
        found = []
        for run in self.ram:
            step = max(2, (run.stop - run.first) // 400)
            for page in range(run.first, run.stop - 1, step):
                found += [(page * 4096 + 1, 4095), ((page + 1) * 4096, 4095)]
        return found[:800]

    def _noise(self, epoch: int, true: list[bytes]) -> Iterator[bytes]:
        lie = ranges(epoch, [(0, self.pages * 4096)])
        for frame in true:
            yield os.urandom(300)
            yield lie[:-1]
            yield lie[:20] + b"?" + lie[21:]
            yield honest.encode(99, epoch, lie[28:])
            yield honest.encode(honest.RANGES, epoch, lie[28:-1])
            yield frame

    def _flood(self, true: list[bytes]) -> Iterator[bytes]:
        while self.manner is Manner.FLOOD:
            yield from true

    def _half(self, true: Iterator[bytes]) -> Iterator[bytes]:
        self.goes_on = False
        yield from islice(true, HALF_WINDOWS)
        while not self.goes_on:
            time.sleep(0.02)
        yield from true


def ranges(epoch: int, pieces: list[tuple[int, int]]) -> bytes:
    body = b"".join(struct.pack("<QQ", start, length & LAST) for start, length in pieces)
    return honest.encode(honest.RANGES, epoch & LAST, body)


def everything(epoch: int, pages: int) -> bytes:
    """A bitmap in which every page is free."""
    window = honest.Run(0, pages - pages % 64)
    return honest.encode(honest.BITMAP, epoch & LAST, honest._bitmap(window, b"1" * window.stop))


def main() -> None:
    guest = TamperedGuest()

    def change(number: int, _frame: object) -> None:
        guest.manner = Manner(number - signal.SIGRTMIN)

    def go_on(_number: int, _frame: object) -> None:
        guest.goes_on = True

    for manner in Manner:
        signal.signal(signal.SIGRTMIN + manner, change)
    signal.signal(signal.SIGUSR1, go_on)
    place = honest.PortPlace(None, None)
    honest.Agent(place, guest).run()


if __name__ == "__main__":
    main()
