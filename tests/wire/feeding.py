"""A decoder fed the way a socket feeds it: some bytes at a time into the buffer it hands out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, repeat

from migd.wire.framing import Frame, FrameDecoder


@dataclass
class Feed:
    """What a decoder made of some bytes; ``largest_buffer`` is the most it ever asked for at once."""

    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    frames: list[Frame] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    largest_buffer: int = 0

    def feed(self, data: bytes, sizes: Iterable[int] = ()) -> Feed:
        """Pieces of the given sizes, then whatever the decoder asks for. ProtocolError as it comes."""
        left = memoryview(data)
        pieces = chain(sizes, repeat(1 << 30))
        while left:
            view = self.decoder.next_buffer()
            assert len(view)
            self.largest_buffer = max(self.largest_buffer, len(view))
            taken = min(len(view), max(1, next(pieces)), len(left))
            view[:taken] = left[:taken]
            left = left[taken:]
            frame = self.decoder.advance(taken)
            if frame is not None:
                self.frames.append(frame)
                self.payloads.append(bytes(frame.payload))  # valid until the next buffer only
        return self
