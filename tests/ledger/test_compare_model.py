"""The compare log's rules (R19) over the real Ledger, by exhaustive search.

See tests/ledger/test_ledger_model.py; the model is tests/support/compare_model.py.
"""

from __future__ import annotations

import pytest

from tests.ledger.searches import COMPARED, World, found_in
from tests.ledger.test_ledger_model import assert_right, names

ONE_PAGE = [world for world in COMPARED if world.bounds["pages"] == 1]
TWO_PAGES = [world for world in COMPARED if world.bounds["pages"] == 2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", ONE_PAGE, ids=names(ONE_PAGE))
def test_every_state_of_one_page_under_a_comparing_log_is_right(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_right(world, capsys)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", TWO_PAGES, ids=names(TWO_PAGES))
def test_every_state_of_two_pages_under_a_comparing_log_is_right(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_right(world, capsys)


@pytest.mark.timeout(600)
def test_the_search_takes_every_kind_of_step_under_a_comparing_log() -> None:
    assert {action for world in COMPARED for action in found_in(world.name).actions} == {
        "arm", "cancel", "pause", "look for holes", "mark holes", "look for dirty pages",
        "harvest what was found", "harvest", "barrier", "settle", "END", "request epoch #",
        "guest answers epoch #", "hint # of epoch # arrives", "distrust the hints", "guest writes A to #",
        "guest writes B to #", "guest writes zeros to #", "guest frees #",
        "guest allocates and writes A to #", "guest allocates and writes B to #",
        "guest allocates # and counts on zeros", "pick #", "pick_free #", "read #",
        "record: zeros of # on a stream", "record: A of # on a stream", "record: B of # on a stream",
        "no record for zero page #",
    }  # fmt: skip
