"""Mutant: one wrong version of a rule, and the search that has to notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Death:
    """How a mutant was noticed: what went wrong, and the shortest way there. An empty trace: it survived."""

    reason: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        steps = "\n".join(f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1))
        return f"{self.reason}, after {len(self.trace)} steps:\n{steps}"


@dataclass(frozen=True)
class Mutant:
    """``docs/proof.md`` has a row for each."""

    number: str
    """As in docs/proof.md; several where one wrong line makes several bugs."""
    name: str
    """The wrong version: a class, or the step of a script."""
    bug: str
    """What it does wrong, in a few words."""
    test: str
    """The test that fails with it: its file and name."""
    kill: Callable[[], Death]
    """Search for a lost page, or a second guest; deterministic."""
