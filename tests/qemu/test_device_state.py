"""The device state of a QEMU as it travels, and whatever else may come in its place."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.errors import GuestError
from migd.qemu import device_state
from migd.qemu.device_state import Heading

HEADING = Heading(qemu="QEMU 7.2.22", machine="pc-i440fx-7.2", stopped_at_ns=1_700_000_000_000_000_001)
STREAM = b"QEVM\x00\x00\x00\x03" + bytes(range(256)) * 3
BLOB = device_state.encode(HEADING, STREAM)
TEXT_BYTES = len(msgspec.json.encode(HEADING))
NO_QEMU = "the device state is not that of a QEMU: the guests at both ends are of one kind"


def framed(text: bytes, length: int | None = None) -> bytes:
    return b"migdQEMU" + (len(text) if length is None else length).to_bytes(4, "little") + text


def test_the_bytes_are_those_of_the_description() -> None:
    text = b'{"version":1,"qemu":"QEMU 7.2.22","machine":"pc-i440fx-7.2","stopped_at_ns":1700000000000000001}'
    assert framed(text) + STREAM == BLOB
    assert device_state.decode(BLOB) == (HEADING, memoryview(STREAM))


@given(st.text(max_size=70), st.text(max_size=70), st.integers(-(1 << 63), (1 << 63) - 1), st.binary())
def test_what_is_encoded_is_decoded(qemu: str, machine: str, stopped_at_ns: int, stream: bytes) -> None:
    heading = Heading(qemu=qemu, machine=machine, stopped_at_ns=stopped_at_ns)
    for given_as in (stream, bytearray(stream)):
        found, rest = device_state.decode(device_state.encode(heading, given_as))
        assert (found, bytes(rest)) == (heading, stream)


WRONG: list[tuple[str, bytes, str]] = [
    ("nothing", b"", NO_QEMU),
    ("the state of a stub", b'{"tick": 1}', NO_QEMU),
    ("the stream alone", STREAM, NO_QEMU),
    ("the magic alone", b"migdQEMU", NO_QEMU),
    ("half a length", b"migdQEMU\x00\x00\x00", NO_QEMU),
    ("no heading", framed(b""), "the heading of the device state cannot be read"),
    ("a heading longer than all", framed(b"{}", 3), "the heading of the device state is damaged"),
    ("a heading without end", framed(b"{}", (1 << 32) - 1), "the heading of the device state is damaged"),
    ("a heading that is too long", framed(b" " * (1 << 16) + b"{}") + bytes(100), "is damaged"),
    ("no JSON", framed(b"\xff\xfe"), "cannot be read"),
    ("nesting without end", framed(b"[" * 60_000), "cannot be read"),
    ("less than a heading", framed(b'{"qemu":"a","machine":"b"}'), "cannot be read: .*stopped_at_ns"),
    ("more than a heading",
     framed(b'{"qemu":"a","machine":"b","stopped_at_ns":1,"x":1}'), "cannot be read: .*unknown field"),
    ("another version",
     framed(b'{"version":2,"qemu":"a","machine":"b","stopped_at_ns":1}'), "cannot be read: .*version"),
    ("a number beyond all", framed(b'{"qemu":"a","machine":"b","stopped_at_ns":1e400}'), "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "blob", "reason"), WRONG, ids=[row[0] for row in WRONG])
def test_anything_else_is_refused(name: str, blob: bytes, reason: str) -> None:
    with pytest.raises(GuestError, match=reason):
        device_state.decode(blob)


@pytest.mark.parametrize("length", range(12 + TEXT_BYTES))
def test_one_that_is_cut_within_its_heading_is_refused(length: int) -> None:
    with pytest.raises(GuestError):
        device_state.decode(BLOB[:length])


@given(st.integers(0, 12 + TEXT_BYTES - 1), st.integers(1, 255))
def test_a_damaged_byte_is_an_error_or_another_heading_and_nothing_else(at: int, mask: int) -> None:
    damaged = bytearray(BLOB)
    damaged[at] ^= mask
    try:
        heading, _ = device_state.decode(bytes(damaged))
    except GuestError:
        return
    assert isinstance(heading, Heading)
