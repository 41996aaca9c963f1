"""A second reader of the wire protocol, written from the words of ``migd.wire.protocol`` and nothing else.

It shares no code with the decoder, the messages or the loader; what it calls valid, and the image it builds,
is what those are compared with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import lz4.block
from xxhash import xxh3_128_digest

_PAGE = 4096
_MESSAGES = frozenset((*range(1, 12), 19, 20, *range(33, 41)))
_TYPES = _MESSAGES | {16, 17, 18, 32}


class Unreadable(Exception):
    """The specification does not allow these bytes."""


@dataclass(frozen=True)
class Read:
    """One frame: its type, what its record says of pages, and its bytes."""

    kind: int
    count: int
    runs: tuple[tuple[int, int], ...]
    """(first page, pages)."""
    codec: int
    metadata: bytes
    payload: bytes
    digest: bytes


def frames(stream: bytes) -> Iterator[Read]:
    """The frames of one connection and direction. Unreadable at the first byte that breaks the protocol.

    A stream that ends inside a frame just ends.
    """
    at, due = 0, 0
    while at + 48 <= len(stream):
        head = stream[at : at + 32]
        magic, version, kind, codec, zero, sequence, count, runs, metadata, payload = struct.unpack(
            "<4sBBBBQIIII", head
        )
        digest = stream[at + 32 : at + 48]
        if magic != b"MIGD" or version != 2 or kind not in _TYPES or codec > 1 or zero or sequence != due:
            raise Unreadable("header")
        _check_sizes(kind, codec, count, runs, metadata, payload)
        at, due = at + 48, due + 1
        if len(stream) < at + metadata + payload:
            return
        body = stream[at : at + metadata]
        if xxh3_128_digest(head + body) != digest:
            raise Unreadable("digest")
        table = tuple(struct.iter_unpack("<II", body[: 8 * runs]))
        yield Read(kind, count, table, codec, body, stream[at + metadata : at + metadata + payload], digest)
        at += metadata + payload


def _check_sizes(kind: int, codec: int, count: int, runs: int, metadata: int, payload: int) -> None:
    if metadata > 1 << 20 or payload > 2 << 20 or runs > 1 << 16:
        raise Unreadable("beyond a limit")
    if kind not in (16, 17, 18):
        if count or runs or payload or codec:
            raise Unreadable("a message with pages")
        return
    if not runs or count < runs:
        raise Unreadable("runs without pages")
    if kind != 16:
        if codec or payload or metadata != 8 * runs:
            raise Unreadable("a record of runs and more")
        return
    if count > 512 or metadata != 8 * runs + 16 * count:
        raise Unreadable("metadata of PAGES")
    if (payload != count * _PAGE) if not codec else not (0 < payload < count * _PAGE):
        raise Unreadable("payload of PAGES")


def pages_of(record: Read, pages: int) -> dict[int, bytes]:
    """Page -> content, as the record says, for RAM of ``pages`` pages; zero pages as b"". Unreadable."""
    numbers: list[int] = []
    below = -1
    for first, length in record.runs:
        if not length or first <= below or first + length > pages:
            raise Unreadable("runs")
        below = first + length
        if len(numbers) + length > record.count:
            raise Unreadable("more pages in the runs than announced")
        numbers += range(first, first + length)
    if len(numbers) != record.count:
        raise Unreadable("fewer pages in the runs than announced")
    if record.kind != 16:
        return dict.fromkeys(numbers, b"")
    content = record.payload if not record.codec else _unpacked(record.payload, record.count * _PAGE)
    found = {}
    for row, number in enumerate(numbers):
        page = content[_PAGE * row : _PAGE * (row + 1)]
        at = 8 * len(record.runs) + 16 * row
        if xxh3_128_digest(page) != record.metadata[at : at + 16]:
            raise Unreadable("page digest")
        found[number] = page
    return found


def _unpacked(payload: bytes, size: int) -> bytes:
    try:
        content: bytes = lz4.block.decompress(payload, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise Unreadable("lz4") from error
    if len(content) != size:
        raise Unreadable("an lz4 payload of another size")
    return content
