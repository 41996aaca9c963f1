"""kill -9 of either daemon, of both, and of the guest on either side, in every phase (G1, G2, G3).

The table says where each guest has to run in the end (``tests/kills/cells.py``); a scene holds one guest in
every phase, kills, brings everything back, and the tests then ask what became of the guest of each phase.
"""

from __future__ import annotations

import pytest

from migd.migration.state import DestinationState, SourceState
from tests.kills.cells import AFTERMATH_ROWS, DESTINATION_ROWS, KILLS, SOURCE_ROWS, Blow, row_of
from tests.kills.play import Play, play
from tests.support.pair import daemon_pair, finish
from tests.support.scene import PHASES, Phase, name_of


def test_every_phase_has_a_row_and_every_row_a_column_for_each_blow() -> None:
    assert list(SOURCE_ROWS) == list(SourceState)
    assert list(DESTINATION_ROWS) == list(DestinationState)
    assert [*SOURCE_ROWS, *DESTINATION_ROWS, *AFTERMATH_ROWS] == PHASES
    assert all(list(row_of(phase)) == list(Blow) for phase in PHASES)


@pytest.fixture(scope="module", params=KILLS)
def played(request: pytest.FixtureRequest) -> Play:
    return play(request.param, PHASES)


@pytest.mark.parametrize("phase", PHASES, ids=name_of)
def test_a_kill_loses_no_guest_and_makes_no_second(played: Play, phase: Phase) -> None:
    outcome = played.outcomes.get(name_of(phase))
    assert (outcome is not None) == bool(row_of(phase)[played.blow])
    assert outcome is None or outcome.faults() == [], outcome


def test_every_daemon_survived_what_others_suffered(played: Play) -> None:
    assert played.faults == []


def test_the_answer_and_the_check_reach_the_source_through_a_restarted_destination() -> None:
    """G3: GO is sent again until somebody answers, and the guest reports to whichever daemon is there."""
    with daemon_pair(held=True) as pair:
        guest = pair.guest()
        pair.destination.hold(DestinationState.RUNNING)
        migration = pair.start_migration(guest.name)
        pair.destination.wait_held(DestinationState.RUNNING)
        assert pair.checked(guest.name)[1] == 0
        pair.destination.kill()
        pair.destination.restart()
        output = finish(migration)
        assert output.exit_code == 0, output
        result = output.result
        assert (result.outcome, result.wrong_pages) == ("completed", 0)
        assert result.checked_pages
        assert guest.wait() == 0
        there = pair.destination.guest(guest.name)
        assert there is not None
        assert there.state == "running"
