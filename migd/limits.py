"""Every wait is bounded (G6): the time-outs of a migration, with the starting values of docs/safety.md."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
"""Not 0, since that fails everything, and at most a day, since ``inf`` bounds nothing."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How long anything may take, in seconds of the monotonic clock; migd status shows them. Raise them for
    a link with long delays or an overloaded host; both daemons of a migration should agree."""

    connect_s: _Seconds = 10.0
    """Until a TCP connection is there."""
    hello_s: _Seconds = 5.0
    """From a connection to its first message, and from HELLO to its answer."""
    begin_s: _Seconds = 10.0
    """From ACCEPT until every stream is connected; also for a spawned guest process to attach."""
    ping_s: _Seconds = 2.0
    """Between pings."""
    dead_s: _Seconds = 10.0
    """A peer without any sign of life for this long is lost."""
    progress_s: _Seconds = 15.0
    """So is one that applies no byte for this long while bytes are due, or stops in the middle of a
    frame."""
    hint_first_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.05
    """How long the first read of memory waits for free-page hints; four times that, in all, for the rest of
    an answer that spares most of what it has spoken of."""
    hint_window_s: _Seconds = 2.0
    """How long an answer to a request for hints counts."""
    guest_s: _Seconds = 2.0
    """For the guest to acknowledge that it is armed, paused, resumed, loaded or started."""
    ready_s: _Seconds = 30.0
    """From the last byte to READY: the destination drains its streams, verifies and loads."""
    go_s: _Seconds = 10.0
    """From READY to GO at the destination, after which the migration is aborted; from GO to STARTED at the
    source, after which the outcome is unknown."""
    verdict_s: _Seconds = 60.0
    """How long the destination waits for the verdict of a late verification."""
    check_s: _Seconds = 60.0
    """How long both wait for the guest's own check, where the guest makes one."""

    def __post_init__(self) -> None:
        """ValueError (in a configuration file, its one clear line) if the limits contradict each other."""
        if self.dead_s <= self.ping_s:
            raise ValueError(f"dead_s ({self.dead_s:g}) must be more than ping_s ({self.ping_s:g})")
