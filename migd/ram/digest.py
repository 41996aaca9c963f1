"""Per-page digests: mmh3 x64 128 of 4096 bytes, against accidents, never against an attacker (R18)."""

from __future__ import annotations

import mmh3
import numpy as np
from numpy.typing import NDArray

from migd.ram.block import PAGE_BYTES

DIGEST_BYTES = 16

frame_digest = mmh3.mmh3_x64_128_digest
"""16 bytes over any buffer; the digest of a wire frame and of one page."""

ZERO_PAGE_DIGEST = frame_digest(bytes(PAGE_BYTES))


def page_digests(pages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digests of an array of pages, shape (n, 4096) -> (n, 16).

    mmh3 holds the interpreter lock (6 GB/s per 4 KiB page, and no more with threads), so the caller keeps
    this off the event loop's thread, in slices of at most a frame.
    """
    joined = bytearray().join(map(frame_digest, pages))
    return np.frombuffer(joined, np.uint8, len(joined)).reshape(-1, DIGEST_BYTES)
