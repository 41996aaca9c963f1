"""Hinting: how a soaked guest answers a request for free pages; each way is right, none is polite.

What a guest may say is what was free at one moment after it read the request. All else here must be refused
by what can be seen of it: another epoch, a damaged frame, a range that is none. A LIE is neither: a guest
that says it loses pages, and the oracle has to notice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from migd.guest import hints
from migd.guest.allocator import runs_in
from migd.guest.hint_answers import answer
from tests.soak.page import PAGE_BYTES

_CHUNK_RANGES = 16
_STORM_ROUNDS = 3
_FLOOD_BYTES = 8 << 20
_LONG_AGO = 1000


class Manner(StrEnum):
    """How it answers."""

    QUICK = "quick"
    LATE = "late"
    """After the first read has begun, or after the window has closed."""
    STORM = "storm"
    """Everything several times over, in small frames, on and on; sometimes a flood."""
    PARTIAL = "partial"
    """Half of it, and no END."""
    STALE = "stale"
    """Everything free, in epochs that are over or never were; the answer behind it."""
    GARBAGE = "garbage"
    """Noise, damaged frames, impossible ranges; the answer between."""
    RAGGED = "ragged"
    """Ranges that begin and end within pages in use: to be rounded inwards."""
    SILENT = "silent"
    DYING = "dying"
    """The channel breaks in the middle of a frame, until the guest is somewhere else."""
    LIE = "lie"
    """Everything is free, in the right epoch: a planted fault."""


MANNERS = tuple(manner for manner in Manner if manner is not Manner.LIE)


@dataclass(frozen=True)
class Saying:
    """Bytes for the hint channel, ``delay_s`` after the request; b"" closes it."""

    delay_s: float
    data: bytes


@dataclass(frozen=True)
class Question:
    """A request, and what was free when it was read: one bit a page."""

    epoch: int
    free_bits: bytes
    pages: int

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Maximal runs of free pages, first and one past the last."""
        return list(runs_in(self.free_bits))

    @property
    def answer(self) -> bytes:
        """As the stub guest gives it."""
        return b"".join(answer(self.epoch, self.free_bits, self.pages))

    @property
    def end(self) -> bytes:
        free = int.from_bytes(self.free_bits, "little").bit_count()
        return hints.encode(hints.End(self.epoch, free))

    def everything_free(self, epoch: int) -> bytes:
        return hints.encode(hints.Ranges(epoch, ((0, self.pages * PAGE_BYTES),))) + hints.encode(
            hints.End(epoch, self.pages)
        )


def sayings(manner: Manner, question: Question, rng: random.Random) -> list[Saying]:
    """What to say to a request, in order of time."""
    return sorted(_SAY[manner](question, rng), key=lambda saying: saying.delay_s)


def _quick(question: Question, _rng: random.Random) -> Iterator[Saying]:
    yield Saying(0.0, question.answer)


def _late(question: Question, rng: random.Random) -> Iterator[Saying]:
    yield Saying(rng.choice((rng.uniform(0.01, 0.2), rng.uniform(0.2, 1.0))), question.answer)


def _storm(question: Question, rng: random.Random) -> Iterator[Saying]:
    frames = [_ranges(question.epoch, part) for part in _parts(_single_pages(question, rng))]
    for round_number in range(_STORM_ROUNDS):
        rng.shuffle(frames)
        delay_s = round_number * rng.uniform(0.0, 0.1)
        yield Saying(delay_s, b"".join(frames) + question.end)
    if rng.random() < 0.25:
        yield Saying(0.05, _ranges(question.epoch, [(0, 0)] * _CHUNK_RANGES) * (_FLOOD_BYTES // 284))


def _partial(question: Question, rng: random.Random) -> Iterator[Saying]:
    for part in _parts(question.runs):
        if rng.random() < 0.5:
            yield Saying(rng.uniform(0.0, 0.05), _ranges(question.epoch, _as_bytes(part)))


def _stale(question: Question, rng: random.Random) -> Iterator[Saying]:
    for epoch in (question.epoch - 1, question.epoch - _LONG_AGO, question.epoch + _LONG_AGO):
        yield Saying(rng.uniform(0.0, 0.1), question.everything_free(epoch))
    yield Saying(rng.uniform(0.0, 0.1), question.answer)


def _garbage(question: Question, rng: random.Random) -> Iterator[Saying]:
    ram = question.pages * PAGE_BYTES
    impossible = [(0, 0), (ram, PAGE_BYTES), (ram - PAGE_BYTES, 2 * PAGE_BYTES), (1, (1 << 64) - 1)]
    damaged = bytearray(question.everything_free(question.epoch))
    damaged[rng.randrange(4, 28)] ^= 1 << rng.randrange(8)
    yield Saying(0.0, rng.randbytes(rng.randrange(1, 4096)))
    yield Saying(0.0, bytes(damaged[:44]))
    yield Saying(0.0, question.answer)
    yield Saying(0.01, _ranges(question.epoch, impossible))
    yield Saying(0.01, question.answer[: rng.randrange(1, 28)])


def _ragged(question: Question, rng: random.Random) -> Iterator[Saying]:
    """Up to a page less one byte of the neighbours on either side."""
    ram = question.pages * PAGE_BYTES
    ragged = []
    for start, length in _as_bytes(question.runs):
        low = max(0, start - rng.randrange(PAGE_BYTES))
        ragged.append((low, min(ram, start + length + rng.randrange(PAGE_BYTES)) - low))
    for part in _parts(ragged):
        yield Saying(0.0, _ranges(question.epoch, part))
    yield Saying(0.0, question.end)


def _silent(_question: Question, _rng: random.Random) -> Iterator[Saying]:
    yield from ()


def _dying(question: Question, rng: random.Random) -> Iterator[Saying]:
    said = question.answer
    yield Saying(0.0, said[: rng.randrange(len(said))])
    yield Saying(rng.uniform(0.0, 0.02), b"")


def _lie(question: Question, _rng: random.Random) -> Iterator[Saying]:
    yield Saying(0.0, question.everything_free(question.epoch))


_SAY: dict[Manner, Callable[[Question, random.Random], Iterator[Saying]]] = {
    Manner.QUICK: _quick,
    Manner.LATE: _late,
    Manner.STORM: _storm,
    Manner.PARTIAL: _partial,
    Manner.STALE: _stale,
    Manner.GARBAGE: _garbage,
    Manner.RAGGED: _ragged,
    Manner.SILENT: _silent,
    Manner.DYING: _dying,
    Manner.LIE: _lie,
}


def _single_pages(question: Question, rng: random.Random) -> list[tuple[int, int]]:
    pages = [page for start, stop in question.runs for page in range(start, stop)]
    rng.shuffle(pages)
    return [(page * PAGE_BYTES, PAGE_BYTES) for page in pages]


def _as_bytes(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start * PAGE_BYTES, (stop - start) * PAGE_BYTES) for start, stop in runs]


def _parts(ranges: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for at in range(0, len(ranges), _CHUNK_RANGES):
        yield ranges[at : at + _CHUNK_RANGES]


def _ranges(epoch: int, ranges: list[tuple[int, int]]) -> bytes:
    return hints.encode(hints.Ranges(epoch, tuple(ranges)))
