"""The network falls silent, or a daemon is stopped, in every phase, and comes back (G1, G2, G3).

Where each guest has to run in the end stands in ``tests/kills/cells.py``, as for kills.
"""

from __future__ import annotations

import pytest

from migd.migration.state import DESTINATION_TRANSITIONS, SOURCE_TRANSITIONS
from tests.kills.cells import INTERRUPTIONS, Blow
from tests.kills.play import Play, play
from tests.support.scene import Phase, name_of

ONGOING: list[Phase] = [
    *(state for state, following in SOURCE_TRANSITIONS.items() if following),
    *(state for state, following in DESTINATION_TRANSITIONS.items() if following),
]
"""The phases with a connection to lose; `scripts/kills` interrupts those that are over, too."""

SILENT = [blow for blow in INTERRUPTIONS if blow is not Blow.NETWORK_RESET]
"""A reset is what the connections of a killed daemon get (``test_kill.py``); `scripts/kills` has it, too."""


@pytest.fixture(scope="module", params=SILENT)
def interrupted(request: pytest.FixtureRequest) -> Play:
    return play(request.param, ONGOING)


@pytest.mark.parametrize("phase", ONGOING, ids=name_of)
def test_an_interruption_loses_no_guest_and_makes_no_second(interrupted: Play, phase: Phase) -> None:
    outcome = interrupted.outcomes[name_of(phase)]
    assert outcome.faults() == [], outcome


def test_an_interruption_leaves_nothing_behind(interrupted: Play) -> None:
    assert interrupted.faults == []
