"""Wire streams as lists of frames, and mutations that seal them again: what gets behind the frame digest."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from random import Random

import msgspec
from xxhash import xxh3_128_digest

from migd.wire.protocol import HEADER, HEADER_BYTES, RUN, FrameType
from tests.fuzz import mutation

PAGES, ZERO, FREE, STATE = FrameType.PAGES, FrameType.ZERO, FrameType.FREE, FrameType.STATE
_RECORDS = (PAGES, ZERO, FREE)
_MAX_PIECE_BYTES = 4 << 20
_PAGE_BYTES = 4096
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Piece:
    """One frame, whatever it says; None as a size is that of the bytes that are there."""

    kind: int
    metadata: bytes
    payload: bytes = b""
    count: int = 0
    runs: int = 0
    codec: int = 0
    magic: bytes = b"MIGD"
    version: int = 2
    zero: int = 0
    metadata_bytes: int | None = None
    payload_bytes: int | None = None

    def sealed(self, sequence: int) -> bytes:
        """Its bytes, with the digest that belongs to them."""
        head = HEADER.pack(
            self.magic, self.version, self.kind, self.codec, self.zero, sequence, self.count, self.runs,
            len(self.metadata) if self.metadata_bytes is None else self.metadata_bytes,
            len(self.payload) if self.payload_bytes is None else self.payload_bytes,
            bytes(_DIGEST_BYTES),
        )[: HEADER_BYTES - _DIGEST_BYTES]  # fmt: skip
        return head + xxh3_128_digest(head + self.metadata) + self.metadata + self.payload


def cut(stream: bytes) -> list[Piece]:
    """The frames of a stream as far as their sizes are plausible; what is left over is dropped."""
    pieces, at = [], 0
    while at + HEADER_BYTES <= len(stream):
        magic, version, kind, codec, zero, _, count, runs, metadata, payload, _ = HEADER.unpack_from(
            stream, at
        )
        at += HEADER_BYTES
        if magic != b"MIGD" or metadata + payload > _MAX_PIECE_BYTES:
            break
        split, end = at + metadata, at + metadata + payload
        pieces.append(
            Piece(kind, stream[at:split], stream[split:end], count, runs, codec, magic, version, zero)
        )
        at = end
    return pieces


def joined(pieces: list[Piece], chance: Random | None = None) -> bytes:
    """All frames, sealed and numbered; with ``chance`` a number is seldom wrong."""
    skip = -1 if chance is None or chance.random() > 0.05 else chance.randrange(len(pieces) + 1)
    return b"".join([piece.sealed(number + (number >= skip >= 0)) for number, piece in enumerate(pieces)])


def settled(stream: bytes) -> bytes:
    """The same with every END and FINISH saying what was really sent before it: the last checks pass, too."""
    frames, counts, chain, state = 0, [0, 0, 0], bytes(_DIGEST_BYTES), b""
    parts: list[bytes] = []
    for number, piece in enumerate(cut(stream)):
        sealed = piece.sealed(number)
        if piece.kind in _RECORDS:
            frames, chain = (
                frames + 1,
                xxh3_128_digest(chain + sealed[HEADER_BYTES - _DIGEST_BYTES : HEADER_BYTES]),
            )
            counts[_RECORDS.index(piece.kind)] += piece.count
        elif piece.kind == STATE:
            state += piece.metadata
        elif piece.kind == FrameType.END:
            pages, zero, free = counts
            said = {"frames": frames, "pages": pages, "zero": zero, "free": free, "digest": chain}
            sealed = replace(piece, metadata=_with(piece.metadata, said)).sealed(number)
        elif piece.kind == FrameType.FINISH:
            said = {"state_bytes": len(state), "state_digest": xxh3_128_digest(state)}
            sealed = replace(piece, metadata=_with(piece.metadata, said)).sealed(number)
        parts.append(sealed)
    return b"".join(parts)


def _with(metadata: bytes, fields: dict[str, object]) -> bytes:
    """A message with these fields, if it is one at all."""
    try:
        found = msgspec.msgpack.decode(metadata)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return metadata
    return msgspec.msgpack.encode({**found, **fields}) if isinstance(found, dict) else metadata


def mutated(stream: bytes, other: bytes, chance: Random) -> bytes:
    """The bytes mutated as they are, or whole frames, their fields and messages, sealed again."""
    if chance.random() < 0.35:
        return mutation.mangled(stream, other, chance)
    pieces = cut(stream)
    if not pieces:
        return mutation.mangled(stream, other, chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        pieces = _changed(pieces, other, chance)
    return joined(pieces, chance)


def _changed(pieces: list[Piece], other: bytes, chance: Random) -> list[Piece]:
    kind = chance.random()
    if kind < 0.15 or not pieces:
        return mutation.reordered(pieces, chance)
    if kind < 0.22:
        theirs = cut(other)
        return pieces[: chance.randrange(len(pieces) + 1)] + theirs[chance.randrange(len(theirs) + 1) :]
    at = chance.randrange(len(pieces))
    return [*pieces[:at], piece_changed(pieces[at], chance), *pieces[at + 1 :]]


def piece_changed(piece: Piece, chance: Random) -> Piece:
    """One frame with something changed that its digest will cover."""
    choice = chance.random()
    if choice < 0.15:
        return _header_changed(piece, chance)
    if piece.kind in _RECORDS and choice < 0.9:
        return _record_changed(piece, chance)
    if piece.kind != STATE and piece.kind not in _RECORDS and choice < 0.9:
        return replace(piece, metadata=message_changed(piece.metadata, chance))
    return replace(piece, metadata=mutation.mangled(piece.metadata, b"", chance))


def message_changed(metadata: bytes, chance: Random) -> bytes:
    """Another MessagePack map; or the same bytes, mangled."""
    if chance.random() < 0.2:
        return mutation.mangled(metadata, b"", chance)
    try:
        tree = msgspec.msgpack.decode(metadata)
        return msgspec.msgpack.encode(mutation.grown(tree, chance))
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return mutation.mangled(metadata, b"", chance)


def _header_changed(piece: Piece, chance: Random) -> Piece:
    number = mutation.number(chance, 32)
    match chance.randrange(9):
        case 0:
            return replace(piece, kind=chance.choice((*FrameType, number & 255)))
        case 1:
            return replace(piece, codec=chance.choice((0, 1, 2, 255)))
        case 2:
            return replace(piece, count=number)
        case 3:
            return replace(piece, runs=number)
        case 4:
            return replace(piece, metadata_bytes=number)
        case 5:
            return replace(piece, payload_bytes=number)
        case 6:
            return replace(piece, version=number & 255)
        case 7:
            return replace(piece, zero=number & 255)
        case _:
            return replace(piece, count=max(0, piece.count + chance.choice((-1, 1))))


def _record_changed(piece: Piece, chance: Random) -> Piece:
    """A page record about other pages, or with other content; often all its sizes and digests agree."""
    split = min(piece.runs, len(piece.metadata) // RUN.size) * RUN.size
    table = [list(run) for run in RUN.iter_unpack(piece.metadata[:split])] or [[0, 1]]
    digests = piece.metadata[split:]
    choice = chance.random()
    if choice < 0.3:
        run = chance.choice(table)
        run[0] = mutation.number(chance, 32) if chance.random() < 0.6 else chance.randrange(600)
    elif choice < 0.45:
        chance.choice(table)[1] = mutation.number(chance, 32)
    elif choice < 0.6:
        table = mutation.reordered(table, chance) or table
    elif choice < 0.75 and piece.payload:
        return replace(piece, payload=mutation.mangled(piece.payload, b"", chance))
    elif choice < 0.95 and piece.kind == PAGES and not piece.codec:
        return _other_content(piece, table, chance)
    else:
        digests = mutation.mangled(digests, b"", chance)
    packed = b"".join(struct.pack("<II", *run) for run in table)
    count = piece.count if chance.random() < 0.3 else sum(pages for _, pages in table) & 0xFFFF_FFFF
    return replace(piece, metadata=packed + digests, runs=len(table), count=count)


def _other_content(piece: Piece, table: list[list[int]], chance: Random) -> Piece:
    """Pages whose bytes are others, of the same length, and whose digests say so."""
    payload = mutation.flipped(piece.payload, b"", chance)
    digests = b"".join(
        xxh3_128_digest(payload[at : at + _PAGE_BYTES]) for at in range(0, len(payload), _PAGE_BYTES)
    )
    packed = b"".join(struct.pack("<II", *run) for run in table)
    return replace(piece, metadata=packed + digests, payload=payload)
