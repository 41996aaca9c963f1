"""Every wrong hand-over dies, with the shortest way there.

Within the same bounds the right one lives: those are among the searches of ``test_handover_model.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.handover.bounds import SEARCHES
from tests.handover.mutants import MUTANTS, WRONG
from tests.proof.mutant import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_wrong_hand_over_is_noticed(mutant: Mutant, capsys: Any) -> None:
    death = mutant.kill()
    with capsys.disabled():
        print(f"\n  {mutant.number} {mutant.bug}: {death}")  # noqa: T201  # the trace is what it is read for
    assert death.trace, f"{mutant.name} survives"


def test_the_right_hand_over_is_searched_where_the_wrong_ones_die() -> None:
    """Else a search that finds fault with anything would kill them all."""
    searched = [bounds.budgets for bounds in SEARCHES]
    assert all(bounds in searched for _, _, bounds in WRONG)
    assert {mutant.number for mutant in MUTANTS} >= {f"H{number}" for number in range(1, 8)}
