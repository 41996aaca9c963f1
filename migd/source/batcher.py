"""Batcher: picked pages -> private copy -> zero split -> digests -> payload. One per stream, in a worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migd.migration.ports import Clock
from migd.ram.bitmap import PageIndices
from migd.ram.block import PAGE_BYTES, RamLayout
from migd.ram.digest import DIGEST_BYTES, ZERO_PAGE_DIGEST, page_digests
from migd.ram.zero import zero_pages
from migd.wire.codec import SAMPLE_BYTES, CodecChoice, compress
from migd.wire.protocol import Codec

BATCH_PAGES = 512
"""2 MiB, the largest frame: the more pages share its fixed cost (two thread hops, three system calls)."""


class SentDigests:
    """The digest of each page as last sent (16 bytes a page): what tracking verification compares with."""

    def __init__(self, pages: int) -> None:
        # calloc: rows of pages that are never sent never become resident.
        self._table: NDArray[np.uint8] = np.zeros((pages, DIGEST_BYTES), np.uint8)

    def put(self, indices: PageIndices, digests: NDArray[np.uint8]) -> None:
        """Remember digests, shape (n, 16) or (16,), for pages."""
        self._table[indices] = digests

    def differing(self, indices: PageIndices, digests: NDArray[np.uint8]) -> PageIndices:
        """Those of the pages whose digest is not the remembered one."""
        differs: NDArray[np.bool_] = (self._table[indices] != digests).any(axis=1)
        return indices[differs]


@dataclass(frozen=True)
class Batch:
    """One frame's worth of pages, split. ``payload`` is valid until the batcher's next ``build``."""

    data: PageIndices
    zero: PageIndices
    digests: bytes
    codec: Codec
    payload: memoryview


class Batcher:
    """Builds batches of one stream in a buffer of its own."""

    def __init__(self, ram: RamLayout, sent: SentDigests, choice: CodecChoice, clock: Clock) -> None:
        self._ram = ram
        self._sent = sent
        self._choice = choice
        self._clock = clock
        self._buffer = np.empty((BATCH_PAGES, PAGE_BYTES), np.uint8)
        self._zero_digest = np.frombuffer(ZERO_PAGE_DIGEST, np.uint8)

    def build(self, indices: PageIndices) -> Batch:
        """Read up to BATCH_PAGES pages, whose mark was cleared before (R8), and pack what is not zero."""
        pages = self._ram.read(indices, self._buffer)
        is_zero = zero_pages(pages)
        zero = indices[is_zero]
        data = indices
        if len(zero):
            self._sent.put(zero, self._zero_digest)
            pages, data = pages[~is_zero], indices[~is_zero]
        digests = page_digests(pages)
        self._sent.put(data, digests)
        codec, payload = self._pack(pages)
        return Batch(data, zero, digests.tobytes(), codec, payload)

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
