"""Batcher: picked pages -> private copy -> zero split -> digests -> payload. One per stream, in a worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migd.migration.ports import Clock
from migd.ram.bitmap import PageIndices, Run, runs_of
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import joined_digests
from migd.ram.layout import RamLayout
from migd.ram.zero import zero_pages
from migd.wire.codec import SAMPLE_BYTES, CodecChoice, compress
from migd.wire.protocol import Codec

BATCH_PAGES = 512
"""2 MiB, the largest frame: the more pages share its fixed cost (three system calls, and cold caches)."""


@dataclass(frozen=True)
class Batch:
    """One frame's worth of pages, split. ``payload`` is valid as long as the buffer it was built in."""

    runs: list[Run]
    """Of the pages that are not zero."""
    count: int
    zero: PageIndices
    copies: NDArray[np.uint8]
    """Of those that are not: shape (count, 4096), valid as long as the buffer."""
    digests: bytes
    codec: Codec
    payload: memoryview


class Batcher:
    """Builds batches of one stream."""

    def __init__(self, ram: RamLayout, choice: CodecChoice, clock: Clock) -> None:
        self._ram = ram
        self._choice = choice
        self._clock = clock

    def build(self, indices: PageIndices, buffer: memoryview) -> Batch:
        """Read up to BATCH_PAGES pages, whose mark was cleared before (R8), and pack what is not zero.

        They are read into ``buffer``, which has room for BATCH_PAGES.
        """
        pages = self._ram.read(indices, np.frombuffer(buffer, np.uint8).reshape(-1, PAGE_BYTES))
        is_zero = zero_pages(pages)
        zero, data = indices[:0], indices
        if is_zero.any():
            zero, data, pages = indices[is_zero], indices[~is_zero], pages[~is_zero]
        codec, payload = self._pack(pages)
        return Batch(runs_of(data), len(data), zero, pages, joined_digests(pages), codec, payload)

    def _pack(self, pages: NDArray[np.uint8]) -> tuple[Codec, memoryview]:
        raw = pages.data.cast("B") if len(pages) else memoryview(b"")
        if len(raw) and self._choice.sample_due():
            self._compress(raw[:SAMPLE_BYTES])
        if len(raw) and self._choice.choose() is Codec.LZ4:
            packed = self._compress(raw)
            if len(packed) < len(raw):
                return Codec.LZ4, memoryview(packed)
        return Codec.NONE, raw

    def _compress(self, data: memoryview) -> bytes:
        began = self._clock.now()
        packed = compress(data)
        self._choice.packed(len(data), len(packed), self._clock.now() - began)
        return packed
