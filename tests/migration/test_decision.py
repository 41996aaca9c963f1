"""Every decision for every last mark: a table, and each mark has its row."""

from __future__ import annotations

import pytest

from migd.migration.decision import (
    Arrived,
    Asked,
    Incoming,
    Paused,
    awaits_verdict,
    go_at_destination,
    incoming_at_destination,
    paused_at_destination,
    paused_at_source,
)
from migd.migration.journal import Mark

SOURCE = {
    None: Paused.RESUME,
    Mark.READY: Paused.ASK,
    Mark.GO: Paused.ASK,
    Mark.STARTED: Paused.ASK,
    Mark.ABORTED: Paused.RESUME,
    Mark.RELEASED: Paused.LET_GO,
    Mark.VERIFIED: Paused.ASK,
    Mark.CONDEMNED: Paused.KEEP,
}
DESTINATION = {
    None: (Incoming.ABORT, False, Asked.ABORTED),
    Mark.READY: (Incoming.ABORT, False, Asked.ABORTED),
    Mark.GO: (Incoming.ABORT, False, Asked.ABORTED),
    Mark.STARTED: (Incoming.START, True, Asked.STARTED),
    Mark.ABORTED: (Incoming.ABORT, False, Asked.ABORTED),
    Mark.RELEASED: (Incoming.ABORT, False, Asked.ABORTED),
    Mark.VERIFIED: (Incoming.START, False, Asked.STARTED),
    Mark.CONDEMNED: (Incoming.KEEP, False, Asked.STARTED),
}
ARRIVED = {
    Mark.READY: Arrived.CONDEMN,
    Mark.GO: Arrived.CONDEMN,
    Mark.STARTED: Arrived.CONDEMN,
    Mark.ABORTED: Arrived.DISCARD,
    Mark.RELEASED: Arrived.CONDEMN,
    Mark.VERIFIED: Arrived.RESUME,
    Mark.CONDEMNED: Arrived.KEEP,
}


@pytest.mark.parametrize("last", [None, *Mark])
def test_a_guest_paused_where_it_was_to_leave_from(last: Mark | None) -> None:
    assert paused_at_source(last) is SOURCE[last]


@pytest.mark.parametrize("last", [None, *Mark])
def test_a_guest_where_it_was_to_arrive(last: Mark | None) -> None:
    decided = (incoming_at_destination(last), awaits_verdict(last), go_at_destination(last))
    assert decided == DESTINATION[last]


@pytest.mark.parametrize("last", list(Mark))
def test_a_guest_paused_where_it_has_run(last: Mark) -> None:
    assert paused_at_destination(last) is ARRIVED[last]


def test_no_mark_lets_a_guest_run_on_both_sides() -> None:
    """G2: of what either side does by its own journal alone, whatever the other's says."""
    resumes_by_itself = {last for last, decided in SOURCE.items() if decided is Paused.RESUME}
    assert resumes_by_itself == {None, Mark.ABORTED}, "before GO, or by the word of the destination"
    runs_by_itself = {last for last, decided in DESTINATION.items() if decided[0] is Incoming.START}
    assert runs_by_itself == {Mark.STARTED, Mark.VERIFIED}, "behind GO, and never behind ABORTED"
