"""The tables of the matrix: what is hit in which phase, and where the guest has to run in the end.

Every phase has a row, and every row a column for each ``Blow``.
"""

from __future__ import annotations

from enum import StrEnum

from migd.migration.state import DestinationState, SourceState
from tests.kills.settling import Where
from tests.support.scene import PHASES, Aftermath, Phase, name_of


class Blow(StrEnum):
    """What is done in a phase. Of two daemons killed at once the name says which is back first."""

    SOURCE_KILLED = "source-killed"
    DESTINATION_KILLED = "destination-killed"
    BOTH_KILLED_SOURCE_FIRST = "both-killed-source-first"
    BOTH_KILLED_DESTINATION_FIRST = "both-killed-destination-first"
    GUEST_KILLED_HERE = "guest-killed-here"
    """Its process at the source."""
    GUEST_KILLED_THERE = "guest-killed-there"
    """Its process at the destination."""
    NETWORK_RESET = "network-reset"
    NETWORK_SILENT = "network-silent"
    """Lost without a word, and back once the source has given up whatever it can."""
    SOURCE_STOPPED = "source-stopped"
    """SIGSTOP, and SIGCONT once the other side has given up."""
    DESTINATION_STOPPED = "destination-stopped"


KILLS = [blow for blow in Blow if "killed" in blow]
INTERRUPTIONS = [blow for blow in Blow if blow not in KILLS]

_S, _D = SourceState, DestinationState

# Columns as in Blow. Killed: source, destination, both (source first), both (destination first), the guest
# here, the guest there. Interrupted: network reset, network silent, source stopped, destination stopped.
# S and D: runs at the source or the destination, SD: at either, N: nowhere, U: unknown, C: condemned,
# -: there is nothing to hit.
SOURCE_ROWS: dict[SourceState, str] = {
    _S.WAITING: "S SD S S N D   S S D SD",  # it runs since it arrived, and goes on behind the verdict
    _S.CONNECTING: "S S S S N -   S S D S",  # before its first connection nothing is lost by a rest
    _S.ARMING: "S S S S N S   S S S S",
    _S.BULK: "S S S S N S   S S S S",
    _S.ITERATING: "S S S S N S   S S S S",
    _S.PAUSING: "S S S S N S   S S S S",
    _S.SWITCHOVER: "S S S S N S   S S S S",
    _S.AWAITING_READY: "S S S S N S   SD SD SD SD",  # READY may have come already, and then GO follows
    _S.GOING: "D S S S D S   SD SD SD SD",  # GO is durable, not sent; the destination aborts without it
    _S.UNKNOWN: "D D D D D U   D D D D",
    _S.VERIFYING: "D D D D D N   D D D D",
    _S.ABORTING: "S S S S N S   S S S S",
    _S.COMPLETED: "D D D D - N   D D D D",
    _S.CANCELLED: "S S S S N -   S S S S",
    _S.FAILED: "S S S S N -   S S S S",
}
DESTINATION_ROWS: dict[DestinationState, str] = {
    _D.PREPARING: "S S S S N -   S S S S",
    _D.RECEIVING: "S S S S N S   S S S S",
    _D.LOADING: "S S S S N S   S S SD S",
    _D.READY: "S S S S N S   S S SD S",
    _D.STARTING: "D D D D D U   D D D D",  # STARTED is durable; what was to be started may be gone
    _D.RUNNING: "D D D D D N   D D D D",
    _D.COMPLETED: "D D D D - N   D D D D",
    _D.ABORTED: "S S S S N -   S S S S",
    _D.FAILED: "U U U U N -   U U U U",  # its process was killed between STARTED and the start
}

AFTERMATH_ROWS: dict[Aftermath, str] = {
    Aftermath.CONDEMNED: "C C C C - -   C C C C",  # of its two processes neither runs
}

_LETTERS = {
    "S": Where.SOURCE,
    "D": Where.DESTINATION,
    "N": Where.NOWHERE,
    "U": Where.UNKNOWN,
    "C": Where.CONDEMNED,
}


def row_of(phase: Phase) -> dict[Blow, frozenset[Where]]:
    """Where the guest of this phase may end for each blow; empty where there is nothing to hit."""
    match phase:
        case SourceState():
            cells = SOURCE_ROWS[phase]
        case DestinationState():
            cells = DESTINATION_ROWS[phase]
        case Aftermath():
            cells = AFTERMATH_ROWS[phase]
    return {
        blow: frozenset(_LETTERS[letter] for letter in cell.strip("-"))
        for blow, cell in zip(Blow, cells.split(), strict=True)
    }


def allowed(blow: Blow) -> dict[str, frozenset[Where]]:
    """By the name of the guest: the same state may have the same value in both enums."""
    return {name_of(phase): row_of(phase)[blow] for phase in PHASES}
