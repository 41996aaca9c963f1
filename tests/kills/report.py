"""Report: the figures of a run of kills, as text and as one flat JSON object."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.kills.outcome import Outcome
from tests.kills.settling import Where


@dataclass
class Report:
    """Figures of all kills so far; ``faults`` names whatever was not survived."""

    seed: int
    rounds: int = 0
    kills: int = 0
    """Cells of the matrix: one guest in one phase, hit by one kill."""
    interruptions: int = 0
    """The same for what was not killed but held up."""
    random_kills: int = 0
    random_migrations: int = 0
    survived: int = 0
    split_brains: int = 0
    unknown: int = 0
    """Outcomes that nobody can know, each with its own exit code and `migd resolve` as the next step."""
    pages_checked: int = 0
    wrong_pages: int = 0
    second_migrations: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    """Of random kills: the state of the migration right before."""
    faults: list[str] = field(default_factory=list)

    def add(self, label: str, outcome: Outcome) -> None:
        """One migration that a kill hit."""
        found = outcome.faults()
        self.faults += [f"{label}: {fault}" for fault in found]
        self.survived += not found
        self.split_brains += outcome.split
        self.unknown += outcome.where in (Where.UNKNOWN, Where.CONDEMNED)
        self.pages_checked += outcome.checked[0] if outcome.checked is not None else 0
        self.wrong_pages += outcome.wrong_pages
        self.second_migrations += outcome.moved_again == "completed"
        self.ends[outcome.where.name.lower() if outcome.where is not None else "none"] += 1

    def text(self) -> str:
        lines = [
            f"seed {self.seed}",
            f"rounds of the matrix: {self.rounds}",
            f"kills in it: {self.kills}; interruptions: {self.interruptions}",
            f"kills at random moments: {self.random_kills}, which hit {self.random_migrations} migrations",
            f"  in the states: {_listed(self.moments)}",
            f"survived: {self.survived} of {self.kills + self.interruptions + self.random_migrations}",
            f"ended at: {_listed(self.ends)}",
            f"split brains: {self.split_brains}",
            f"unknown, with the next step named: {self.unknown}",
            f"second migrations of guests that had stayed: {self.second_migrations}",
            f"pages checked: {self.pages_checked}, wrong: {self.wrong_pages}",
        ]
        return "\n".join([*lines, *(f"FAULT: {fault}" for fault in self.faults)])

    def figures(self) -> dict[str, Any]:
        """One flat object."""
        figures = {**vars(self), "faults": len(self.faults)}
        figures |= {f"ended_{end}": count for end, count in figures.pop("ends").items()}
        figures |= {
            f"killed_in_{state.replace(' ', '_').replace('-', '_')}": count
            for state, count in figures.pop("moments").items()
        }
        return figures


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
