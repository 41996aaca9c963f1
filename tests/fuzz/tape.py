"""Tape: what a source said on all connections of one migration, as one input."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HEAD = struct.Struct("<BI")
_TOKEN_BYTES = 16
MAX_CONNECTIONS = 9


@dataclass(frozen=True)
class Connection:
    """One connection, in the order in which they were opened: the first one is the control connection."""

    data: bytes
    ends: bool = False
    """It is closed behind its last byte; else the source is silent from there on."""


@dataclass(frozen=True)
class Tape:
    """``token`` is what the destination gave out, and its entropy gives again when the tape is played."""

    token: bytes
    connections: tuple[Connection, ...]

    def packed(self) -> bytes:
        return self.token + b"".join(
            _HEAD.pack(connection.ends, len(connection.data)) + connection.data
            for connection in self.connections
        )


def unpacked(data: bytes) -> Tape:
    """ValueError if it is none."""
    token, at, found = data[:_TOKEN_BYTES], _TOKEN_BYTES, []
    if len(token) != _TOKEN_BYTES:
        raise ValueError("a tape begins with a token")
    while at < len(data):
        if len(data) - at < _HEAD.size or len(found) == MAX_CONNECTIONS:
            raise ValueError("a tape of too many or of half a connection")
        ends, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if len(data) - at < size:
            raise ValueError("a connection is cut short")
        found.append(Connection(data[at : at + size], bool(ends)))
        at += size
    return Tape(token, tuple(found))
