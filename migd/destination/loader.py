"""Loader: one data stream's frames -> validated, decompressed, placed, and digested again from RAM (R16)."""

from __future__ import annotations

import numpy as np

from migd.errors import ProtocolError, ResourceError, VerificationError
from migd.ram.bitmap import PageIndices, expand_runs
from migd.ram.block import PAGE_BYTES, RamLayout
from migd.ram.digest import page_digests
from migd.wire.codec import decompress
from migd.wire.framing import Frame
from migd.wire.protocol import MAX_PAGES_PER_FRAME, Codec, FrameType


class Loader:
    """Places the page records of one stream. ``place`` runs in a worker, one frame at a time."""

    def __init__(self, ram: RamLayout) -> None:
        self._ram = ram
        self._scratch = np.empty((MAX_PAGES_PER_FRAME, PAGE_BYTES), np.uint8)

    def place(self, frame: Frame) -> int:
        """Bytes of RAM the record settled. ProtocolError before RAM is touched if it does not fit.

        VerificationError if RAM does not hold what was sent, ResourceError if there is no memory left.
        """
        indices = expand_runs(frame.page_runs(self._ram.pages))
        try:
            if frame.type is FrameType.PAGES:
                self._place_pages(frame, indices)
            else:
                self._ram.zero(indices)
        except OSError as error:
            raise ResourceError(f"placing {frame.count} pages: {error.strerror}") from error
        return frame.count * PAGE_BYTES

    def _place_pages(self, frame: Frame, indices: PageIndices) -> None:
        payload: memoryview | bytes = frame.payload
        if frame.codec is Codec.LZ4:
            payload = decompress(frame.payload, frame.count * PAGE_BYTES)
        if len(payload) != frame.count * PAGE_BYTES:
            raise ProtocolError(f"a payload of {len(payload)} bytes for {frame.count} pages")
        self._ram.write(indices, np.frombuffer(payload, np.uint8).reshape(-1, PAGE_BYTES))
        placed = page_digests(self._ram.read(indices, self._scratch))
        wrong = indices[(placed != frame.page_digests()).any(axis=1)]
        if len(wrong):
            raise VerificationError(f"{len(wrong)} pages arrived damaged, the first is page {wrong[0]}")
