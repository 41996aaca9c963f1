"""Many seeds, on all cores: their figures summed up, and what failed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

from tests.simulation.runner import Report, fast_place, quick_collections, run_seed

_CHUNK = 25
"""Seeds to a job of a process: a second's work."""


@dataclass
class Figures:
    """Of all seeds that were run."""

    seeds: int = 0
    migrations: int = 0
    starts: int = 0
    compared_pages: int = 0
    condemned: int = 0
    virtual_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    failures: list[Report] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.seeds += 1
        self.migrations += sum(count for name, count in report.outcomes.items() if name.startswith("out "))
        self.starts += report.starts
        self.compared_pages += report.compared_pages
        self.condemned += report.condemned
        self.virtual_s += report.virtual_s
        self.outcomes += report.outcomes
        self.faults += report.faults
        self.states += report.states
        if report.wrongs:
            self.failures.append(report)

    def join(self, other: Figures) -> None:
        for name in ("seeds", "migrations", "starts", "compared_pages", "condemned", "virtual_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.states += other.states
        self.failures += other.failures


def run_some(first: int, count: int, *, faults: bool, place: Path | None = None) -> Figures:
    """``count`` seeds from ``first`` on, in this process; their journals below ``place``."""
    figures = Figures()
    with quick_collections():
        for seed in range(first, first + count):
            figures.add(run_seed(seed, faults=faults, place=place))
    return figures


def run_many(
    figures: Figures, first: int, count: int, *, faults: bool, most_failures: int, told: Callable[[], object]
) -> None:
    """The same on all cores, added to ``figures``; the rest is left out once so many have failed.

    ``told`` whenever the figures have grown. However it ends, no process and no file is left.
    """
    with tempfile.TemporaryDirectory(prefix="migd-simulation-", dir=fast_place()) as place, _pool() as pool:
        jobs = [
            (start, min(_CHUNK, first + count - start), faults, place)
            for start in range(first, first + count, _CHUNK)
        ]
        for part in pool.imap(_run_job, jobs):
            figures.join(part)
            told()
            if len(figures.failures) >= most_failures:
                return


def _run_job(job: tuple[int, int, bool, str]) -> Figures:
    first, count, faults, place = job
    return run_some(first, count, faults=faults, place=Path(place))


def _pool() -> Pool:
    """Its processes are ended with it; an interrupt is for this process alone."""
    cores = len(os.sched_getaffinity(0))
    return get_context("spawn").Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN))
