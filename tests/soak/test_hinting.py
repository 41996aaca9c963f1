"""The manners of a soaked guest: whatever it says, a lie apart, no daemon may take a page in use for free."""

from __future__ import annotations

import random

import numpy as np
import pytest

from migd.guest import hints
from tests.soak.hinting import MANNERS, Manner, Question, sayings
from tests.soak.page import PAGE_BYTES

PAGES = 1003
EPOCH = 1 << 40


def question(rng: random.Random) -> Question:
    free = np.array([rng.random() < 0.6 for _ in range(PAGES)])
    return Question(EPOCH, np.packbits(free, bitorder="little").tobytes(), PAGES)


def claimed(manner: Manner, asked: Question, rng: random.Random) -> set[int]:
    """The pages that a daemon may take for free: in the right epoch, rounded inwards, inside RAM (R7)."""
    decoder = hints.HintDecoder()
    frames = [frame for said in sayings(manner, asked, rng) for frame in decoder.feed(said.data)]
    pages: set[int] = set()
    for frame in frames:
        if isinstance(frame, hints.Ranges) and frame.epoch == EPOCH:
            for start, length in frame.ranges:
                first, stop = -(-start // PAGE_BYTES), (start + length) // PAGE_BYTES
                if length and stop <= PAGES:
                    pages.update(range(first, stop))
        elif isinstance(frame, hints.Bitmap) and frame.epoch == EPOCH:
            first = frame.start // PAGE_BYTES
            bits = np.unpackbits(np.frombuffer(frame.bits, np.uint8), count=frame.pages, bitorder="little")
            pages.update(int(page) + first for page in np.flatnonzero(bits))
    return pages


def free_pages(asked: Question) -> set[int]:
    return {page for start, stop in asked.runs for page in range(start, stop)}


@pytest.mark.parametrize("manner", MANNERS)
def test_no_page_in_use_is_called_free(manner: Manner) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        asked = question(rng)
        assert claimed(manner, asked, rng) <= free_pages(asked)


@pytest.mark.parametrize(
    "manner", [Manner.QUICK, Manner.LATE, Manner.STORM, Manner.STALE, Manner.GARBAGE, Manner.RAGGED]
)
def test_what_is_free_is_said_all_the_same(manner: Manner) -> None:
    rng = random.Random(1)
    asked = question(rng)
    assert claimed(manner, asked, rng) == free_pages(asked)


def test_a_lie_calls_everything_free() -> None:
    rng = random.Random(1)
    asked = question(rng)
    assert claimed(Manner.LIE, asked, rng) == set(range(PAGES)) > free_pages(asked)
