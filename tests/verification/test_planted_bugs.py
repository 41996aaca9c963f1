"""Verification that cannot fool itself: bugs that lose a page, and which check finds each of them.

The page is really lost where a check is off: the guest that arrives says so. The transport's digests match in
every case, since they compare what arrived with what was sent.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verification.checks import EXPECTED, Check, Found, outcome_of
from tests.verification.planted import BUGS, Bug
from tests.verification.table import planted_bugs


@pytest.mark.parametrize("check", Check)
@pytest.mark.parametrize("bug", BUGS, ids=str)
async def test_each_planted_bug_is_found_by_the_checks_that_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Bug, check: Check
) -> None:
    outcome = await outcome_of(bug, check, tmp_path, monkeypatch)
    print(f"{bug.name}, {check}: {outcome}")  # noqa: T201  # shown where it fails
    assert outcome.found is EXPECTED[bug.name][check]
    if outcome.found in (Found.MISSED, Found.HELD):
        assert outcome.wrong_pages == bug.wrong_pages
    if outcome.found in (Found.STAYED, Found.HELD):
        when = "late" if check is Check.LATE else "strict"
        assert outcome.verification == f"{when}: {bug.wrong_pages} pages differ"


def test_the_transport_finds_none_of_them() -> None:
    """Nor does it have to: what arrives is what was sent."""
    assert {found[Check.TRANSPORT] for found in EXPECTED.values()} == {Found.MISSED}


def test_every_bug_has_a_row_in_the_matrix() -> None:
    lines = planted_bugs().splitlines()
    assert len(lines) == len(BUGS) + 2
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in EXPECTED]
