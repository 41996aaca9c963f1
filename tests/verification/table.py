"""What the tests of this directory hold, as tables for docs/proof.md."""

from __future__ import annotations

from tests.support.markdown import table
from tests.verification.checks import EXPECTED, Check
from tests.verification.planted import BUGS
from tests.verification.writes import WAYS


def planted_bugs() -> str:
    """Which check finds which bug; held by ``tests/verification/test_planted_bugs.py``."""
    rows = ([bug.name, bug.what, *(EXPECTED[bug.name][check] for check in Check)] for bug in BUGS)
    return table(["planted bug", "what is wrong", *Check], rows)


def writes() -> str:
    """What the kernel's log sees, and what migd does; held by ``tests/verification/test_writes.py``."""
    rows = ([way.name, "yes" if way.seen else "no", way.handling] for way in WAYS)
    return table(["a write by", "logged", "what migd does about it"], rows)
