"""Parsers that are wrong on purpose, each in one thing: the fuzzer finds every one within its bound."""

from __future__ import annotations

import os
import socket
import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest

from migd.destination import reception
from migd.destination.loader import Loader
from migd.errors import GuestError, ProtocolError
from migd.guest import control
from migd.guest.guest import Guest
from migd.guest.hint_receiver import SocketHints
from migd.guest.hints import HintDecoder, HintFrame
from migd.guest.machine import page_digest
from migd.ram.bitmap import PageBitmap, Run
from migd.ram.block import PAGE_BYTES
from migd.wire import framing
from migd.wire.codec import decompress
from migd.wire.framing import Frame, FrameDecoder, StreamAccount
from migd.wire.protocol import RUN, Codec
from tests.fuzz import campaign
from tests.fuzz.campaign import Chunk, run_chunk
from tests.fuzz.target import Target
from tests.fuzz.targets.files import DeviceStates
from tests.fuzz.targets.guest_control import FromGuest
from tests.fuzz.targets.hints import HintFrames, HintReceiver
from tests.fuzz.targets.replies import Replies
from tests.fuzz.targets.session import Session
from tests.fuzz.targets.wire import Frames, Placing

BOUND = 3000


def found(target: Target, bound: int = BOUND, sample_every: int = 50) -> str:
    """What is wrong with the first input that shows it; the test fails if none does."""
    try:
        for number in range(bound // 100):
            chunk = Chunk(target.name, 1, number, 100)
            if findings := run_chunk(target, chunk, remember=len, sample_every=sample_every).findings:
                return findings[0].what
    finally:
        target.close()
    pytest.fail(f"not found with {bound} inputs")


# -- wire -------------------------------------------------------------------------------------------


_complete = FrameDecoder._complete


def _complete_whatever(decoder: FrameDecoder) -> Frame:
    """The frame's digest is that of its bytes, whatever it says it is."""
    assert decoder._fields is not None
    digest = framing.frame_digest(bytes(decoder._header[:32]) + bytes(decoder._metadata))
    decoder._fields = replace(decoder._fields, digest=digest)
    return _complete(decoder)


class SkipsTheDigest(FrameDecoder):
    _complete = _complete_whatever


class GoesOn(FrameDecoder):
    """After an error it looks for the next frame, as if nothing had been."""

    def advance(self, received: int) -> Frame | None:
        try:
            return super().advance(received)
        except ProtocolError:
            self._sequence = 0
            self._expect_header()
            raise


class TakesItsTime(FrameDecoder):
    """Hangs in a frame of another type than it has seen before, where there are two of them."""

    def _complete(self) -> Frame:
        frame = super()._complete()
        while self._sequence == 3 and not frame.metadata.startswith(b"\x82"):
            pass
        return frame


class Hoards(FrameDecoder):
    """Makes room for the largest stream there could be, whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self._room = bytearray(64 << 20)


def test_a_decoder_that_skips_the_digest() -> None:
    assert "specification" in found(Frames(SkipsTheDigest))


def test_a_decoder_that_goes_on_after_an_error() -> None:
    assert "goes on" in found(Frames(GoesOn))


def test_a_decoder_that_believes_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing._Header, "_sizes_fit", lambda _header: True)
    what = found(Frames(), sample_every=1)
    assert "asks for" in what or "specification" in what or "allocated" in what


def test_a_decoder_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "HANG_S", 0.1)
    assert "processor time" in found(Frames(TakesItsTime))


def test_a_decoder_that_allocates_out_of_proportion() -> None:
    assert "were allocated" in found(Frames(Hoards), sample_every=1)


# -- placing ----------------------------------------------------------------------------------------


class TrustsContent(Loader):
    """Does not look at what lies in RAM."""

    def _place_pages(self, frame: Frame, runs: list[Run]) -> None:
        payload = frame.payload
        if frame.codec is Codec.LZ4:
            payload = memoryview(decompress(frame.payload, frame.count * PAGE_BYTES))
        self._ram.write(runs, payload)


class PlacesFirst(Loader):
    """Puts ZERO and FREE records down run by run, and looks at the next run then."""

    def place(self, frame: Frame) -> int:
        for start, length in RUN.iter_unpack(frame.metadata[: 8 * frame.run_count]):
            if start + length <= self._ram.pages and length:
                self._ram.write([(start, start + 1)], memoryview(b"\1" * PAGE_BYTES))
        return super().place(frame)


def test_a_loader_that_trusts_the_content() -> None:
    assert "a record was placed that is wrong" in found(Placing(TrustsContent))


def test_a_loader_that_places_before_it_has_looked_at_everything() -> None:
    assert "were written, and no record says so" in found(Placing(PlacesFirst))


def test_a_loader_that_does_not_look_at_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(frame: Frame, _pages: int) -> list[Run]:
        table = frame.metadata[: frame.run_count * RUN.size]
        return [(start, start + length) for start, length in RUN.iter_unpack(table)]

    monkeypatch.setattr(Frame, "page_runs", unchecked)
    assert found(Placing())


# -- sessions ---------------------------------------------------------------------------------------


class _EqualToAll:
    def __ne__(self, _other: object) -> bool:
        return False


def test_a_destination_that_believes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamAccount, "end", lambda _account, _migration: _EqualToAll())
    assert "READY for what the specification refuses" in found(Session(), 2000)


def test_a_destination_that_lets_anybody_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception.hmac, "compare_digest", lambda _ours, _theirs: True)
    assert "READY for what the specification refuses" in found(Session(), 2000)


def test_a_destination_without_frame_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameDecoder, "_complete", _complete_whatever)
    assert "READY for what the specification refuses" in found(Session(), 2000)


def test_a_source_without_frame_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FrameDecoder, "_complete", _complete_whatever)
    assert "nobody said so" in found(Replies())


# -- hints ------------------------------------------------------------------------------------------


class RoundsOutwards(SocketHints):
    """W05."""

    def _from_ranges(self, ranges: tuple[tuple[int, int], ...]) -> PageBitmap:
        free = PageBitmap(self._pages)
        for start, length in sorted(ranges):
            first, stop = start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)
            if length and stop <= self._pages:
                free.add_run(first, stop)
        return free


class SkipsTheChecksum(HintDecoder):
    """Of the body."""

    def _next(self) -> tuple[int, int, bytes] | int | None:
        if len(self._buffer) >= 28:
            length = int.from_bytes(self._buffer[8:12], "little")
            if len(self._buffer) >= 28 + length and self._buffer.startswith(b"fpH1"):
                self._buffer[20:24] = struct.pack("<I", zlib.crc32(self._buffer[28 : 28 + length]))
                self._buffer[24:28] = struct.pack("<I", zlib.crc32(self._buffer[:24]))
        return super()._next()


class Forgets(HintDecoder):
    """Throws where it must skip."""

    def feed(self, data: bytes | bytearray | memoryview) -> list[HintFrame]:
        frames = super().feed(data)
        if self.rejected_frames:
            raise ValueError("a frame whose content does not fit its type")
        return frames


def test_a_receiver_that_rounds_outwards() -> None:
    assert "the guest did not say so" in found(HintReceiver(RoundsOutwards))


def test_a_hint_decoder_that_skips_the_checksum() -> None:
    assert "a flipped bit makes another frame" in found(HintFrames(SkipsTheChecksum))


def test_a_hint_decoder_that_raises() -> None:
    assert found(HintFrames(Forgets)).startswith("ValueError: a frame whose content")


# -- guests -----------------------------------------------------------------------------------------


def _leaking(sock: socket.socket) -> tuple[Any, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, control.MAX_PACKET_BYTES, control.MAX_PACKET_FDS)
    try:
        return control._from_guest.decode(data), fds
    except ValueError as error:
        raise GuestError("a control packet is no message") from error


class SealsAnew(Guest):
    """Believes any device state whose digest can be computed."""

    def load(self, blob: bytes) -> None:
        super().load(blob[:8] + page_digest(blob[24:]) + blob[24:])


def test_a_daemon_that_leaks_descriptors_of_what_it_refuses() -> None:
    before = _descriptors()
    what = found(FromGuest(_leaking))
    control.close_all(sorted(_descriptors() - before))
    assert "descriptors were left open" in what


def _descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def test_a_guest_that_skips_the_digest_of_its_state() -> None:
    assert "a flipped bit went unnoticed" in found(DeviceStates(SealsAnew))
