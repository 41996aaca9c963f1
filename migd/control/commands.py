"""What the command line and a daemon say to each other: one JSON object a line over a unix socket, 0600.

A client sends one request; the daemon answers with any number of events and exactly one last reply
(``Finished``, ``Accepted`` of a detached migration, ``StatusReport``, ``Done`` or ``Failed``).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from migd.limits import Limits
from migd.migration.stats import Iteration, Result

MAX_LINE_BYTES = 1 << 20


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    pass


# -- requests ---------------------------------------------------------------------------------------


class Migrate(_Line, frozen=True, tag="migrate"):
    """Move a guest; None means as configured."""

    guest: str
    to: str
    live: bool = True
    hints: bool | None = None
    detach: bool = False
    streams: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    downtime_limit_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    verify: Literal["auto", "strict", "late", "off"] | None = None
    compression: Literal["auto", "lz4", "none"] | None = None


class Status(_Line, frozen=True, tag="status"):
    pass


class Cancel(_Line, frozen=True, tag="cancel"):
    """``target`` is a guest's name or a migration's id."""

    target: str


class Resolve(_Line, frozen=True, tag="resolve"):
    target: str


Request: TypeAlias = Migrate | Status | Cancel | Resolve

# -- events and replies -----------------------------------------------------------------------------


class Accepted(_Line, frozen=True, tag="accepted"):
    migration: str


class Moving(_Line, frozen=True, tag="moving"):
    """Where a migration stands; pages that need nothing more at this moment, of all."""

    state: str
    done_pages: int
    total_pages: int


class Iterated(_Line, frozen=True, tag="iterated"):
    iteration: Iteration


class Finished(_Line, frozen=True, tag="finished"):
    result: Result


class Done(_Line, frozen=True, tag="done"):
    text: str


class Failed(_Line, frozen=True, tag="failed"):
    error: str
    exit_code: int


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    state: str
    ram_bytes: int
    pid: int
    migration: str


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    migration: str
    guest: str
    direction: Literal["out", "in"]
    peer: str
    state: str
    done_pages: int
    total_pages: int
    error: str


class StatusReport(_Line, frozen=True, tag="status_report"):
    """Everything ``migd status`` shows. ``write_tracking`` says why if live migration is impossible here."""

    role: str
    version: str
    pid: int
    runtime_dir: str
    listen: str
    write_tracking: str
    limits: Limits
    guests: list[GuestStatus]
    migrations: list[MigrationStatus]


Reply: TypeAlias = Accepted | Moving | Iterated | Finished | Done | Failed | StatusReport

ENCODER = msgspec.json.Encoder()
REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
REPLIES: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
