"""What was measured: the runs of each contender in each case, their medians, and the whole as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from migd.versus.cases import YARDSTICK, Case, Contender, Measured

SCHEMA = 1
"""Of ``Report`` as JSON; grows when a field changes its meaning or goes."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One migration of a freshly booted guest. ``failure``: why it is none."""

    number: int
    """From 1; runs of one number follow one another, a run of each contender."""
    measured: Measured | None = None
    failure: str = ""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A contender in a case: its runs, and what they come to."""

    case: Case
    contender: Contender
    runs: list[Run]

    @property
    def measured(self) -> list[Measured]:
        return [run.measured for run in self.runs if run.measured is not None]

    def median(self, figure: str) -> float:
        """0 if every run failed."""
        values = [getattr(measured, figure) for measured in self.measured]
        return statistics.median(values) if values else 0.0

    def spread(self, figure: str) -> tuple[float, float]:
        values = [getattr(measured, figure) for measured in self.measured]
        return (min(values), max(values)) if values else (0.0, 0.0)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``cores`` of the host; ``emulator`` and ``ram_bytes`` of every guest."""

    schema: int = SCHEMA
    version: str
    kernel: str
    cores: int
    emulator: str
    ram_bytes: int
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        return [
            f"{row.case}, {row.contender}, run {run.number}: {run.failure}"
            for row in self.rows
            for run in row.runs
            if run.failure
        ]

    def of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case is case]


def ratio(rows: Sequence[Row], row: Row, figure: str) -> float | None:
    """How many times as much as the yardstick of the same case; None without one, or if it is that."""
    yard = next((each for each in rows if each.contender is YARDSTICK), None)
    if yard is None or yard is row or not yard.median(figure) or not row.measured:
        return None
    return row.median(figure) / yard.median(figure)
