"""The state invariant of docs/safety.md over the real Ledger, by exhaustive search.

The model (tests/support/ledger_model.py) knows nothing of the ledger's reasons: it calls its methods in
every order that they accept, and compares what the destination may hold with what the guest holds. The
wrong versions that have to fail in it are in tests/ledger/mutants.py.
"""

from __future__ import annotations

import pytest

from migd.ram.contract import FreeContract
from tests.ledger.searches import LOGGED, World, found_in

LEAST_STATES = 1_000_000
"""Of all searches in this file: what was promised."""
LEAST_ENDS = 100
"""A search must not be right for want of migrations that end."""

ONE_PAGE = [world for world in LOGGED if world.bounds["pages"] == 1]
TWO_PAGES = [world for world in LOGGED if world.bounds["pages"] == 2]


def names(worlds: list[World]) -> list[str]:
    return [world.name for world in worlds]


def assert_right(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_in(world.name)
    with capsys.disabled():
        print(f"\n  {world.name}: {found}")  # noqa: T201  # the figures are what the test is read for
    assert not found.trace, str(found)
    assert found.complete
    assert found.states >= world.at_least
    assert found.ends >= LEAST_ENDS


@pytest.mark.timeout(600)  # seconds of one core, and there may be few of them
@pytest.mark.parametrize("world", ONE_PAGE, ids=names(ONE_PAGE))
def test_every_state_of_one_page_is_right(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert_right(world, capsys)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", TWO_PAGES, ids=names(TWO_PAGES))
def test_every_state_of_two_pages_is_right(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert_right(world, capsys)


@pytest.mark.timeout(600)
def test_there_are_a_million_states(capsys: pytest.CaptureFixture[str]) -> None:
    states = sum(found_in(world.name).states for world in LOGGED)
    with capsys.disabled():
        print(f"\n  all searches of a log that sees writes: {states:,} states")  # noqa: T201  # as above
    assert states >= LEAST_STATES
    assert {world.bounds["contract"] for world in LOGGED} == set(FreeContract)


@pytest.mark.timeout(600)
def test_the_search_takes_every_kind_of_step() -> None:
    assert {action for world in LOGGED for action in found_in(world.name).actions} == {
        "arm", "cancel", "pause", "look for holes", "mark holes", "look for dirty pages",
        "harvest what was found", "harvest", "barrier", "settle", "END",
        "request epoch #", "guest answers epoch #", "hint # of epoch # arrives", "distrust the hints",
        "guest writes #", "guest writes zeros to #", "guest frees #", "guest allocates and writes #",
        "guest allocates # and counts on zeros", "pick #", "pick_free #", "read #",
        "record: zeros of # on a stream", "record: a copy of # on a stream",
        "record: an old copy of # on a stream", "no record for zero page #",
    }  # fmt: skip
    # R9: never two records of a page between two barriers, so "another stream than the last" does not occur.
