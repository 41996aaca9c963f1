"""Figures of a soak: what was moved, looked at and found, and what that says about the next migration."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from migd.migration.stats import Result
from tests.soak.oracle import Comparison
from tests.soak.plan import Run

CONFIDENCE = 0.95


@dataclass
class Figures:
    """Sums over runs. A run is one that ended with the guest moved and compared, or else is ``failed``."""

    runs: int = 0
    lives: int = 0
    attempts: int = 0
    """Migrations begun."""
    completed: int = 0
    cancelled: int = 0
    failed_on_purpose: int = 0
    failed_otherwise: int = 0
    """Without any trouble that was planned."""
    resolved: int = 0
    """Whose outcome was unknown to the source, and asked for."""
    comparisons: int = 0
    owned_pages: int = 0
    free_pages: int = 0
    bytes: int = 0
    wrong_pages: int = 0
    problems: int = 0
    rescued_pages: int = 0
    reclaimed_pages: int = 0
    skipped_pages: int = 0
    free_records: int = 0
    late_dirty_pages: int = 0
    hints_applied: int = 0
    hints_late: int = 0
    hints_stale: int = 0
    hints_rejected: int = 0
    failed_runs: int = 0
    """Where anything at all was wrong: these count in the bound."""
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    """Of plans: ``manner storm``, ``trouble rst at pause`` and so on."""
    struck: Counter[str] = field(default_factory=Counter)
    """Of troubles that really came: ``rst: failed``."""

    def plan(self, run: Run) -> None:
        """A run begins."""
        self.runs += 1
        moment = f" at {run.moment}" if run.trouble != "none" else ""
        self.kinds.update(
            (
                f"manner {run.behaviour.manner}",
                f"trouble {run.trouble}{moment}",
                f"dirty log {run.request.dirty_log}",
                f"verify {run.request.verify}",
                f"streams {run.request.streams}",
            )
        )

    def result(self, result: Result) -> None:
        """What migd says of an attempt that is over."""
        self.attempts += 1
        self.completed += result.outcome == "completed"
        self.cancelled += result.outcome == "cancelled"
        self.rescued_pages += result.rescued_pages
        self.reclaimed_pages += result.reclaimed_pages
        self.skipped_pages += result.skipped_free_pages
        self.free_records += result.free_records
        self.late_dirty_pages += result.late_dirty_pages
        self.hints_applied += result.hints_applied
        self.hints_late += result.hints_late
        self.hints_stale += result.hints_stale
        self.hints_rejected += result.hints_rejected

    def compared(self, found: Comparison) -> None:
        """What the oracle says of one that was started."""
        self.comparisons += 1
        self.owned_pages += found.owned_pages
        self.free_pages += found.free_pages
        self.bytes += found.bytes
        self.wrong_pages += found.wrong_pages

    @property
    def bound(self) -> float:
        """With 95 % confidence a migration goes wrong no more often than this."""
        return failure_bound(self.failed_runs, self.runs)


def failure_bound(failures: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The upper bound of the probability of a failure, seen ``failures`` of them in ``trials``.

    None seen: 3 in ``trials`` (the rule of three). Else Clopper and Pearson's: the largest probability under
    which so few have a chance of more than 1 - ``confidence``.
    """
    if failures == 0:
        return min(1.0, 3 / trials) if trials else 1.0
    low, high = failures / trials, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(failures, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(failures: int, trials: int, probability: float) -> float:
    """The chance of that many or fewer."""
    if probability >= 1:
        return float(failures >= trials)
    log_yes, log_no = math.log(probability), math.log1p(-probability)
    terms = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_yes
        + (trials - k) * log_no
        for k in range(failures + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, terms))
