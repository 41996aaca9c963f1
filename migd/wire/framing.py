"""Frames <-> bytes, pure: an encoder, and a pull decoder that hands out the buffer the next bytes belong in.

::

    view = decoder.next_buffer()      # never empty; sizes were checked before it was allocated
    n = await channel.receive_into(view)
    frame = decoder.advance(n)        # a whole, digest-checked Frame, or None
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from migd.errors import ProtocolError
from migd.ram.bitmap import Run
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import DIGEST_BYTES, frame_digest
from migd.wire import messages
from migd.wire.messages import Message
from migd.wire.protocol import (
    DIGESTED_HEADER_BYTES,
    FRAMING_VERSION,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_METADATA_BYTES,
    MAX_PAGES_PER_FRAME,
    MAX_PAYLOAD_BYTES,
    MAX_RUNS_PER_FRAME,
    PAGE_RECORDS,
    RUN,
    SOFTWARE,
    Codec,
    FrameType,
)

Buffer: TypeAlias = bytes | bytearray | memoryview


class OtherFraming(ProtocolError):
    """A peer of another framing version: no byte behind its header's fifth can be read here."""


@dataclass(frozen=True)
class Frame:
    """One frame whose sizes and digest hold. ``payload`` is valid until the decoder's next buffer."""

    type: FrameType
    codec: Codec
    count: int
    run_count: int
    digest: bytes
    metadata: bytes
    payload: memoryview

    def message(self) -> Message:
        """Its message. ProtocolError if it is a page record."""
        return messages.unpack(self.type, self.metadata)

    def page_runs(self, pages: int) -> list[Run]:
        """Half-open runs, checked against RAM of ``pages`` pages (R16). ProtocolError.

        Plain Python: most frames have a few runs, and a dozen numpy calls cost more than they do.
        """
        runs: list[Run] = []
        count, last = 0, -1
        for start, length in RUN.iter_unpack(self.metadata[: self.run_count * RUN.size]):
            if not length or start <= last:
                raise ProtocolError(f"{self.type.name}: runs are empty, touch, overlap or do not ascend")
            count, last = count + length, start + length
            runs.append((start, last))
        if last > pages:
            raise ProtocolError(f"{self.type.name}: pages up to {last} of a RAM of {pages} pages")
        if count != self.count:
            raise ProtocolError(f"{self.type.name}: {count} pages in the runs, {self.count} announced")
        return runs

    @property
    def page_digests(self) -> bytes:
        """Of a PAGES frame: the digests of its pages, 16 bytes each."""
        return self.metadata[self.run_count * RUN.size :]


class FrameEncoder:
    """Numbers and seals the frames of one connection and direction, and accounts for what END must say."""

    def __init__(self) -> None:
        self.account = StreamAccount()
        self._sequence = 0

    def message(self, message: Message) -> bytes:
        """A message frame."""
        kind, metadata = messages.pack(message)
        return self._seal(kind, metadata)

    def state(self, chunk: Buffer) -> bytes:
        """A chunk of device state, at most STATE_CHUNK_BYTES."""
        return self._seal(FrameType.STATE, bytes(chunk))

    def runs(self, kind: FrameType, runs: Iterable[Run]) -> bytes:
        """A ZERO or FREE record for ascending, separate runs, at most MAX_RUNS_PER_FRAME of them."""
        count, table = _table(list(runs))
        return self._seal(kind, table, count, len(table) // RUN.size)

    def pages(self, runs: list[Run], digests: bytes, codec: Codec, payload_bytes: int) -> bytes:
        """Everything of a PAGES frame in front of its payload, which the caller sends right behind it."""
        count, table = _table(runs)
        return self._seal(FrameType.PAGES, table + digests, count, len(runs), codec, payload_bytes)

    def _seal(
        self,
        kind: FrameType,
        metadata: bytes,
        count: int = 0,
        runs: int = 0,
        codec: Codec = Codec.NONE,
        payload_bytes: int = 0,
    ) -> bytes:
        header = HEADER.pack(
            MAGIC,
            FRAMING_VERSION,
            kind,
            codec,
            0,
            self._sequence,
            count,
            runs,
            len(metadata),
            payload_bytes,
            bytes(DIGEST_BYTES),
        )[:DIGESTED_HEADER_BYTES]
        self._sequence += 1
        digest = frame_digest(header + metadata)
        self.account.add(kind, count, digest)
        return header + digest + metadata


def _table(runs: list[Run]) -> tuple[int, bytes]:
    """How many pages the runs have, and what the metadata of their frame begins with."""
    pages = sum(stop - start for start, stop in runs)
    return pages, b"".join([RUN.pack(start, stop - start) for start, stop in runs])


@dataclass
class StreamAccount:
    """What has gone through one connection and direction: the two sides compare theirs at END (R9)."""

    frames: int = 0
    pages: int = 0
    zero: int = 0
    free: int = 0
    digest: bytes = field(default=bytes(DIGEST_BYTES))

    def add(self, kind: FrameType, count: int, digest: bytes) -> None:
        """Count a page record; other frames (BARRIER, END, messages) do not count."""
        if kind not in PAGE_RECORDS:
            return
        self.frames += 1
        self.digest = frame_digest(self.digest + digest)
        match kind:
            case FrameType.PAGES:
                self.pages += count
            case FrameType.ZERO:
                self.zero += count
            case _:
                self.free += count

    def end(self, migration: str) -> messages.End:
        """The END message for what was counted so far."""
        return messages.End(
            migration=migration,
            frames=self.frames,
            pages=self.pages,
            zero=self.zero,
            free=self.free,
            digest=self.digest,
        )


class FrameDecoder:
    """Bytes of one connection and direction in, frames out. After a ProtocolError it must not be used."""

    def __init__(self) -> None:
        self.account = StreamAccount()
        self._sequence = 0
        self._header = bytearray(HEADER_BYTES)
        self._payload: bytearray | memoryview = bytearray()
        self._borrows = False
        self.starved = False
        """A payload is due, and no buffer is lent: ``lend`` one before ``next_buffer`` is asked for."""
        self._expect_header()

    def lend(self, buffer: memoryview | None) -> None:
        """Payloads go into this buffer, of MAX_PAYLOAD_BYTES, from now on and no longer into one of our own.

        None takes it back, and with it the payload of the last frame. Not while a payload is being read.
        """
        self._borrows = True
        self._payload = bytearray() if buffer is None else buffer
        if self.starved and buffer is not None:
            self._expect_payload()

    @property
    def at_boundary(self) -> bool:
        """True where the connection may end: no frame has begun."""
        return self._fields is None and self._filled == 0

    def next_buffer(self) -> memoryview:
        """Where the next bytes belong: never empty, and never more than the current frame needs."""
        return self._target[self._filled :]

    def advance(self, received: int) -> Frame | None:
        """``received`` bytes were stored in ``next_buffer()``: the frame they complete, if any."""
        self._filled += received
        if self._filled < len(self._target):
            return None
        if self._fields is None:
            self._check_header()
            return None if len(self._target) else self._complete()
        if self._stage_metadata and self._fields.payload_bytes:
            self._expect_payload()
            return None
        return self._complete()

    def _expect_header(self) -> None:
        self._fields: _Header | None = None
        self._target = memoryview(self._header)
        self._filled = 0

    def _check_header(self) -> None:
        fields = _Header.parse(self._header)
        if fields.sequence != self._sequence:
            raise ProtocolError(f"frame {fields.sequence} where {self._sequence} was due: lost or repeated")
        self._sequence += 1
        self._fields = fields
        self._metadata = bytearray(fields.metadata_bytes)
        self._target = memoryview(self._metadata)
        self._filled = 0
        self._stage_metadata = True

    def _expect_payload(self) -> None:
        assert self._fields is not None
        if len(self._payload) < self._fields.payload_bytes and not self._borrows:
            self._payload = bytearray(MAX_PAYLOAD_BYTES)
        self.starved = len(self._payload) < self._fields.payload_bytes
        self._target = memoryview(self._payload)[: self._fields.payload_bytes]
        self._filled = 0
        self._stage_metadata = False

    def _complete(self) -> Frame:
        fields = self._fields
        assert fields is not None
        metadata = bytes(self._metadata)
        digest = frame_digest(bytes(self._header[:DIGESTED_HEADER_BYTES]) + metadata)
        if digest != fields.digest:
            raise ProtocolError(f"frame {fields.sequence} ({fields.type.name}): the digest is wrong")
        self.account.add(fields.type, fields.count, digest)
        payload = memoryview(self._payload)[: fields.payload_bytes]
        self._expect_header()
        return Frame(fields.type, fields.codec, fields.count, fields.runs, digest, metadata, payload)


@dataclass(frozen=True)
class _Header:
    """A frame header whose every size is within its limit and fits its type (R16)."""

    type: FrameType
    codec: Codec
    sequence: int
    count: int
    runs: int
    metadata_bytes: int
    payload_bytes: int
    digest: bytes

    @classmethod
    def parse(cls, data: Buffer) -> _Header:
        magic, version, kind, codec, zero, sequence, count, runs, metadata, payload, digest = HEADER.unpack(
            data
        )
        if magic != MAGIC:
            raise ProtocolError("the peer does not speak the migd protocol (bad magic)")
        if version != FRAMING_VERSION:
            raise OtherFraming(
                f"the peer frames with version {version}, this side ({SOFTWARE}) with {FRAMING_VERSION}: "
                f"update migd on {'this side' if version > FRAMING_VERSION else 'the other side'}"
            )
        try:
            header = cls(FrameType(kind), Codec(codec), sequence, count, runs, metadata, payload, digest)
        except ValueError as error:
            raise ProtocolError(f"frame {sequence}: {error}") from error
        if zero or not header._sizes_fit():
            raise ProtocolError(
                f"frame {sequence} ({header.type.name}): count {count}, {runs} runs, {metadata} bytes of "
                f"metadata and {payload} of payload do not fit together"
            )
        return header

    def _sizes_fit(self) -> bool:
        if self.metadata_bytes > MAX_METADATA_BYTES or self.runs > MAX_RUNS_PER_FRAME:
            return False
        if self.type not in PAGE_RECORDS:
            return not (self.count or self.runs or self.payload_bytes or self.codec)
        if not self.runs or self.count < self.runs:
            return False
        if self.type is not FrameType.PAGES:
            return self.metadata_bytes == self.runs * RUN.size and not (self.payload_bytes or self.codec)
        if self.count > MAX_PAGES_PER_FRAME:
            return False
        if self.metadata_bytes != self.runs * RUN.size + self.count * DIGEST_BYTES:
            return False
        if self.codec is Codec.NONE:
            return self.payload_bytes == self.count * PAGE_BYTES
        return 0 < self.payload_bytes < self.count * PAGE_BYTES
