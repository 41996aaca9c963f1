"""The messages of the protocol as frozen structs: every frame but PAGES, ZERO, FREE and STATE.

Each carries the migration's random id, so that no answer can be taken for another's. Unknown fields, missing
fields and ill-typed values are refused by the decoder.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from migd.errors import ProtocolError
from migd.wire.protocol import MAX_PAGES_PER_FRAME, MAX_STREAMS, TOKEN_BYTES, FrameType

MigrationId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
GuestName: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Features: TypeAlias = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=32)], ...], msgspec.Meta(max_length=64)
]
Reason: TypeAlias = Annotated[str, msgspec.Meta(max_length=1000)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    migration: MigrationId


class BlockInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block: name and size in pages."""

    name: GuestName
    pages: Annotated[int, msgspec.Meta(ge=1)]


class Hello(_Message, frozen=True):
    min_version: int
    max_version: int
    software: Reason
    guest: GuestName
    page_bytes: int
    blocks: Annotated[tuple[BlockInfo, ...], msgspec.Meta(min_length=1, max_length=64)]
    streams: Annotated[int, msgspec.Meta(ge=1, le=MAX_STREAMS)]
    features: Features = ()


class Accept(_Message, frozen=True):
    version: int
    software: Reason
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    features: Features = ()
    """Those of the offered ones that may be used."""
    max_frame_pages: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGES_PER_FRAME)] = MAX_PAGES_PER_FRAME
    """The destination takes no larger PAGES frame."""


class Refuse(_Message, frozen=True):
    reason: Reason


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
    """Everything was sent; the device state has this size and mmh3 x64 128 digest."""

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
)

_CLASSES: dict[FrameType, type[Message]] = {
    FrameType.HELLO: Hello,
    FrameType.ACCEPT: Accept,
    FrameType.REFUSE: Refuse,
    FrameType.STREAM: Stream,
    FrameType.BEGIN: Begin,
    FrameType.PREPARED: Prepared,
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
