"""The oracle's teeth, without any daemon: what it must find in RAM, and what it must not complain about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.soak.figures import failure_bound
from tests.soak.journal import Journal, journal_file
from tests.soak.oracle import Comparison, Ram, compare, inspect
from tests.soak.page import KINDS, PAGE_BYTES, PLAIN_KINDS, WORDS, content, verdict

GUEST = 4711
BLOCKS = (700, 65)
"""The first is longer than what the oracle reads at a time, and no multiple of it."""
PAGES = sum(BLOCKS)


class Side:
    """RAM in memfds, as a guest has it."""

    def __init__(self) -> None:
        self.fds = [os.memfd_create("ram") for _ in BLOCKS]
        for fd, pages in zip(self.fds, BLOCKS, strict=True):
            os.ftruncate(fd, pages * PAGE_BYTES)
        self.ram = Ram(self.fds, BLOCKS)

    def store(self, page: int, data: bytes, at: int = 0) -> None:
        block = int(page >= BLOCKS[0])
        os.pwrite(self.fds[block], data, (page - block * BLOCKS[0]) * PAGE_BYTES + at)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Moved:
    """A guest that owns every second page, the same at both ends."""

    def __init__(self) -> None:
        self.source, self.destination = Side(), Side()
        self._journal_fd = journal_file(PAGES)
        self.journal = Journal(self._journal_fd, PAGES, writable=True)
        for page in range(0, PAGES, 2):
            self.own(page)

    def own(self, page: int) -> int:
        """The sequence of the store."""
        sequence = int(self.journal.next_sequences(1)[0])
        self.journal.owned[page], self.journal.sequences[page] = True, sequence
        for side in (self.source, self.destination):
            side.store(page, self.image(page, sequence))
        return sequence

    def own_body(self, page: int) -> int:
        """The same, by a store that is neither of zeros nor of one word over and over."""
        while (sequence := self.own(page)) % KINDS < PLAIN_KINDS:
            pass
        return sequence

    @staticmethod
    def image(page: int, sequence: int, guest: int = GUEST) -> bytes:
        return content(guest, np.array([page], np.uint64), np.array([sequence], np.uint64)).tobytes()

    def sequence(self, page: int) -> int:
        return int(self.journal.sequences[page])

    def compare(self, *, zeroed: bool = False) -> Comparison:
        return compare(GUEST, self.journal, self.source.ram, self.destination.ram, zeroed=zeroed)

    def close(self) -> None:
        self.source.close()
        self.destination.close()
        os.close(self._journal_fd)


@contextmanager
def _moved() -> Iterator[Moved]:
    moved = Moved()
    try:
        yield moved
    finally:
        moved.close()


@pytest.fixture
def moved() -> Iterator[Moved]:
    with _moved() as moved:
        yield moved


def only(found: Comparison) -> tuple[int, str, str]:
    """The one finding: page, side, problem."""
    assert found.wrong_pages == 1, found
    return found.findings[0].page, found.findings[0].side, found.findings[0].problem


def test_what_is_right_is_right_and_all_of_it_was_looked_at(moved: Moved) -> None:
    found = moved.compare(zeroed=True)
    assert (found.owned_pages, found.free_pages, found.wrong_pages) == ((PAGES + 1) // 2, PAGES // 2, 0)
    assert found.bytes == PAGES * PAGE_BYTES
    assert inspect(GUEST, moved.journal, moved.source.ram).owned_pages == found.owned_pages


@pytest.mark.parametrize("page", [0, 512, 698, 700, 764])
@pytest.mark.parametrize("byte", [0, 24, 2000, 4095])
def test_one_wrong_bit_anywhere(moved: Moved, page: int, byte: int) -> None:
    moved.own(page)
    right = moved.image(page, moved.sequence(page))
    moved.destination.store(page, bytes([right[byte] ^ 1]), byte)
    assert only(moved.compare())[:2] == (page, "destination")


def test_each_kind_of_wrong_page_is_called_by_its_name(moved: Moved) -> None:
    old = moved.own_body(700)
    new = moved.own_body(700)
    for wrong, problem in (
        (moved.image(700, old), f"stale: sequence {old} instead of {new}"),
        (bytes(PAGE_BYTES), f"zero instead of sequence {new}"),
        (moved.image(702, new), f"page 702 of guest {GUEST}"),
        (moved.image(700, new, guest=1), "page 700 of guest 1"),
        (
            moved.image(700, new)[:2048] + moved.image(700, old)[2048:],
            f"torn: sequence {new} at its beginning",
        ),
        (b"x" * PAGE_BYTES, "no page of any guest"),
    ):
        moved.destination.store(700, wrong)
        page, side, said = only(moved.compare())
        assert (page, side) == (700, "destination")
        assert said.startswith(problem)


def test_a_source_that_is_not_what_its_guest_stored(moved: Moved) -> None:
    moved.source.store(4, b"x")
    assert only(moved.compare())[:2] == (4, "source")
    assert only(inspect(GUEST, moved.journal, moved.source.ram))[0] == 4


def test_a_free_page_is_zero_or_what_it_was(moved: Moved) -> None:
    """Stale bytes of an earlier round, or of another owner, are wrong under every contract (R11)."""
    old = moved.image(701, 1)
    moved.source.store(701, old)
    assert moved.compare().wrong_pages == 0
    moved.destination.store(701, old)
    assert moved.compare().wrong_pages == 0
    assert only(moved.compare(zeroed=True))[0] == 701
    moved.destination.store(701, moved.image(701, 2))
    assert only(moved.compare()) == (701, "destination", "free, and neither zero nor as at the source")


def test_pages_are_all_different_and_some_are_zero() -> None:
    sequences = np.arange(1, 2 * KINDS, dtype=np.uint64)
    rows = content(GUEST, np.zeros_like(sequences), sequences)
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert [int(number) for number in sequences[~rows.any(axis=1)]] == [KINDS]
    assert rows.shape[1] == WORDS
    assert [verdict(row, GUEST, 0, int(n)) for row, n in zip(rows, sequences, strict=True)] == [""] * len(
        rows
    )


def test_the_bound_of_failures() -> None:
    """None: three in so many. Else the one-sided bounds of Clopper and Pearson, from their tables."""
    assert failure_bound(0, 1000) == 0.003
    assert failure_bound(1, 100) == pytest.approx(0.04656, abs=1e-5)
    assert failure_bound(5, 50) == pytest.approx(0.19884, abs=1e-4)
    assert failure_bound(3, 3) == pytest.approx(1.0)
    assert failure_bound(0, 0) == 1.0
