"""What the bench found: a run, the median and spread of a contender's runs, and the whole as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from migd.bench.cases import Contender, GuestOptions
from migd.bench.machine_limits import MachineLimits
from migd.bench.usage import Usage
from migd.migration.stats import Result
from migd.ram.block import PAGE_BYTES

SCHEMA = 1
"""Of ``BenchReport`` as JSON; grows when a field changes its meaning or goes."""


class Measured(msgspec.Struct, kw_only=True):
    """A migration that was attempted, and what it cost both daemons."""

    result: Result
    source: Usage
    destination: Usage


class Run(msgspec.Struct, kw_only=True):
    """One migration of a fresh guest between fresh daemons. ``failures``: why it proves nothing."""

    number: int
    """From 1; runs of one number follow one another, a run of each contender."""
    measured: Measured | None = None
    failures: list[str] = msgspec.field(default_factory=list)


Figure: TypeAlias = Callable[[Measured], float]

FIGURES: dict[str, Figure] = {
    "total_s": lambda run: run.result.total_s,
    "downtime_s": lambda run: run.result.downtime.guest_s,
    "pause_s": lambda run: run.result.downtime.pause_s,
    "send_s": lambda run: run.result.downtime.send_s,
    "verify_s": lambda run: run.result.downtime.verify_s,
    "ready_s": lambda run: run.result.downtime.ready_s,
    "go_s": lambda run: run.result.downtime.go_s,
    "iterations": lambda run: len(run.result.iterations),
    "wire_bytes": lambda run: run.result.wire_bytes,
    "sent_pages": lambda run: run.result.sent_pages,
    "zero_pages": lambda run: run.result.zero_pages,
    "skipped_free_pages": lambda run: run.result.skipped_free_pages,
    "hole_pages": lambda run: run.result.hole_pages,
    "ram_gb_s": lambda run: _per_second(run.result.ram_pages * PAGE_BYTES, run.result),
    "content_gb_s": lambda run: _per_second(run.result.page_bytes, run.result),
    "wire_gb_s": lambda run: _per_second(run.result.wire_bytes, run.result),
    "source_cpu_s": lambda run: run.source.cpu_s,
    "destination_cpu_s": lambda run: run.destination.cpu_s,
    "source_anon_bytes": lambda run: run.source.peak_anon_bytes,
    "destination_anon_bytes": lambda run: run.destination.peak_anon_bytes,
}
"""Every figure of a run by its name in JSON. Rates are over the total, in 10^9 bytes a second: of all RAM, of
the content of the pages sent, and of what crossed the network."""


def _per_second(size_bytes: int, result: Result) -> float:
    return size_bytes / result.total_s / 1e9


class Spread(msgspec.Struct, frozen=True):
    """Of one figure over the runs of a contender."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """At least one value."""
        return cls(statistics.median(values), min(values), max(values))


class ContenderReport(msgspec.Struct, kw_only=True):
    """A row of the table."""

    case: str
    label: str
    hints: bool
    guest: GuestOptions
    figures: dict[str, Spread]
    """By the names of FIGURES, over the runs without failures; empty if there is none."""
    runs: list[Run]

    @classmethod
    def of(cls, contender: Contender, runs: list[Run]) -> ContenderReport:
        good = [run.measured for run in runs if run.measured is not None and not run.failures]
        return cls(
            case=contender.case,
            label=contender.label,
            hints=contender.hints,
            guest=contender.guest,
            figures={name: Spread.of([of(run) for run in good]) for name, of in FIGURES.items() if good},
            runs=runs,
        )


class BenchReport(msgspec.Struct, kw_only=True):
    """Everything that was measured, and on what; what ``--json`` writes."""

    schema: int = SCHEMA
    version: str
    kernel: str
    cores: int
    ram_bytes: int
    options: dict[str, str | int]
    """Of the migrations, where they were not the defaults."""
    limits: MachineLimits
    contenders: list[ContenderReport]

    @property
    def failures(self) -> list[str]:
        """A line for each, with contender and run."""
        return [
            f"{contender.label}, run {run.number}: {failure}"
            for contender in self.contenders
            for run in contender.runs
            for failure in run.failures
        ]


def failures_of(result: Result, *, hints: bool) -> Iterator[str]:
    """Why a run is no proof that memory arrived right, or not what its row says.

    A guest that owns every page has nothing to hint.
    """
    if result.outcome != "completed":
        yield f"the migration {result.outcome}: {result.error}"
    elif not result.checked_pages:
        yield "the guest did not report its own check at the destination"
    elif result.wrong_pages:
        yield f"the guest found {result.wrong_pages} of {result.checked_pages} pages wrong"
    elif hints and result.hints != "used" and result.checked_pages < result.ram_pages:
        yield f"its hints were not used: {result.hints}"
