"""What the machine can do at most, measured in the same run as the migrations, so that both can be compared.

Each is what one core or one stream reaches with the very calls that migd uses; no migration can be faster
than the slowest of those that it needs.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from migd.bench.cases import binaries
from migd.bench.touch import touch_in_child
from migd.guest.allocator import MAX_RUN_PAGES
from migd.guest.content import FileContent
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import page_digests
from migd.source.batcher import BATCH_PAGES
from migd.wire import codec

CHUNK_BYTES = BATCH_PAGES * PAGE_BYTES
"""What migd copies, packs and sends at a time."""

_SETTLE_S = 3.0
"""After so long without use, a virtual machine has handed free memory back: longer than the 1 to 2 s seen."""
_REPEATS = 4
_COPY_BYTES = 128 << 20
"""Far more than any cache holds."""
_LOOPBACK_CHUNKS = 128
_PROGRAM_CHUNKS = 16


class MachineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """All in 10^9 bytes a second of content, the best of a few attempts but for the first touches."""

    memcpy_gb_s: float
    first_touch_fresh_gb_s: float
    """pwrite of 1 MiB runs into a new memfd, in memory that was not used for a few seconds ..."""
    first_touch_gb_s: float
    """... and in memory touched and freed right before, as it is for every run."""
    loopback_gb_s: float
    """One TCP connection, from one thread to another."""
    lz4_compress_gb_s: float
    """Of programs and shared libraries, on one core ..."""
    lz4_decompress_gb_s: float
    lz4_ratio: float
    """... and how many times smaller they get."""
    xxh3_page_gb_s: float
    """XXH3-128 page by page, on one core."""


def measure(touch_bytes: int) -> MachineLimits:
    """Takes about five seconds and, for a moment, ``touch_bytes`` of memory."""
    time.sleep(_SETTLE_S)
    fresh_s, again_s = touch_in_child(touch_bytes), touch_in_child(touch_bytes)
    chunks = _program_chunks()
    packed = [memoryview(codec.compress(chunk.data)) for chunk in chunks]
    chunk_bytes = _PROGRAM_CHUNKS * CHUNK_BYTES
    return MachineLimits(
        memcpy_gb_s=_memcpy_gb_s(),
        first_touch_fresh_gb_s=touch_bytes / fresh_s / 1e9,
        first_touch_gb_s=touch_bytes / again_s / 1e9,
        loopback_gb_s=_best_gb_s(_LOOPBACK_CHUNKS * CHUNK_BYTES, _stream_over_loopback),
        lz4_compress_gb_s=_best_gb_s(chunk_bytes, lambda: [codec.compress(chunk.data) for chunk in chunks]),
        lz4_decompress_gb_s=_best_gb_s(
            chunk_bytes, lambda: [codec.decompress(payload, CHUNK_BYTES) for payload in packed]
        ),
        lz4_ratio=chunk_bytes / sum(map(len, packed)),
        xxh3_page_gb_s=_best_gb_s(chunk_bytes, lambda: [page_digests(chunk) for chunk in chunks]),
    )


def _best_gb_s(size_bytes: int, once: Callable[[], object]) -> float:
    """Of _REPEATS attempts: what the others lost, they lost to somebody else."""
    best_s = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        once()
        best_s = min(best_s, time.perf_counter() - begun)
    return size_bytes / best_s / 1e9


def _program_chunks() -> list[NDArray[np.uint8]]:
    """What full-compressible fills RAM with, shape (BATCH_PAGES, 4096) each, as a batch is packed."""
    content = FileContent(tuple(str(path) for path in binaries()))
    try:
        return [_chunk(content) for _ in range(_PROGRAM_CHUNKS)]
    finally:
        content.close()


def _chunk(content: FileContent) -> NDArray[np.uint8]:
    data = b"".join(content.take(MAX_RUN_PAGES) for _ in range(BATCH_PAGES // MAX_RUN_PAGES))
    return np.frombuffer(data, np.uint8).reshape(BATCH_PAGES, PAGE_BYTES)


def _memcpy_gb_s() -> float:
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    return _best_gb_s(_COPY_BYTES, lambda: np.copyto(target, source))


def _stream_over_loopback() -> None:
    """_LOOPBACK_CHUNKS chunks through one connection; returns once the last byte has arrived."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = threading.Thread(target=_receive_all, args=(listener,), daemon=True)
        receiver.start()
        with socket.create_connection(listener.getsockname()) as sender:
            chunk = bytes(CHUNK_BYTES)
            for _ in range(_LOOPBACK_CHUNKS):
                sender.sendall(chunk)
        receiver.join()


def _receive_all(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        buffer = bytearray(CHUNK_BYTES)
        while sock.recv_into(buffer):
            pass
