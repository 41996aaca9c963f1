"""The hint protocol: free-page hints as self-delimiting frames over any byte channel. This file is the spec.

A unix socket delivers every byte; a virtio-serial port may lose or repeat some around a reconnect or a
migration. So each frame carries its own checks, and a decoder finds the next good frame after garbage or
loss. All numbers are little-endian::

    offset  size  field
         0     4  magic "fpH1"
         4     1  type (``HintType``)
         5     1  zero
         6     2  zero
         8     4  body length in bytes, at most MAX_BODY_BYTES
        12     8  epoch (0 in GREET and HELLO)
        20     4  CRC-32 of the body
        24     4  CRC-32 of bytes 0..23
        28     -  body

    type     from   body
    GREET    host   u16 version: asks for HELLO
    HELLO    guest  u16 version, u8 contract (``FreeContract``), u8 strength, u32 page bytes, u64 pages
    REQUEST  host   empty: look at the free list now, answer with this epoch
    RANGES   guest  n times (u64 start, u64 length): free guest-physical bytes; n <= MAX_RANGES_PER_FRAME
    BITMAP   guest  u64 start, u32 pages, then zlib of one bit per page, least significant first, 1 = free
    END      guest  u64 free pages in this answer
    DONE     host   empty: no answer is wanted any more (sent on every exit path, R15)

``pages`` of HELLO: all of RAM; of an agent in a virtual machine, which sees physical memory with gaps, up to
where that goes, and the host's end of the port makes pages of RAM of it.

The guest looks at its free list only after it has read the REQUEST (R5). An answer is any mix of RANGES and
BITMAP frames, each with the request's epoch, closed by END; a lost frame loses hints, never safety.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

VERSION = 1
MAGIC = b"fpH1"
MAX_BODY_BYTES = 1 << 20
"""A bitmap frame of 1 MiB describes 32 GiB uncompressed; more than that is a flood."""
MAX_BITMAP_PAGES = 8 * MAX_BODY_BYTES
MAX_RANGES_PER_FRAME = 4096
"""64 KiB. Each range costs its reader 2.4 us, so that a frame of 1 MiB would hold it up for 160 ms."""
MAX_REREAD_BYTES = 8 << 20
"""Of damaged bodies that are searched for a frame within. Each search may end at another damaged body, so
28 hostile bytes could cost a checksum over 1 MiB (1.9 ms): beyond this, damaged bodies are skipped whole."""

_HEADER = struct.Struct("<4sBBHIQII")
_HEADER_CRC_AT = 24
_HELLO = struct.Struct("<HBBIQ")
_GREET = struct.Struct("<H")
_RANGE = struct.Struct("<QQ")
_BITMAP = struct.Struct("<QI")
_END = struct.Struct("<Q")


class HintType(IntEnum):
    """Frame types."""

    GREET = 1
    HELLO = 2
    REQUEST = 3
    RANGES = 4
    BITMAP = 5
    END = 6
    DONE = 7


class Strength(IntEnum):
    """How sure the guest is that a hinted page was free at one moment after the request."""

    WEAK = 0
    """Read without the allocator's lock (an agent in a Linux guest)."""
    STRONG = 1
    """Read by the allocator itself."""


@dataclass(frozen=True)
class Greet:
    version: int = VERSION


@dataclass(frozen=True)
class Hello:
    """What the guest declares once per connection. ``contract`` is a ``FreeContract`` value."""

    contract: int
    strength: int
    page_bytes: int
    pages: int
    version: int = VERSION


@dataclass(frozen=True)
class Request:
    epoch: int


@dataclass(frozen=True)
class Ranges:
    """Free guest-physical byte ranges ``(start, length)``, as the guest sent them: not checked yet."""

    epoch: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bitmap:
    """One bit per page from guest-physical byte ``start`` on, least significant first, 1 = free."""

    epoch: int
    start: int
    pages: int
    bits: bytes


@dataclass(frozen=True)
class End:
    epoch: int
    pages: int


@dataclass(frozen=True)
class Done:
    epoch: int


HintFrame: TypeAlias = Greet | Hello | Request | Ranges | Bitmap | End | Done


def encode(frame: HintFrame) -> bytes:
    """One frame as bytes. ValueError if its body would exceed MAX_BODY_BYTES, or MAX_RANGES_PER_FRAME."""
    epoch = 0
    match frame:
        case Greet(version):
            kind, body = HintType.GREET, _GREET.pack(version)
        case Hello(contract, strength, page_bytes, pages, version):
            kind = HintType.HELLO
            body = _HELLO.pack(version, contract, strength, page_bytes, pages)
        case Request(epoch):
            kind, body = HintType.REQUEST, b""
        case Ranges(epoch, ranges):
            if len(ranges) > MAX_RANGES_PER_FRAME:
                raise ValueError(f"a RANGES frame of {len(ranges)} ranges exceeds {MAX_RANGES_PER_FRAME}")
            kind, body = HintType.RANGES, b"".join(_RANGE.pack(*pair) for pair in ranges)
        case Bitmap(epoch, start, pages, bits):
            kind, body = HintType.BITMAP, _BITMAP.pack(start, pages) + zlib.compress(bits, 1)
        case End(epoch, pages):
            kind, body = HintType.END, _END.pack(pages)
        case Done(epoch):
            kind, body = HintType.DONE, b""
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a {kind.name} frame of {len(body)} bytes exceeds {MAX_BODY_BYTES}")
    head = _HEADER.pack(MAGIC, kind, 0, 0, len(body), epoch, zlib.crc32(body), 0)[:_HEADER_CRC_AT]
    return head + struct.pack("<I", zlib.crc32(head)) + body


def encode_ranges(epoch: int, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """RANGES frames for any number of ranges, each frame within the limit."""
    batch: list[tuple[int, int]] = []
    for pair in ranges:
        batch.append(pair)
        if len(batch) == MAX_RANGES_PER_FRAME:
            yield encode(Ranges(epoch, tuple(batch)))
            batch = []
    if batch:
        yield encode(Ranges(epoch, tuple(batch)))


class HintDecoder:
    """Bytes in, frames out; garbage is skipped and counted, never raised."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._reread_bytes = 0
        self.garbage_bytes = 0
        self.rejected_frames = 0
        """Frames whose checks hold but whose content does not fit their type."""

    def feed(self, data: bytes | bytearray | memoryview) -> list[HintFrame]:
        """Every whole, good frame completed by ``data``."""
        self._buffer += data
        frames: list[HintFrame] = []
        while (step := self._next()) is not None:
            if isinstance(step, int):
                self.garbage_bytes += step
                del self._buffer[:step]
                continue
            kind, epoch, body = step
            del self._buffer[: _HEADER.size + len(body)]
            frame = _parse(kind, epoch, body)
            if frame is None:
                self.rejected_frames += 1
            else:
                frames.append(frame)
        return frames

    def _next(self) -> tuple[int, int, bytes] | int | None:
        """A checked frame, a number of bytes to skip, or None until more bytes come."""
        at = self._buffer.find(MAGIC)
        if at != 0:
            # Keep a tail that may be the beginning of a magic.
            return (at if at > 0 else max(0, len(self._buffer) - len(MAGIC) + 1)) or None
        if len(self._buffer) < _HEADER.size:
            return None
        _, kind, zero, zero2, length, epoch, body_crc, head_crc = _HEADER.unpack_from(self._buffer)
        if zlib.crc32(self._buffer[:_HEADER_CRC_AT]) != head_crc or zero or zero2 or length > MAX_BODY_BYTES:
            return len(MAGIC)
        if len(self._buffer) < _HEADER.size + length:
            return None
        body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        if zlib.crc32(body) == body_crc:
            return kind, epoch, body
        # Bytes were lost inside the body: a later frame may begin within what was taken for it.
        self._reread_bytes += length
        return len(MAGIC) if self._reread_bytes <= MAX_REREAD_BYTES else _HEADER.size + length


def _parse(kind: int, epoch: int, body: bytes) -> HintFrame | None:
    """The frame, or None if the body does not fit its type."""
    try:
        match HintType(kind):
            case HintType.GREET:
                return Greet(*_GREET.unpack(body))
            case HintType.HELLO:
                version, contract, strength, page_bytes, pages = _HELLO.unpack(body)
                return Hello(contract, strength, page_bytes, pages, version)
            case HintType.REQUEST:
                return Request(epoch) if not body else None
            case HintType.RANGES:
                few = len(body) <= MAX_RANGES_PER_FRAME * _RANGE.size
                return Ranges(epoch, tuple(_RANGE.iter_unpack(body))) if few else None
            case HintType.BITMAP:
                return _parse_bitmap(epoch, body)
            case HintType.END:
                return End(epoch, *_END.unpack(body))
            case HintType.DONE:
                return Done(epoch) if not body else None
    except (ValueError, struct.error, zlib.error):
        return None


def _parse_bitmap(epoch: int, body: bytes) -> Bitmap | None:
    start, pages = _BITMAP.unpack_from(body)
    if not 0 < pages <= MAX_BITMAP_PAGES:
        return None
    size = -(-pages // 8)
    inflate = zlib.decompressobj()
    # One byte more than fits: a longer stream shows, a right one has room to reach its end marker.
    bits = inflate.decompress(body[_BITMAP.size :], size + 1)
    if len(bits) != size or not inflate.eof or inflate.unused_data:
        return None
    if pages % 8 and bits[-1] >> pages % 8:
        return None  # pages beyond those announced
    return Bitmap(epoch, start, pages, bits)
