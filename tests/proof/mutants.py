"""All mutants, of the ledger and of the hand-over, in the order of docs/proof.md.

PC1 to PC5 are of post-copy, which migd does not have.
"""

from __future__ import annotations

from tests.handover import mutants as handover
from tests.ledger import mutants as ledger
from tests.proof.mutant import Mutant

EXPECTED = [
    *(f"W{number:02}" for number in (*range(1, 18), *range(20, 26))),
    *(f"H{number}" for number in range(1, 8)),
]
"""Numbers that must not be missing; a mutant of another rule has the rule's number."""

MUTANTS: list[Mutant] = [*ledger.MUTANTS, *handover.MUTANTS]
