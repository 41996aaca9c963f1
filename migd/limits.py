"""Every wait is bounded (G6): the time-outs of a migration, with the starting values of docs/safety.md."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
"""Not 0, since that fails everything, and at most a day, since ``inf`` bounds nothing."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds on the monotonic clock, configurable as ``[limits]``, shown by ``migd status``."""

    connect_s: _Seconds = 10.0
    hello_s: _Seconds = 5.0
    """From a connection to its first message, and from HELLO to its answer."""
    begin_s: _Seconds = 10.0
    """From ACCEPT until every stream is connected and the destination's guest process is attached."""
    ping_s: _Seconds = 2.0
    dead_s: _Seconds = 10.0
    """Without a sign of life from the peer."""
    progress_s: _Seconds = 15.0
    """Without a byte applied at the destination while bytes are due."""
    hint_first_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.05
    """How long the first read may wait for hints."""
    hint_window_s: _Seconds = 2.0
    """How long an answer to a hint request counts."""
    guest_s: _Seconds = 2.0
    """For the guest to acknowledge arm, pause, resume, load or start."""
    ready_s: _Seconds = 30.0
    """From FINISH to READY: the destination drains its streams, verifies and loads."""
    go_s: _Seconds = 10.0
    """From READY to GO at the destination, and from GO to STARTED at the source, then UNKNOWN."""
    verdict_s: _Seconds = 60.0
    """From STARTED to the verdict of a late verification."""
    check_s: _Seconds = 60.0
    """From STARTED to the guest's own check, where the guest makes one."""

    def __post_init__(self) -> None:
        """ValueError (in a configuration file, its one clear line) if the limits contradict each other."""
        if self.dead_s <= self.ping_s:
            raise ValueError(f"dead_s ({self.dead_s:g}) must be more than ping_s ({self.ping_s:g})")
