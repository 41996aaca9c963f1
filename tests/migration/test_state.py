"""The two transition tables, exhaustively: every pair of states, every state's reach, and who may cancel."""

from __future__ import annotations

from enum import StrEnum
from itertools import product

import pytest

from migd.migration.state import (
    CANCELLABLE,
    DESTINATION_TRANSITIONS,
    SOURCE_TRANSITIONS,
    DestinationState,
    IllegalTransition,
    Progress,
    SourceState,
    destination_progress,
    source_progress,
)

S, D = SourceState, DestinationState

SOURCE: dict[str, str] = {
    "waiting": "connecting aborting",
    "connecting": "arming pausing aborting",
    "arming": "bulk aborting",
    "bulk": "iterating pausing aborting",
    "iterating": "pausing aborting",
    "pausing": "switchover aborting",
    "switchover": "awaiting-ready aborting",
    "awaiting-ready": "going aborting",
    "going": "verifying unknown aborting",
    "unknown": "going aborting",
    "verifying": "completed failed",
    "aborting": "cancelled failed",
    "completed": "",
    "cancelled": "",
    "failed": "",
}
DESTINATION: dict[str, str] = {
    "preparing": "receiving aborted",
    "receiving": "loading aborted",
    "loading": "ready aborted",
    "ready": "starting aborted",
    "starting": "running failed",
    "running": "completed failed",
    "completed": "",
    "aborted": "",
    "failed": "",
}
TABLES = [(SOURCE_TRANSITIONS, SOURCE, S.WAITING), (DESTINATION_TRANSITIONS, DESTINATION, D.PREPARING)]
Table = dict[StrEnum, frozenset[StrEnum]]

PAIRS = [
    (table, expected, before, after)
    for table, expected, _ in TABLES
    for before, after in product(table, repeat=2)
]


def reach(table: Table, start: StrEnum) -> set[StrEnum]:
    """Every state that can follow ``start``, itself included."""
    found, new = {start}, {start}
    while new:
        new = {after for state in new for after in table[state]} - found
        found |= new
    return found


@pytest.mark.parametrize(("table", "expected", "before", "after"), PAIRS,
                         ids=lambda value: str(value) if isinstance(value, StrEnum) else "")  # fmt: skip
def test_every_transition_is_legal_or_raises_with_both_names(
    table: Table, expected: dict[str, str], before: StrEnum, after: StrEnum
) -> None:
    progress = Progress(before, table)
    if after in expected[before].split():
        progress.enter(after)
        assert progress.path == [before, after]
        assert progress.state is after
        return
    with pytest.raises(IllegalTransition) as illegal:
        progress.enter(after)
    assert str(illegal.value) == f"{before} -> {after} is no transition"
    assert illegal.value.exit_code == 70
    assert progress.path == [before]


@pytest.mark.parametrize(("table", "expected", "start"), TABLES, ids=["source", "destination"])
def test_the_tables_know_every_state_and_reach_it(
    table: Table, expected: dict[str, str], start: StrEnum
) -> None:
    assert set(table) == set(type(start)) == set(expected)
    assert reach(table, start) == set(table)


@pytest.mark.parametrize(("table", "expected", "start"), TABLES, ids=["source", "destination"])
def test_every_state_leads_to_an_end_and_no_end_leads_anywhere(
    table: Table, expected: dict[str, str], start: StrEnum
) -> None:
    ends = {state for state, after in table.items() if not after}
    assert ends == {state for state, after in expected.items() if not after}
    for state in table:
        assert reach(table, state) & ends
        assert Progress(state, table).ended is (state in ends)


def test_whatever_may_be_cancelled_can_abort_at_once_and_nothing_behind_go_may_be_cancelled() -> None:
    assert {
        S.WAITING,
        S.CONNECTING,
        S.ARMING,
        S.BULK,
        S.ITERATING,
        S.PAUSING,
        S.SWITCHOVER,
        S.AWAITING_READY,
    } == CANCELLABLE
    for state in CANCELLABLE:
        assert S.ABORTING in SOURCE_TRANSITIONS[state]
    behind_go = reach(SOURCE_TRANSITIONS, S.GOING)
    assert not CANCELLABLE & behind_go
    assert {S.GOING, S.UNKNOWN, S.VERIFYING} <= behind_go


def test_go_cannot_be_passed_by() -> None:
    """Nothing but GOING leads from a guest that is the source's to one that is not (G2)."""
    without = {state: after - {S.GOING} for state, after in SOURCE_TRANSITIONS.items()}
    assert not reach(without, S.WAITING) & {S.GOING, S.UNKNOWN, S.VERIFYING, S.COMPLETED}


def test_an_unknown_outcome_is_decided_by_the_answer_to_go_only() -> None:
    assert SOURCE_TRANSITIONS[S.UNKNOWN] == {S.GOING, S.ABORTING}
    assert reach(SOURCE_TRANSITIONS, S.VERIFYING) == {S.VERIFYING, S.COMPLETED, S.FAILED}


def test_a_destination_aborts_by_itself_until_go_and_never_after() -> None:
    for state in (D.PREPARING, D.RECEIVING, D.LOADING, D.READY):
        assert D.ABORTED in DESTINATION_TRANSITIONS[state]
    assert D.ABORTED not in reach(DESTINATION_TRANSITIONS, D.STARTING)


def test_progress_begins_where_the_roles_begin() -> None:
    assert source_progress().path == [S.CONNECTING]
    assert source_progress(waiting=True).path == [S.WAITING]
    assert destination_progress().path == [D.PREPARING]
    assert not source_progress().ended
