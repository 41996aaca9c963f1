"""The published figures: of the runs that are named, enough, and nothing was found in them."""

from __future__ import annotations

import pytest

from tests.proof.campaign import CAMPAIGN, Claim, kept


@pytest.mark.parametrize("claim", CAMPAIGN, ids=[claim.name for claim in CAMPAIGN])
def test_what_is_published_was_run_and_found_nothing(claim: Claim) -> None:
    run = kept()[claim.name]
    assert run.command == claim.command, "scripts/proof makes the runs"
    assert claim.unmet(run.figures) == []


def test_a_run_that_found_something_or_was_too_short_is_not_published() -> None:
    claim = next(claim for claim in CAMPAIGN if claim.script == "soak")
    figures = kept()[claim.name].figures
    assert claim.unmet({**figures, "wrong_pages": 1}) == ["wrong_pages: 1"]
    assert claim.unmet({**figures, "completed": 999}) == ["completed: 999, not 1000"]


def test_nothing_is_kept_that_is_not_published() -> None:
    assert set(kept()) == {claim.name for claim in CAMPAIGN}
