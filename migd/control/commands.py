"""What the command line and a daemon say to each other: one JSON object a line over a unix socket, 0600.

A client sends one request; the daemon answers with any number of lines and exactly one last reply
(``Finished``, ``Arrived``, ``Accepted`` of a detached migration, ``StatusReport``, ``Done`` or ``Failed``).
Only ``Events`` and ``Past`` are answered with lists, which end with the connection.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from migd import __version__
from migd.control.events import Event
from migd.limits import Limits
from migd.migration.stats import Arrival, Iteration, Result
from migd.wire.protocol import Keeper

MAX_LINE_BYTES = 1 << 20


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """A daemon refuses what it does not know in a request: half a request may be a wrong one."""

    version: str = __version__
    """Of the command; the daemon names it, and its own, when it does not understand the request."""


class _Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """A command passes over what it does not know in a reply: a later daemon may say more."""


# -- requests ---------------------------------------------------------------------------------------


class Migrate(_Request, frozen=True, tag="migrate"):
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
    dirty_log: Literal["auto", "userfaultfd", "compare"] | None = None
    max_iterations: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_total_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    on_exhausted: Literal["force", "cancel"] | None = None
    max_bandwidth_bytes_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """On the wire; 0 is unlimited."""


class Status(_Request, frozen=True, tag="status"):
    pass


class Cancel(_Request, frozen=True, tag="cancel"):
    """``target`` is a guest's name or a migration's id."""

    target: str


class Resolve(_Request, frozen=True, tag="resolve"):
    """Decide what stayed undecided; ``keeper`` is the operator's word where nobody else can."""

    target: str
    keeper: Keeper | None = None


class SetBandwidth(_Request, frozen=True, tag="set_bandwidth"):
    """From now on, also for those who wait: of a migration, or without ``target`` of the whole daemon."""

    bytes_s: Annotated[int, msgspec.Meta(ge=0)]
    """On the wire; 0 is unlimited."""
    target: str = ""
    incoming: bool = False
    """The daemon's limit for what arrives, not for what leaves."""


class SetPolicy(_Request, frozen=True, tag="set_policy"):
    """When a running migration pauses its guest, from its next decision on; None leaves it as it is."""

    target: str
    downtime_limit_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_iterations: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_total_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    on_exhausted: Literal["force", "cancel"] | None = None


class Attach(_Request, frozen=True, tag="attach"):
    """Follow a migration to its end, or hear how it ended: the newest one that ``target`` names."""

    target: str


class Events(_Request, frozen=True, tag="events"):
    """The events after number ``since`` that are remembered; with ``follow`` also those to come."""

    since: Annotated[int, msgspec.Meta(ge=0)] = 0
    follow: bool = False


class Past(_Request, frozen=True, tag="past"):
    """Migrations that are over, newest last; all of a ``target`` if it is not empty."""

    target: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1)] = 20


Request: TypeAlias = Migrate | Status | Cancel | Resolve | SetBandwidth | SetPolicy | Attach | Events | Past

# -- events and replies -----------------------------------------------------------------------------


class Accepted(_Reply, frozen=True, tag="accepted"):
    migration: str


class Moving(_Reply, frozen=True, tag="moving"):
    """Where a migration stands; pages that need nothing more at this moment, of all."""

    state: str
    done_pages: int
    total_pages: int


class Iterated(_Reply, frozen=True, tag="iterated"):
    iteration: Iteration


class Finished(_Reply, frozen=True, tag="finished"):
    result: Result


class Arrived(_Reply, frozen=True, tag="arrived"):
    """The last reply about a migration that came in, whatever became of it."""

    record: Arrival


class Remembered(_Reply, frozen=True, tag="remembered"):
    """A migration that is over. ``ended``: wall clock, RFC 3339 in UTC."""

    ended: str
    record: Result | Arrival


class Quiet(_Reply, frozen=True, tag="quiet"):
    """Nothing has happened for a while, and the daemon is there."""


class Done(_Reply, frozen=True, tag="done"):
    """``migration``: the one that it is about, if it is about one."""

    text: str
    migration: str = ""


class Failed(_Reply, frozen=True, tag="failed"):
    error: str
    exit_code: int


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A guest whose process is attached, or is being started for a migration that comes in."""

    name: str
    state: str
    """running, paused or incoming."""
    ram_bytes: int
    pid: int
    """Of its process; 0 until that has attached."""
    migration: str
    """The one it is paused or incoming for, else empty."""
    kind: str = "stub"
    """stub, or the QEMU that runs it."""
    tracking: str = ""
    """How writes to its RAM are found by a live migration."""


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A migration that goes on, or one of the last 64 in its direction."""

    migration: str
    guest: str
    direction: Literal["out", "in"]
    peer: str
    """Out: the destination's address; in: the software that the source says it is."""
    state: str
    over: bool = False
    """Nothing more will happen; a state of unknown is no end."""
    done_pages: int
    """Pages that need nothing more at this moment: fewer again when the guest writes."""
    total_pages: int
    elapsed_s: float = 0.0
    """Since the request, or HELLO; until the guest was started at the destination, once it was."""
    moved_bytes: int = 0
    """Out: bytes on the wire so far; in: bytes of RAM that records have placed, more than once or not."""
    max_bandwidth_bytes_s: int = 0
    """Out: the limit of its own on the wire; 0 is unlimited."""
    error: str


class StatusReport(_Reply, frozen=True, tag="status_report"):
    """Everything ``migd status`` shows. ``write_tracking``: which dirty log is used here, and why."""

    role: str
    version: str
    pid: int
    runtime_dir: str
    listen: str
    """HOST:PORT; empty at a source."""
    write_tracking: str
    """Which dirty log live migrations use here, and why."""
    max_outgoing_bytes_s: int
    """On the wire, all departures together; 0 is unlimited."""
    max_incoming_bytes_s: int
    """The same for arrivals."""
    limits: Limits
    """Time-outs, in seconds."""
    guests: list[GuestStatus]
    migrations: list[MigrationStatus]


Reply: TypeAlias = (
    Accepted
    | Moving
    | Iterated
    | Finished
    | Arrived
    | Remembered
    | Quiet
    | Done
    | Failed
    | StatusReport
    | Event
)

ENCODER = msgspec.json.Encoder()
REQUESTS: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
REPLIES: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)
