"""No mutant is missing, and the test that kills it is one that pytest runs.

That none survives is held by those tests, and by the table in docs/proof.md, which is made by killing all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.proof.mutant import Death, Mutant
from tests.proof.mutants import EXPECTED, MUTANTS
from tests.proof.table import table

ROOT = Path(__file__).parents[2]


def numbers(mutant: Mutant) -> list[str]:
    return mutant.number.split()


def test_every_bug_that_was_thought_of_has_a_mutant() -> None:
    have = {number for mutant in MUTANTS for number in numbers(mutant)}
    assert set(EXPECTED) <= have
    unknown = {number for number in have - set(EXPECTED) if not re.fullmatch(r"[RGH]\d+", number)}
    assert not unknown, "a number that is neither a bug of the list nor a rule"


def test_no_mutant_is_there_twice() -> None:
    assert len({(mutant.number, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.bug for mutant in MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant.number} {mutant.name}" for mutant in MUTANTS])
def test_a_mutant_has_a_test_that_exists(mutant: Mutant) -> None:
    path, _, name = mutant.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_a_mutant_that_survives_has_no_row() -> None:
    immortal = Mutant("W99", "Right", "none", "nowhere.py::test_nothing", lambda: Death("", ()))
    with pytest.raises(RuntimeError, match="W99 Right survives"):
        table([immortal])
