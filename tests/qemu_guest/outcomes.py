"""Outcomes: what became of the cells of a matrix, told as they come, and as tables in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from tests.qemu_guest.cells import Boot, Cell, Log, chosen_cells
from tests.qemu_guest.scribble import Round
from tests.qemu_guest.travel import Travelled
from tests.support.markdown import table


@dataclass
class Row:
    """The cells of one boot with one log."""

    cells: int = 0
    pages: int = 0
    looked_at: int = 0
    sent: int = 0
    skipped: int = 0
    left: int = 0
    free_records: int = 0

    def add(self, travelled: Travelled) -> None:
        result, compared = travelled
        self.cells += 1
        self.pages += compared.pages
        self.looked_at += compared.looked_at
        self.sent += result.sent_pages
        self.skipped += result.skipped_free_pages
        self.left += compared.left
        self.free_records += result.free_records

    def columns(self) -> list[str]:
        return [str(value) for value in vars(self).values()]


_HEAD = (
    *("guest", "log", "cells right", "pages of RAM", "compared", "sent", "skipped"),
    *("skipped, not zero at the source", "FREE records"),
)
_SCRIBBLE_HEAD = ("scribbled over", "rounds", "hinted", "written since", "overwritten")


def _titled(title: str, head: Sequence[str], lines: list[list[str]]) -> str:
    """A table, if it has lines."""
    return title + table(head, lines) if lines else ""


@dataclass
class Outcomes:
    """Of ``total`` cells and any number of scribbles; ``title``: where it was."""

    title: str
    total: int
    done: int = 0
    rows: dict[tuple[Boot, Log], Row] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    """Why cells were skipped, and how many."""
    scribbles: list[tuple[str, list[Round]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def arrived(self, cell: Cell, travelled: Travelled, seconds: float) -> None:
        self.rows.setdefault((cell.boot, cell.move.log), Row()).add(travelled)
        skipped, left = travelled.result.skipped_free_pages, travelled.compared.left
        self._tell(
            cell, f"right, {skipped} pages skipped, {left} of them not zero at the source, {seconds:.1f} s"
        )

    def skipped(self, cell: Cell, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self._tell(cell, f"skipped: {reason}")

    def failed(self, cell: Cell, why: str) -> None:
        self.faults.append(f"{cell}: {why}")
        self._tell(cell, f"FAILED: {why}")

    def ended(self, boot: Boot, why: str) -> None:
        """The guests were right, and something else was not: a daemon met a bug of its own."""
        self.faults.append(f"{boot}, at the end: {why}")
        click.echo(f"{boot}, at the end: FAILED: {why}", err=True)

    def lived(self, label: str, rounds: list[Round]) -> None:
        self.scribbles.append((label, rounds))
        click.echo(f"scribbled over {label}: {len(rounds)} rounds, and it lives", err=True)

    def died(self, label: str, why: str) -> None:
        self.faults.append(f"scribbled over {label}: {why}")
        click.echo(f"scribbled over {label}: FAILED: {why}", err=True)

    def _tell(self, cell: Cell, what: str) -> None:
        self.done += 1
        click.echo(f"[{self.done:>3}/{self.total}] {cell}: {what}", err=True)

    @property
    def right(self) -> int:
        return sum(row.cells for row in self.rows.values())

    def text(self) -> str:
        """Markdown."""
        looked_at = sum(row.looked_at for row in self.rows.values())
        chosen = [[str(cell.boot), str(cell.move)] for cell in chosen_cells()]
        parts = [
            f"{self.title}: {self.right} of {self.total} cells right, {len(self.faults)} faults. {looked_at} "
            f"pages compared byte by byte, 0 wrong.\n",
            *(f"{count} cells skipped: {reason}.\n" for reason, count in self.reasons.items()),
            _titled("", _HEAD, self._lines()),
            _titled("", _SCRIBBLE_HEAD, self._scribbled()),
            _titled("Every test run tries these, with every pair of values:\n\n", ("guest", "moved"), chosen),
            "".join(f"FAULT: {fault}\n" for fault in self.faults),
        ]
        return "\n".join(part for part in parts if part)

    def _lines(self) -> list[list[str]]:
        return [[str(boot), str(log), *row.columns()] for (boot, log), row in self.rows.items()]

    def _scribbled(self) -> list[list[str]]:
        kinds = ("hinted", "written", "scribbled")
        return [
            [label, str(len(rounds)), *(str(sum(getattr(each, kind) for each in rounds)) for kind in kinds)]
            for label, rounds in self.scribbles
        ]

    def figures(self) -> dict[str, Any]:
        """One flat object."""
        rows = self.rows.values()
        rounds = [each for _, done in self.scribbles for each in done]
        return {
            "cells": self.total,
            "right": self.right,
            "skipped_cells": sum(self.reasons.values()),
            "faults": len(self.faults),
            "compared_pages": sum(row.looked_at for row in rows),
            "sent_pages": sum(row.sent for row in rows),
            "skipped_pages": sum(row.skipped for row in rows),
            "left_pages": sum(row.left for row in rows),
            "free_records": sum(row.free_records for row in rows),
            "scribble_rounds": len(rounds),
            "scribbled_pages": sum(each.scribbled for each in rounds),
        }
