"""The device state of a QEMU guest as it travels: what the destination must know first, then QEMU's stream.

::

    8 bytes "migdQEMU" | u32 length of the heading, little-endian | heading, JSON | stream of QEMU's `migrate`
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from migd.errors import GuestError

_MAGIC = b"migdQEMU"
_LENGTH = struct.Struct("<I")
_HEADING_BYTES = 1 << 16


class Heading(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the source's QEMU."""

    version: Literal[1] = 1
    qemu: str
    machine: str
    """With its version, like pc-i440fx-7.2: QEMU loads the state of no other."""
    stopped_at_ns: int


def encode(heading: Heading, stream: bytes | bytearray) -> bytes:
    text = msgspec.json.encode(heading)
    return b"".join((_MAGIC, _LENGTH.pack(len(text)), text, stream))


def decode(blob: bytes) -> tuple[Heading, memoryview]:
    """GuestError if this is no QEMU's state."""
    begin = len(_MAGIC) + _LENGTH.size
    if not blob.startswith(_MAGIC) or len(blob) < begin:
        raise GuestError("the device state is not that of a QEMU: the guests at both ends are of one kind")
    (length,) = _LENGTH.unpack_from(blob, len(_MAGIC))
    if length > min(_HEADING_BYTES, len(blob) - begin):
        raise GuestError("the heading of the device state is damaged")
    try:
        heading = msgspec.json.decode(blob[begin : begin + length], type=Heading)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise GuestError(f"the heading of the device state cannot be read: {error}") from error
    return heading, memoryview(blob)[begin + length :]
