"""The messages of the protocol as frozen structs: every frame but PAGES, ZERO, FREE and STATE.

Each carries the migration's random id, so that no answer can be taken for another's. Missing fields and
ill-typed values are refused by the decoder, unknown fields, too, except in greetings.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from migd.errors import ProtocolError
from migd.wire.protocol import MAX_PAGES_PER_FRAME, MAX_STREAMS, TOKEN_BYTES, FrameType, Keeper

MigrationId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
NO_MIGRATION = "0" * 32
"""The id in a refusal of something that could not be read as far as its id."""
GuestName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Features: TypeAlias = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=32)], ...], msgspec.Meta(max_length=64)
]
Software: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[ -~]{0,100}\Z")]
"""Name and version; printable, since it ends up in people's terminals."""
Reason: TypeAlias = Annotated[str, msgspec.Meta(max_length=1000)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    migration: MigrationId


class _Greeting(_Message, frozen=True, forbid_unknown_fields=False):
    """Said before both sides know each other's version: what a later one adds is ignored."""


class BlockInfo(msgspec.Struct, frozen=True):
    """A RAM block: name and size in pages. Part of a greeting."""

    name: GuestName
    pages: Annotated[int, msgspec.Meta(ge=1)]


class Hello(_Greeting, frozen=True):
    min_version: int
    max_version: int
    software: Software
    guest: GuestName
    page_bytes: int
    blocks: Annotated[tuple[BlockInfo, ...], msgspec.Meta(min_length=1, max_length=64)]
    streams: Annotated[int, msgspec.Meta(ge=1, le=MAX_STREAMS)]
    features: Features = ()


class Accept(_Greeting, frozen=True):
    version: int
    software: Software
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    features: Features = ()
    """Those of the offered ones that may be used."""
    max_frame_pages: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES_PER_FRAME)] = MAX_PAGES_PER_FRAME
    """The destination takes no larger PAGES frame."""


class Refuse(_Greeting, frozen=True):
    reason: Reason


class Probe(_Greeting, frozen=True):
    """What are you? ``migration`` is an id of this question alone."""

    min_version: int
    max_version: int
    software: Software


class About(_Greeting, frozen=True):
    """What a destination is, now."""

    min_version: int
    max_version: int
    software: Software
    realtime_ns: int
    """Its clock (nanoseconds since 1970, UTC) when it answered."""
    free_bytes: Count
    """The RAM of the largest guest it would take."""
    max_streams: Annotated[int, msgspec.Meta(ge=1)]
    """It refuses a migration with more."""
    features: Features = ()


class Stream(_Message, frozen=True):
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    index: Count


class Begin(_Message, frozen=True):
    pass


class Prepared(_Message, frozen=True):
    """Pausing the guest now costs no wait for a process that is still starting."""


class Ping(_Message, frozen=True):
    nonce: Count


class Pong(_Message, frozen=True):
    nonce: Count
    applied_bytes: Count
    """Of guest RAM, placed and verified so far."""


class Abort(_Message, frozen=True):
    reason: Reason


class Barrier(_Message, frozen=True):
    iteration: Count


class End(_Message, frozen=True):
    """What went through this stream before END; ``digest`` chains the digests of those frames."""

    frames: Count
    pages: Count
    zero: Count
    free: Count
    digest: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Finish(_Message, frozen=True):
    """Everything was sent; the device state has this size and XXH3-128 digest."""

    state_bytes: Count
    state_digest: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Ready(_Message, frozen=True):
    pass


class Go(_Message, frozen=True):
    pass


class Started(_Message, frozen=True):
    """The guest's clock at its last instruction at the source and its first at the destination."""

    stopped_at_ns: int
    resumed_at_ns: int


class Aborted(_Message, frozen=True):
    reason: Reason


class Verdict(_Message, frozen=True):
    """Of the tracking verification: ``ok`` releases the source, else the destination pauses its guest."""

    ok: bool
    detail: Reason


class Resolve(_Message, frozen=True):
    """The operator's word about a guest that nobody else decides about."""

    keeper: Keeper
    detail: Reason


class Checked(_Message, frozen=True):
    pages: Count
    wrong: Count
    first_wrong: int


Message: TypeAlias = (
    Hello
    | Accept
    | Refuse
    | Stream
    | Begin
    | Prepared
    | Probe
    | About
    | Ping
    | Pong
    | Abort
    | Barrier
    | End
    | Finish
    | Ready
    | Go
    | Started
    | Aborted
    | Verdict
    | Checked
    | Resolve
)

_CLASSES: dict[FrameType, type[Message]] = {
    FrameType.HELLO: Hello,
    FrameType.ACCEPT: Accept,
    FrameType.REFUSE: Refuse,
    FrameType.STREAM: Stream,
    FrameType.BEGIN: Begin,
    FrameType.PREPARED: Prepared,
    FrameType.PROBE: Probe,
    FrameType.ABOUT: About,
    FrameType.PING: Ping,
    FrameType.PONG: Pong,
    FrameType.ABORT: Abort,
    FrameType.BARRIER: Barrier,
    FrameType.END: End,
    FrameType.FINISH: Finish,
    FrameType.READY: Ready,
    FrameType.GO: Go,
    FrameType.STARTED: Started,
    FrameType.ABORTED: Aborted,
    FrameType.VERDICT: Verdict,
    FrameType.CHECKED: Checked,
    FrameType.RESOLVE: Resolve,
}
_TYPES = {message: kind for kind, message in _CLASSES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(message) for kind, message in _CLASSES.items()}
_ENCODER = msgspec.msgpack.Encoder()

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes it cannot decode: text that is not UTF-8 and deep nesting have their own."""


def pack(message: Message) -> tuple[FrameType, bytes]:
    """Frame type and metadata of a message."""
    return _TYPES[type(message)], _ENCODER.encode(message)


def unpack(kind: FrameType, metadata: bytes | memoryview) -> Message:
    """The message, or ProtocolError naming the frame and the field."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"a {kind.name} frame where a message was expected")
    try:
        return decoder.decode(metadata)
    except UNDECODABLE as error:
        raise ProtocolError(f"bad {kind.name} message: {error}") from error
