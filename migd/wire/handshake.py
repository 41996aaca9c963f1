"""What two daemons must agree on before a byte of RAM moves: versions, page size, RAM blocks."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from migd.errors import ProtocolError, Refused
from migd.ram.block import MAX_RAM_PAGES, PAGE_BYTES, BlockShape
from migd.wire.framing import Frame
from migd.wire.messages import UNDECODABLE, About, Accept, BlockInfo, Hello, Probe, Software
from migd.wire.protocol import MAX_PAGES_PER_FRAME, MAX_VERSION, MIN_VERSION, SOFTWARE, Feature, FrameType


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


@dataclass(frozen=True)
class Side:
    """One of the two daemons, as far as versions go; ``place`` says which, for people."""

    place: str
    software: str
    min_version: int
    max_version: int

    def __str__(self) -> str:
        low, high = self.min_version, self.max_version
        return f"the {self.place} ({self.software}) speaks {low if low == high else f'{low} to {high}'}"

    @classmethod
    def ours(cls, place: str) -> Side:
        """This migd."""
        return cls(place, SOFTWARE, MIN_VERSION, MAX_VERSION)

    def common_version(self, other: Side) -> int:
        """The highest protocol version that both speak. Refused, naming the older one, if there is none."""
        highest = min(self.max_version, other.max_version)
        if highest >= max(self.min_version, other.min_version):
            return highest
        older = min(self, other, key=lambda side: side.max_version)
        raise Refused(f"protocol versions do not meet: {self}, {other}: update migd at the {older.place}")


class _Versions(msgspec.Struct, frozen=True):
    """What a HELLO of any version has, however many fields a later one adds."""

    min_version: int
    max_version: int
    software: Software


def read_hello(frame: Frame) -> Hello:
    """The HELLO in a frame. Refused if the versions do not meet, ProtocolError if it is none."""
    if frame.type is not FrameType.HELLO:
        raise ProtocolError(f"{frame.type.name} where HELLO was due")
    try:
        offer = msgspec.msgpack.decode(frame.metadata, type=_Versions)
    except UNDECODABLE as error:
        raise ProtocolError(f"bad HELLO message: {error}") from error
    if offer.min_version > offer.max_version:
        raise ProtocolError(f"bad HELLO message: versions {offer.min_version} to {offer.max_version}")
    source = Side("source", offer.software, offer.min_version, offer.max_version)
    source.common_version(Side.ours("destination"))
    hello = frame.message()
    assert isinstance(hello, Hello)
    return hello


def accept(
    offer: Hello, token: bytes, max_streams: int, max_frame_pages: int = MAX_PAGES_PER_FRAME
) -> Accept:
    """The destination's answer. Refused, with the reason the source shall print, if they do not fit."""
    if offer.page_bytes != PAGE_BYTES:
        raise Refused(f"page size {offer.page_bytes} does not match {PAGE_BYTES}")
    if offer.streams > max_streams:
        raise Refused(f"{offer.streams} streams requested, at most {max_streams} are allowed here")
    pages = sum(block.pages for block in offer.blocks)
    if pages > MAX_RAM_PAGES:
        raise Refused(f"{pages} pages of RAM, a guest has at most 2^32-1")
    if len({block.name for block in offer.blocks}) != len(offer.blocks):
        raise Refused("two RAM blocks have the same name")
    return Accept(
        migration=offer.migration,
        version=min(offer.max_version, MAX_VERSION),
        software=SOFTWARE,
        token=token,
        max_frame_pages=max_frame_pages,
        features=tuple(feature for feature in Feature if feature in offer.features),
    )


def probe(question: str) -> Probe:
    """Ask a destination what it is; ``question`` is a fresh id like a migration's."""
    return Probe(migration=question, min_version=MIN_VERSION, max_version=MAX_VERSION, software=SOFTWARE)


def about(question: Probe, realtime_ns: int, free_bytes: int, max_streams: int) -> About:
    """The answer, also to one whose versions do not meet ours: it shall learn just that."""
    return About(
        migration=question.migration,
        min_version=MIN_VERSION,
        max_version=MAX_VERSION,
        software=SOFTWARE,
        realtime_ns=realtime_ns,
        free_bytes=free_bytes,
        max_streams=max_streams,
        features=tuple(Feature),
    )
