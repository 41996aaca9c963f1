"""Packing the payload of a PAGES frame, and deciding per chunk whether that pays."""

from __future__ import annotations

import lz4.block

from migd.errors import ProtocolError
from migd.wire.protocol import Codec

SAMPLE_BYTES = 64 << 10
"""Of one chunk, compressed only to learn how memory and processor do at present: 0.1 ms."""

_SAMPLE_EVERY = 8
"""Chunks of 1 MiB sent raw between two samples: they cost 0.8 % of compressing everything."""

_PACKING_MEMORY_BYTES = 1 << 20
"""How much compressed traffic the estimate of lz4 looks back on: the last chunk, or 16 samples."""

_SENDING_MEMORY_BYTES = 32 << 20
"""How much traffic the estimate of the link looks back on: more than the socket buffers, which swallow the
first megabytes at memory speed and would make any link look fast."""


def compress(data: memoryview) -> bytes:
    """LZ4 block without a size header. The caller owns ``data``: lz4 of changing memory is undecodable."""
    packed: bytes = lz4.block.compress(data, mode="default", store_size=False)
    return packed


def decompress(payload: memoryview, size: int) -> bytes:
    """Exactly ``size`` bytes, or ProtocolError: lz4 may return fewer without complaint."""
    try:
        data: bytes = lz4.block.decompress(payload, uncompressed_size=size)
    except lz4.block.LZ4BlockError as error:
        raise ProtocolError(f"undecodable lz4 payload: {error}") from error
    if len(data) != size:
        raise ProtocolError(f"an lz4 payload of {len(data)} bytes where {size} were announced")
    return data


class _Rate:
    """Bytes per second, and what became of them, over the last ``memory_bytes`` or so."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self.bytes_in = 0.0
        self.bytes_out = 0.0
        self.seconds = 0.0

    def add(self, bytes_in: int, bytes_out: int, seconds: float) -> None:
        keep = max(0.0, 1 - bytes_in / self._memory_bytes)
        self.bytes_in = self.bytes_in * keep + bytes_in
        self.bytes_out = self.bytes_out * keep + bytes_out
        self.seconds = self.seconds * keep + seconds


class CodecChoice:
    """Decides chunk by chunk: compress while time to compress and send is less than time to send raw.

    On a link faster than about cores x 0.65 GB/s lz4 loses (docs/architecture.md), and only the run itself
    shows how fast the link and how compressible the memory is. Time is an argument; one per migration.
    """

    def __init__(self, fixed: Codec | None = None) -> None:
        self._fixed = fixed
        self._packing = _Rate(_PACKING_MEMORY_BYTES)
        self._sending = _Rate(_SENDING_MEMORY_BYTES)
        self._raw_in_a_row = 0

    def choose(self) -> Codec:
        """For the next chunk."""
        if self._fixed is not None:
            return self._fixed
        if self._pays():
            self._raw_in_a_row = 0
            return Codec.LZ4
        self._raw_in_a_row += 1
        return Codec.NONE

    def sample_due(self) -> bool:
        """Whether a piece of the next chunk should be compressed, and reported to ``packed``, to learn."""
        return self._fixed is None and self._raw_in_a_row % _SAMPLE_EVERY == 0

    def _pays(self) -> bool:
        packing, sending = self._packing, self._sending
        if not sending.bytes_in or not packing.bytes_in:
            return False
        seconds_per_byte = sending.seconds / sending.bytes_in
        saved = 1 - packing.bytes_out / packing.bytes_in
        return packing.seconds / packing.bytes_in < saved * seconds_per_byte

    def packed(self, bytes_in: int, bytes_out: int, seconds: float) -> None:
        """A chunk, or a sample of one, was compressed."""
        self._packing.add(bytes_in, bytes_out, seconds)

    def sent(self, size: int, seconds: float) -> None:
        """A payload was handed to a stream, which took ``seconds`` to accept it."""
        self._sending.add(size, size, seconds)
