"""Events: what a daemon tells of its guests and migrations, one JSON object a line, numbered and dated.

``migd events`` prints them as they are. Fields may be added within a schema; a script ignores what it does
not know.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from migd.migration.stats import SCHEMA, Iteration


class _Event(msgspec.Struct, frozen=True, tag_field="type"):
    schema: int = SCHEMA
    seq: int = 0
    """Counts from 1 in each daemon process; the log gives it, and the next two."""
    time: str = ""
    """Wall clock, RFC 3339 in UTC: ``2026-01-31T12:00:00.000Z``."""
    daemon: str = ""
    """The daemon's role: serve, source or destination."""


class GuestAttached(_Event, frozen=True, kw_only=True, tag="guest-attached"):
    """A guest process is connected: a new one, one that is to arrive, or one from before a restart."""

    guest: str
    state: str
    """running, paused or incoming."""
    pid: int
    ram_bytes: int


class GuestDetached(_Event, frozen=True, kw_only=True, tag="guest-detached"):
    """A guest process has ended, or let go of this daemon."""

    guest: str
    pid: int


class MigrationBegan(_Event, frozen=True, kw_only=True, tag="migration-began"):
    migration: str
    guest: str
    direction: Literal["out", "in"]
    peer: str
    """Out: the destination's address; in: the software that the source says it is."""


class StateEntered(_Event, frozen=True, kw_only=True, tag="state-entered"):
    """A migration has moved on; docs/architecture.md has the states of either direction."""

    migration: str
    guest: str
    direction: Literal["out", "in"]
    state: str


class IterationEnded(_Event, frozen=True, kw_only=True, tag="iteration-ended"):
    """One pass over the pages to send is over, at the source."""

    migration: str
    guest: str
    iteration: Iteration


class MigrationFinished(_Event, frozen=True, kw_only=True, tag="migration-finished"):
    """Nothing more will happen. Again for an unknown outcome that was resolved."""

    migration: str
    guest: str
    direction: Literal["out", "in"]
    outcome: str
    """Out: completed, cancelled, failed or unknown; in: completed, aborted, failed or unknown."""
    error: str
    exit_code: int


class Missed(_Event, frozen=True, kw_only=True, tag="missed"):
    """So many events before the next one are no longer remembered; ``seq`` is the last of them."""

    events: int
    """How many are missing."""


Event: TypeAlias = (
    GuestAttached
    | GuestDetached
    | MigrationBegan
    | StateEntered
    | IterationEnded
    | MigrationFinished
    | Missed
)
