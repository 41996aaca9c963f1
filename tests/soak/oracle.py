"""The oracle: RAM at both ends of a migration against what the guest itself wrote down, byte by byte.

Nothing of migd's own bookkeeping is asked. RAM is read through the guests' descriptors by preadv, which
leaves holes as they are. Both guests stand still: one is paused, the other has not been started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.soak.journal import Journal
from tests.soak.page import PAGE_BYTES, WORDS, Numbers, Rows, content, header, verdict

_CHUNK_PAGES = 512
"""2 MiB of either side stay in the cache until all has been asked of them."""
MAX_FINDINGS = 16


@dataclass(frozen=True)
class Finding:
    """One wrong page: where, what is wrong with it, and the words that say what lies there."""

    page: int
    side: str
    """``source`` or ``destination``; ``guest`` where there is one side only."""
    problem: str
    headers: dict[str, str]
    """By side."""
    content: bytes = field(repr=False)


@dataclass
class Comparison:
    """What a look at all of RAM found; the first ``MAX_FINDINGS`` wrong pages in detail."""

    owned_pages: int = 0
    free_pages: int = 0
    wrong_pages: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Compared, at the destination."""
        return (self.owned_pages + self.free_pages) * PAGE_BYTES


class Ram:
    """The RAM of a guest, through the descriptors of its blocks."""

    def __init__(self, fds: Sequence[int], block_pages: Sequence[int]) -> None:
        self._blocks = list(zip(fds, block_pages, strict=True))

    def chunks(self) -> Iterator[tuple[int, Rows]]:
        """First page and content, in order; the content is valid until the next one."""
        buffer = np.empty((_CHUNK_PAGES, WORDS), np.uint64)
        base = 0
        for fd, pages in self._blocks:
            for first in range(0, pages, _CHUNK_PAGES):
                rows = buffer[: min(_CHUNK_PAGES, pages - first)]
                got = os.preadv(fd, [rows.data], first * PAGE_BYTES)
                assert got == rows.nbytes, f"RAM of {pages} pages ends in page {first + got // PAGE_BYTES}"
                yield base + first, rows
            base += pages


def compare(guest: int, journal: Journal, source: Ram, destination: Ram, *, zeroed: bool) -> Comparison:
    """Every page of ``destination`` before it is started, and of the paused ``source``, by its journal.

    An owned page is what the journal says, on both sides. A free page is zero at the destination, or as at
    the source (R11); where free pages are ``zeroed`` it is zero on both.
    """
    found = Comparison()
    for (first, here), (_, there) in zip(source.chunks(), destination.chunks(), strict=True):
        _compare_owned(found, guest, journal, first, {"source": here, "destination": there})
        free = ~journal.owned[first : first + len(here)]
        pages = np.arange(first, first + len(here))[free]
        _compare_free(found, pages, {"source": here[free], "destination": there[free]}, zeroed=zeroed)
    return found


def inspect(guest: int, journal: Journal, ram: Ram) -> Comparison:
    """Every owned page of one guest that stands still."""
    found = Comparison()
    for first, rows in ram.chunks():
        _compare_owned(found, guest, journal, first, {"guest": rows})
    return found


def _compare_owned(
    found: Comparison, guest: int, journal: Journal, first: int, sides: Mapping[str, Rows]
) -> None:
    """``sides`` hold the same pages, from page ``first`` on."""
    count = len(next(iter(sides.values())))
    owned = journal.owned[first : first + count]
    pages = np.arange(first, first + count, dtype=np.uint64)[owned]
    sequences = journal.sequences[first : first + count][owned]
    expected = content(guest, pages, sequences)
    held = {side: rows[owned] for side, rows in sides.items()}
    wrong = {side: (rows != expected).any(axis=1) for side, rows in held.items()}
    found.owned_pages += len(pages)
    found.wrong_pages += int(np.count_nonzero(np.any(list(wrong.values()), axis=0)))
    for side, marks in wrong.items():
        for at in np.flatnonzero(marks):
            page = int(pages[at])
            problem = verdict(held[side][at], guest, page, int(sequences[at]))
            _note(found, page, side, problem, {name: rows[at] for name, rows in held.items()})


def _compare_free(
    found: Comparison, pages: NDArray[np.int64], sides: Mapping[str, Rows], *, zeroed: bool
) -> None:
    here, there = sides["source"], sides["destination"]
    holds = there.any(axis=1)
    wrong = holds | here.any(axis=1) if zeroed else holds & (there != here).any(axis=1)
    problem = "free, and not zero" if zeroed else "free, and neither zero nor as at the source"
    found.free_pages += len(pages)
    found.wrong_pages += int(np.count_nonzero(wrong))
    for at in np.flatnonzero(wrong):
        page = int(pages[at])
        _note(found, page, "destination", problem, {name: rows[at] for name, rows in sides.items()})


def _note(found: Comparison, page: int, side: str, problem: str, held: Mapping[str, Numbers]) -> None:
    if len(found.findings) < MAX_FINDINGS:
        headers = {name: header(row) for name, row in held.items()}
        found.findings.append(Finding(page, side, problem, headers, held[side].tobytes()))
