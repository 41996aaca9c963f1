"""What a soak prints and writes about its figures."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tests.soak.soak import Soak


def text(soak: Soak) -> str:
    """A few lines for people."""
    figures = soak.figures
    lines = [
        f"{figures.runs} runs of seed {soak.seed} in {figures.lives} lives, {figures.seconds:.0f} s",
        f"  migrations   {figures.attempts} begun, {figures.completed} completed, {figures.cancelled} "
        f"cancelled, {figures.failed_on_purpose} failed on purpose, {figures.failed_otherwise} otherwise; "
        f"{figures.resolved} of them unknown at first",
        f"  compared     {figures.owned_pages} pages in use and {figures.free_pages} free ones, "
        f"{figures.bytes} bytes, in {figures.comparisons} guests before they were started",
        f"  wrong pages  {figures.wrong_pages}; rescued {figures.rescued_pages}",
        f"  left behind  {figures.skipped_pages} free pages, {figures.free_records} FREE records, "
        f"{figures.reclaimed_pages} reclaimed",
        f"  hints        {figures.hints_applied} pages applied, {figures.hints_late} late, "
        f"{figures.hints_stale} stale, {figures.hints_rejected} records rejected",
        *(f"  {line}" for line in _counted("planned", figures.kinds)),
        *(f"  {line}" for line in _counted("came of it", figures.struck)),
        f"  {figures.failed_runs} failed runs: with 95 % confidence a migration goes wrong "
        f"in at most {figures.bound:.3%}",
    ]
    return "\n".join(lines)


def _counted(title: str, counts: dict[str, int]) -> list[str]:
    """As many to a line as fit."""
    words = [f"{name} {count}" for name, count in sorted(counts.items())]
    return [
        f"{title if not at else '':<12} {', '.join(words[at : at + 5])}" for at in range(0, len(words), 5)
    ]


def flat(soak: Soak) -> dict[str, Any]:
    """One flat object for programs; spaces in the names of plans become underscores."""
    figures = soak.figures
    values = {name: value for name, value in vars(figures).items() if not isinstance(value, Counter)}
    counts = {
        f"{title}_{re.sub(r'[^a-z0-9]+', '_', name)}": count
        for title, found in (("planned", figures.kinds), ("came_of", figures.struck))
        for name, count in sorted(found.items())
    }
    return {"seed": soak.seed, **values, **counts, "failure_bound_95": figures.bound}
