"""Hint streams as lists of frames, and mutations that make their checksums right again."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from random import Random

from tests.fuzz import mutation

_HEAD = struct.Struct("<4sBBHIQI")
_HEADER_BYTES = 28
_RANGES, _BITMAP = 4, 5


@dataclass(frozen=True)
class HintPiece:
    """One frame, whatever it says."""

    kind: int
    epoch: int
    body: bytes
    length: int | None = None
    """Said to be that long; None: as long as it is."""

    @property
    def sealed(self) -> bytes:
        """Its bytes, with checksums that belong to them."""
        length = len(self.body) if self.length is None else self.length
        head = _HEAD.pack(b"fpH1", self.kind, 0, 0, length, self.epoch, zlib.crc32(self.body))
        return head + struct.pack("<I", zlib.crc32(head)) + self.body


def cut(stream: bytes) -> list[HintPiece]:
    """The frames of a recorded stream."""
    pieces, at = [], 0
    while at + _HEADER_BYTES <= len(stream) and stream[at : at + 4] == b"fpH1":
        _, kind, _, _, length, epoch, _ = _HEAD.unpack_from(stream, at)
        at += _HEADER_BYTES
        pieces.append(HintPiece(kind, epoch, stream[at : at + length]))
        at += length
    return pieces


def talks(stream: bytes) -> list[bytes]:
    """What was said about each epoch, or two in a row, behind what was said first: short streams are fast."""
    pieces = cut(stream)
    first = [piece for piece in pieces if not piece.epoch]
    epochs = list(dict.fromkeys(piece.epoch for piece in pieces if piece.epoch))
    found = []
    for number, epoch in enumerate(epochs):
        wanted = {epoch, epochs[number - 1]} if number % 3 == 2 else {epoch}
        about = [*first, *(piece for piece in pieces if piece.epoch in wanted)]
        found.append(b"".join([piece.sealed for piece in about]))
    return sorted(set(found), key=lambda talk: (len(talk), talk))


def mutated(stream: bytes, other: bytes, chance: Random) -> bytes:
    """The bytes mutated as they are, or whole frames, their fields and bodies, with right checksums."""
    pieces = cut(stream)
    if not pieces or chance.random() < 0.35:
        return mutation.mangled(stream, other, chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        pieces = _changed(pieces, chance) or pieces
    return b"".join([piece.sealed for piece in pieces])


def _changed(pieces: list[HintPiece], chance: Random) -> list[HintPiece]:
    if chance.random() < 0.2:
        return mutation.reordered(pieces, chance)
    at = chance.randrange(len(pieces))
    return [*pieces[:at], _piece_changed(pieces[at], chance), *pieces[at + 1 :]]


def _piece_changed(piece: HintPiece, chance: Random) -> HintPiece:
    match chance.randrange(8):
        case 0:
            return replace(piece, kind=chance.choice((1, 2, 3, 4, 5, 6, 7, 0, 8, 255)))
        case 1:
            return replace(piece, epoch=mutation.number(chance))
        case 2:
            return replace(piece, length=mutation.number(chance, 32))
        case 3:
            return replace(piece, body=mutation.mangled(piece.body, b"", chance))
        case 4:
            return _bitmap(piece, chance)
        case _:
            return _ranges(piece, chance)


def _ranges(piece: HintPiece, chance: Random) -> HintPiece:
    """Byte ranges around the borders of pages and of RAM, overlapping, empty, huge."""
    ranges = []
    for _ in range(chance.choice((1, 2, 5, 40))):
        start = chance.randrange(300) * 4096 if chance.random() < 0.8 else mutation.number(chance)
        length = chance.choice(
            (0, 1, 4095, 4096, 4097, 8192, 3 * 4096 - 1, 256 * 4096, mutation.number(chance))
        )
        ranges.append((min(start + chance.choice((0, 0, 1, 4095)), (1 << 64) - 1), length))
    return replace(piece, kind=_RANGES, body=b"".join(struct.pack("<QQ", *pair) for pair in ranges))


def _bitmap(piece: HintPiece, chance: Random) -> HintPiece:
    """Bitmaps that begin and end anywhere, with a compressed part that fits, or that does not."""
    pages = chance.choice((1, 7, 8, 64, 200, 256, 257, mutation.number(chance, 32)))
    size = min(-(-pages // 8) + chance.choice((0, 0, 0, -1, 1)), 1 << 12)
    bits = chance.choice((chance.randbytes(max(0, size)), bytes(max(0, size)), b"\xff" * max(0, size)))
    if pages % 8 and bits and chance.random() < 0.7:
        bits = bits[:-1] + bytes([bits[-1] & ((1 << pages % 8) - 1)])
    start = chance.choice((0, 0, 64 * 4096, 128 * 4096, 4096, 17, mutation.number(chance)))
    packed = zlib.compress(bits, 1)
    if chance.random() < 0.3:
        packed = mutation.mangled(packed, b"", chance)
    return replace(piece, kind=_BITMAP, body=struct.pack("<QI", start, pages) + packed)
