"""Cells: how a guest is run and how it is moved, all combinations, and a choice that tries every pair.

A guest is booted once for several cells, so a cell is a ``Boot`` and a ``Move``. The choice is computed, not
kept: the same factors give the same cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import TypeVar

from migd.lab.workbench import MIB


class Qemu(StrEnum):
    """Which of those that the lab has."""

    OLDEST = "installed"
    NEWEST = "newest"


class Machine(StrEnum):
    PC = "pc"
    Q35 = "q35"


class Size(StrEnum):
    """RAM: where the PCI hole does not matter, and where it splits RAM in two."""

    BELOW = "below the split"
    ABOVE = "above the split"


class Load(StrEnum):
    """What the guest does."""

    IDLE = "idle"
    BUSY = "busy"
    HOG = "after a hog"


class Log(StrEnum):
    """How its writes are found."""

    USERFAULTFD = "userfaultfd"
    COMPARE = "compare"
    SOFT_DIRTY = "soft-dirty"


class Compression(StrEnum):
    LZ4 = "lz4"
    NONE = "none"


RAM_BYTES = {
    (Machine.PC, Size.BELOW): 256 * MIB,
    (Machine.Q35, Size.BELOW): 256 * MIB,
    (Machine.PC, Size.ABOVE): 3584 * MIB,
    (Machine.Q35, Size.ABOVE): 2816 * MIB,
}
"""Above: the least RAM that is split, at 3 GiB and at 2 GiB."""


@dataclass(frozen=True)
class Boot:
    """What a guest is booted with."""

    qemu: Qemu
    machine: Machine
    size: Size
    init_on_free: bool

    @property
    def ram_bytes(self) -> int:
        return RAM_BYTES[self.machine, self.size]

    def __str__(self) -> str:
        zeroing = "init_on_free" if self.init_on_free else "plain"
        return f"{self.qemu} {self.machine} {self.ram_bytes // MIB} MiB {zeroing}"


@dataclass(frozen=True)
class Move:
    """What a guest does while it is moved, and how it is moved."""

    load: Load
    log: Log
    streams: int
    compression: Compression

    def __str__(self) -> str:
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{self.load}, {self.log}, {streams}, {self.compression}"


@dataclass(frozen=True)
class Cell:
    boot: Boot
    move: Move

    def __str__(self) -> str:
        return f"{self.boot}: {self.move}"


BOOTS = [Boot(*values) for values in itertools.product(Qemu, Machine, Size, (False, True))]
MOVES = [Move(*values) for values in itertools.product(Load, Log, (1, 2), Compression)]
CELLS = [Cell(boot, move) for boot in BOOTS for move in MOVES]

TRACKED = [move for move in MOVES if move.log is not Log.SOFT_DIRTY]
"""Those of a kernel without soft-dirty marks, as of Debian's."""

T = TypeVar("T")


def pairs(row: Sequence[object]) -> Iterator[tuple[tuple[int, object], tuple[int, object]]]:
    """Every two factors of a row with their values."""
    return itertools.combinations(enumerate(row), 2)


def pairwise(rows: Sequence[T], values: dict[T, tuple[object, ...]]) -> list[T]:
    """A few of the rows, with every pair of values that any row has: greedily, the first best."""
    missing = {pair for row in rows for pair in pairs(values[row])}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing.intersection(pairs(values[row]))))
        missing.difference_update(pairs(values[best]))
        chosen.append(best)
    return chosen


def chosen_cells() -> list[Cell]:
    """Few boots with every pair of what guests are booted with, and of those few cells with every pair."""
    boots = pairwise(BOOTS, {boot: astuple(boot) for boot in BOOTS})
    cells = [Cell(boot, move) for boot in boots for move in TRACKED]
    found = pairwise(cells, {cell: (*astuple(cell.boot), *astuple(cell.move)) for cell in cells})
    return sorted(found, key=CELLS.index)


def factors() -> list[str]:
    """The names of what differs between cells."""
    return [field.name for kind in (Boot, Move) for field in fields(kind)]
