"""What two daemons must agree on before a byte of RAM moves: versions, page size, RAM blocks."""

from __future__ import annotations

import msgspec

from migd import __version__
from migd.errors import ProtocolError, Refused
from migd.ram.block import MAX_BLOCK_PAGES, PAGE_BYTES, BlockShape
from migd.wire.framing import Frame
from migd.wire.messages import UNDECODABLE, Accept, BlockInfo, Hello
from migd.wire.protocol import MAX_VERSION, MIN_VERSION, Feature, FrameType

SOFTWARE = f"migd {__version__}"


def hello(migration: str, guest: str, shapes: tuple[BlockShape, ...], streams: int) -> Hello:
    """The source's first message."""
    return Hello(
        migration=migration,
        min_version=MIN_VERSION,
        max_version=MAX_VERSION,
        software=SOFTWARE,
        guest=guest,
        page_bytes=PAGE_BYTES,
        blocks=tuple(BlockInfo(shape.name, shape.pages) for shape in shapes),
        streams=streams,
        features=tuple(Feature),
    )


class _Versions(msgspec.Struct, frozen=True):
    """What a HELLO of any version has, however many fields a later one adds."""

    min_version: int
    max_version: int
    software: str


def read_hello(frame: Frame) -> Hello:
    """The HELLO in a frame. Refused if the versions do not meet, ProtocolError if it is none."""
    if frame.type is not FrameType.HELLO:
        raise ProtocolError(f"{frame.type.name} where HELLO was due")
    try:
        offer = msgspec.msgpack.decode(frame.metadata, type=_Versions)
    except UNDECODABLE as error:
        raise ProtocolError(f"bad HELLO message: {error}") from error
    if min(offer.max_version, MAX_VERSION) < max(offer.min_version, MIN_VERSION):
        raise Refused(
            f"protocol versions do not meet: {offer.software} speaks {offer.min_version}.."
            f"{offer.max_version}, {SOFTWARE} speaks {MIN_VERSION}..{MAX_VERSION}; update the older one"
        )
    hello = frame.message()
    assert isinstance(hello, Hello)
    return hello


def accept(offer: Hello, token: bytes, max_streams: int) -> Accept:
    """The destination's answer. Refused, with the reason the source shall print, if they do not fit."""
    if offer.page_bytes != PAGE_BYTES:
        raise Refused(f"page size {offer.page_bytes} does not match {PAGE_BYTES}")
    if offer.streams > max_streams:
        raise Refused(f"{offer.streams} streams requested, at most {max_streams} are allowed here")
    if sum(block.pages for block in offer.blocks) > MAX_BLOCK_PAGES:
        raise Refused("more than 2^32 pages of RAM")
    if len({block.name for block in offer.blocks}) != len(offer.blocks):
        raise Refused("two RAM blocks have the same name")
    return Accept(
        migration=offer.migration,
        version=min(offer.max_version, MAX_VERSION),
        software=SOFTWARE,
        token=token,
        features=tuple(feature for feature in Feature if feature in offer.features),
    )
