"""Bounds: the searches of the hand-over, and how many states each must have at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.handover.world import Budget


@dataclass(frozen=True)
class Bounds:
    """One complete search."""

    name: str
    budgets: Mapping[Budget, int]
    at_least: int
    """States, so that a model that has shrunk is noticed."""


def budgets(**bounds: int) -> dict[Budget, int]:
    """By the lower-case names of ``Budget``."""
    return {Budget[name.upper()]: bound for name, bound in bounds.items()}


_ONE = budgets(attempt=1, source_crash=1, destination_crash=1, cut=1)

ONE_OF_EACH = Bounds("one crash a side, one cut", _ONE, 24_000)
TWO_OF_EACH = Bounds(
    "two crashes a side, two cuts", budgets(attempt=1, source_crash=2, destination_crash=2, cut=2), 110_000
)
ONE_WORD = Bounds("and the operator has a word", {**_ONE, Budget.WORD: 1}, 85_000)
ONE_KILL = Bounds("and a guest is killed", {**_ONE, Budget.KILL: 1}, 70_000)
ONE_FULL = Bounds("and a journal cannot be written", {**_ONE, Budget.FULL: 1}, 55_000)
TWO_ATTEMPTS = Bounds("two attempts, one cut", budgets(attempt=2, cut=1), 30_000)

SEARCHES = (ONE_OF_EACH, TWO_OF_EACH, ONE_WORD, ONE_KILL, ONE_FULL, TWO_ATTEMPTS)
"""Those of the test suite; ``scripts/handover`` goes as far as it is asked to."""
