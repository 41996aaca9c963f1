"""Journal: which pages a soaked guest owns and what it stored in each last, in a memory that is not its RAM.

The guest writes it, and whoever has the descriptor reads it: a header of 8 words, a sequence for each page
(0: never stored), a byte for each page (1: owned). A step of the guest is counted when it begins and when it
has ended; where both counts are equal, as in every pause, the journal says exactly what RAM must hold.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_HEAD_WORDS = 8
_STATE, _BEGUN, _ENDED, _SEQUENCE, _SURPRISES = range(5)


class Running(IntEnum):
    """Whether the guest stores anything."""

    NEVER = 0
    """It has not been started here."""
    YES = 1
    PAUSED = 2


class Journal:
    """A mapping of the journal of ``pages`` pages; its descriptor belongs to the caller."""

    def __init__(self, fd: int, pages: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        self._map = mmap.mmap(fd, size(pages), prot=access)
        words = np.frombuffer(self._map, np.uint64, _HEAD_WORDS + pages)
        self._head = words[:_HEAD_WORDS]
        self.sequences: NDArray[np.uint64] = words[_HEAD_WORDS:]
        self.owned: NDArray[np.bool_] = np.frombuffer(self._map, np.bool_, pages, words.nbytes)

    @property
    def state(self) -> Running:
        return Running(int(self._head[_STATE]))

    @state.setter
    def state(self, state: Running) -> None:
        self._head[_STATE] = state

    @property
    def steps(self) -> int:
        """Steps ended so far."""
        return int(self._head[_ENDED])

    @property
    def exact(self) -> bool:
        """No step is half done."""
        return bool(self._head[_BEGUN] == self._head[_ENDED])

    @property
    def sequence(self) -> int:
        """Stores so far: no two ever have the same number."""
        return int(self._head[_SEQUENCE])

    @property
    def surprises(self) -> int:
        """Pages that were not zero when they were allocated, where the guest may rely on it."""
        return int(self._head[_SURPRISES])

    def begin_step(self) -> None:
        self._head[_BEGUN] += 1

    def end_step(self) -> None:
        self._head[_ENDED] += 1

    def surprised(self, pages: int) -> None:
        self._head[_SURPRISES] += pages

    def next_sequences(self, count: int) -> NDArray[np.uint64]:
        """The numbers of the next ``count`` stores."""
        first = self._head[_SEQUENCE] + 1
        self._head[_SEQUENCE] += count
        return np.arange(first, first + count, dtype=np.uint64)

    def free_bits(self) -> bytes:
        """One bit a page, least significant first, 1 = free."""
        return np.packbits(~self.owned, bitorder="little").tobytes()

    def save(self) -> bytes:
        """All of it, to travel with the guest."""
        return self._map[:]

    @property
    def content(self) -> bytes:
        """All but the state."""
        return self._map[8:]

    def load(self, saved: bytes) -> None:
        """What ``save`` gave; the guest has not been started here. ValueError if it is of another size."""
        if len(saved) != len(self._map):
            raise ValueError(f"a journal of {len(saved)} bytes instead of {len(self._map)}")
        self._map[:] = saved
        self.state = Running.NEVER


def size(pages: int) -> int:
    """Of a journal, in bytes."""
    return 8 * (_HEAD_WORDS + pages) + pages


def journal_file(pages: int) -> int:
    """The descriptor of a new, empty one; the caller's."""
    fd = os.memfd_create("soak-journal", os.MFD_CLOEXEC)
    os.ftruncate(fd, size(pages))
    return fd
