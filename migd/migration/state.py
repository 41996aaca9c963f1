"""The states of a migration on either side and the table of legal transitions.

``docs/architecture.md`` shows the same tables; a test keeps them equal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Generic, TypeVar

from migd.errors import MigdError


class SourceState(StrEnum):
    """Until GO the guest is the source's; afterwards only the destination's answer decides (G2, G3)."""

    WAITING = "waiting"
    """Only for a guest that has just arrived: until the verdict on that is known."""
    CONNECTING = "connecting"
    ARMING = "arming"
    BULK = "bulk"
    ITERATING = "iterating"
    PAUSING = "pausing"
    SWITCHOVER = "switchover"
    AWAITING_READY = "awaiting-ready"
    GOING = "going"
    UNKNOWN = "unknown"
    VERIFYING = "verifying"
    ABORTING = "aborting"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class DestinationState(StrEnum):
    """The destination may abort by itself until GO arrives."""

    PREPARING = "preparing"
    RECEIVING = "receiving"
    LOADING = "loading"
    READY = "ready"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"


_S = SourceState
SOURCE_TRANSITIONS: dict[SourceState, frozenset[SourceState]] = {
    _S.WAITING: frozenset({_S.CONNECTING, _S.ABORTING}),
    _S.CONNECTING: frozenset({_S.ARMING, _S.PAUSING, _S.ABORTING}),
    _S.ARMING: frozenset({_S.BULK, _S.ABORTING}),
    _S.BULK: frozenset({_S.ITERATING, _S.PAUSING, _S.ABORTING}),
    _S.ITERATING: frozenset({_S.PAUSING, _S.ABORTING}),
    _S.PAUSING: frozenset({_S.SWITCHOVER, _S.ABORTING}),
    _S.SWITCHOVER: frozenset({_S.AWAITING_READY, _S.ABORTING}),
    _S.AWAITING_READY: frozenset({_S.GOING, _S.ABORTING}),
    _S.GOING: frozenset({_S.VERIFYING, _S.UNKNOWN, _S.ABORTING}),
    _S.UNKNOWN: frozenset({_S.GOING, _S.ABORTING}),
    _S.VERIFYING: frozenset({_S.COMPLETED, _S.FAILED}),
    _S.ABORTING: frozenset({_S.CANCELLED, _S.FAILED}),
    _S.COMPLETED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset(),
}

_D = DestinationState
DESTINATION_TRANSITIONS: dict[DestinationState, frozenset[DestinationState]] = {
    _D.PREPARING: frozenset({_D.RECEIVING, _D.ABORTED}),
    _D.RECEIVING: frozenset({_D.LOADING, _D.ABORTED}),
    _D.LOADING: frozenset({_D.READY, _D.ABORTED}),
    _D.READY: frozenset({_D.STARTING, _D.ABORTED}),
    _D.STARTING: frozenset({_D.RUNNING, _D.FAILED}),
    _D.RUNNING: frozenset({_D.COMPLETED, _D.FAILED}),
    _D.COMPLETED: frozenset(),
    _D.ABORTED: frozenset(),
    _D.FAILED: frozenset(),
}

ADJUSTABLE = frozenset({_S.WAITING, _S.CONNECTING, _S.ARMING, _S.BULK, _S.ITERATING})
"""Until the guest is paused another policy may still change what is decided."""

CANCELLABLE = frozenset(
    {
        _S.WAITING,
        _S.CONNECTING,
        _S.ARMING,
        _S.BULK,
        _S.ITERATING,
        _S.PAUSING,
        _S.SWITCHOVER,
        _S.AWAITING_READY,
    }
)
"""Before GO the operator may cancel; from GOING on it is too late."""

T = TypeVar("T", bound=StrEnum)


class IllegalTransition(MigdError):
    """Our own bug: a session tried to enter a state it cannot reach from where it is."""

    exit_code = 70


class Progress(Generic[T]):
    """The state of one migration and the path it took."""

    def __init__(self, initial: T, table: dict[T, frozenset[T]]) -> None:
        self.path: list[T] = [initial]
        self._table = table

    @property
    def state(self) -> T:
        return self.path[-1]

    @property
    def ended(self) -> bool:
        return not self._table[self.state]

    def enter(self, state: T) -> None:
        """Move on. IllegalTransition, naming both states, if the table does not allow it."""
        if state not in self._table[self.state]:
            raise IllegalTransition(f"{self.state} -> {state} is no transition")
        self.path.append(state)


def source_progress(*, waiting: bool = False) -> Progress[SourceState]:
    """A source session's states from their beginning; ``waiting`` for a guest that has just arrived."""
    return Progress(SourceState.WAITING if waiting else SourceState.CONNECTING, SOURCE_TRANSITIONS)


def destination_progress() -> Progress[DestinationState]:
    """A destination session's states from their beginning."""
    return Progress(DestinationState.PREPARING, DESTINATION_TRANSITIONS)
