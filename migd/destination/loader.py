"""Loader: one data stream's frames -> validated, decompressed, placed, and digested again from RAM (R16)."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from migd.errors import ProtocolError, ResourceError, VerificationError
from migd.migration.ports import Link
from migd.ram.bitmap import PageIndices, Run, expand_runs
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import DIGEST_BYTES, joined_digests
from migd.ram.layout import RamLayout
from migd.wire.codec import decompress
from migd.wire.framing import Frame
from migd.wire.protocol import PAGE_RECORDS, Codec, FrameType

INTAKE_BYTES = 16 << 20
"""Of RAM settled for each hop between loop and thread; some 20 ms, after which PONGs tell of it."""


@dataclass(frozen=True)
class Intake:
    """What a stream brought: page records, placed, then perhaps a frame of another kind."""

    placed_bytes: int
    frame: Frame | None


class Loader:
    """Places the page records of one stream. ``take_in`` and ``place`` run in a worker, one at a time."""

    def __init__(self, ram: RamLayout, writing: threading.Lock) -> None:
        """``writing``, one for all streams: the kernel lets one at a time write a file, and others spin."""
        self._ram = ram
        self._writing = writing

    def take_in(self, link: Link, allowance_bytes: float) -> Intake:
        """Receive and place what comes without long waits, until ``allowance_bytes`` are exceeded.

        Raises what ``place`` and the link raise.
        """
        placed_bytes, up_to_bytes = 0, link.received_bytes + allowance_bytes
        while placed_bytes < INTAKE_BYTES and link.received_bytes < up_to_bytes:
            frame = link.receive_now()
            if frame is None or frame.type not in PAGE_RECORDS:
                return Intake(placed_bytes, frame)
            placed_bytes += self.place(frame)
        return Intake(placed_bytes, None)

    def place(self, frame: Frame) -> int:
        """Bytes of RAM the record settled. ProtocolError before RAM is touched if it does not fit.

        VerificationError if RAM does not hold what was sent, ResourceError if there is no memory left.
        """
        runs = frame.page_runs(self._ram.pages)
        try:
            if frame.type is FrameType.PAGES:
                self._place_pages(frame, runs)
            else:
                self._ram.zero(runs)
        except OSError as error:
            raise ResourceError(f"placing {frame.count} pages: {error.strerror}") from error
        return frame.count * PAGE_BYTES

    def _place_pages(self, frame: Frame, runs: list[Run]) -> None:
        payload = frame.payload
        if frame.codec is Codec.LZ4:
            payload = memoryview(decompress(frame.payload, frame.count * PAGE_BYTES))
        if len(payload) != frame.count * PAGE_BYTES:
            raise ProtocolError(f"a payload of {len(payload)} bytes for {frame.count} pages")
        with self._writing:
            self._ram.write(runs, payload)
        placed = b"".join([joined_digests(pages) for pages in self._ram.look(runs)])
        if placed != frame.page_digests:
            raise VerificationError(_damage(expand_runs(np.array(runs)), placed, frame.page_digests))


def _damage(pages: PageIndices, placed: bytes, sent: bytes) -> str:
    """Which pages are not what was sent, in words."""
    found, wanted = (np.frombuffer(all, np.uint8).reshape(-1, DIGEST_BYTES) for all in (placed, sent))
    wrong = pages[(found != wanted).any(axis=1)]
    return f"{len(wrong)} pages arrived damaged, the first is page {wrong[0]}"
