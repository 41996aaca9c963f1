"""The wire protocol: frames and messages of any connection, and page records placed into RAM."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from random import Random

import numpy as np

from migd.destination.loader import Loader
from migd.errors import ProtocolError, Refused, VerificationError
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.layout import RamLayout
from migd.wire import handshake, messages
from migd.wire.framing import Frame, FrameDecoder
from migd.wire.protocol import MAX_PAYLOAD_BYTES, PAGE_RECORDS, TOKEN_BYTES, FrameType
from tests.fuzz import frames, reading, tape
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome

RAM_PAGES = 512
_SHORT_BYTES = 8192


def streams() -> list[bytes]:
    """Every connection and direction that was recorded, the short ones first."""
    tapes = [tape.unpacked(packed) for packed in recorded("session")]
    sent = {connection.data for each in tapes for connection in each.connections}
    return sorted({*sent, *recorded("replies"), *recorded("probe")}, key=lambda data: (len(data), data))


def feed(decoder: FrameDecoder, data: bytes) -> Iterator[Frame]:
    """The frames of a stream, in pieces as large as the decoder asks for. Broken if it asks for too much."""
    left = memoryview(data)
    while left:
        view = decoder.next_buffer()
        if not 0 < len(view) <= MAX_PAYLOAD_BYTES:
            raise Broken(f"the decoder asks for {len(view)} bytes at once")
        size = min(len(view), len(left))
        view[:size] = left[:size]
        left = left[size:]
        frame = decoder.advance(size)
        if frame is not None:
            yield frame


class Specification:
    """The second reader, a frame at a time beside the decoder: both take the same ones, to the same byte."""

    def __init__(self, data: bytes) -> None:
        self._frames = reading.frames(data)

    def beside(self, frame: Frame) -> reading.Read:
        """The same frame by the specification. Broken if it is another, or none."""
        read = self._next()
        if read is None or (read.kind, read.metadata, read.payload, read.digest) != (
            frame.type, frame.metadata, frame.payload, frame.digest,
        ):  # fmt: skip
            raise Broken(f"a {frame.type.name} frame was taken that the specification does not allow")
        return read

    def refuses(self) -> None:
        """The decoder has refused what comes next."""
        try:
            next(self._frames, None)
        except reading.Unreadable:
            return
        raise Broken("the decoder refused what the specification allows")

    def ends(self) -> None:
        """The decoder has taken everything."""
        if self._next() is not None:
            raise Broken("the decoder swallowed a frame")

    def _next(self) -> reading.Read | None:
        try:
            return next(self._frames, None)
        except reading.Unreadable as error:
            raise Broken(f"the decoder took what the specification refuses: {error}") from error


class Frames:
    """Decoder, messages and handshake."""

    name = "frames"
    shared = 360

    def __init__(self, decoder: Callable[[], FrameDecoder] = FrameDecoder) -> None:
        self.seeds = [stream for stream in streams() if len(stream) < _SHORT_BYTES]
        self._decoder = decoder

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        decoder, specification, depth = self._decoder(), Specification(data), 0
        try:
            for frame in feed(decoder, data):
                specification.beside(frame)
                depth += 1
                if refusal := _refusal(frame):
                    return Outcome(refusal, depth)
        except ProtocolError as error:
            specification.refuses()
            self._stays_shut(decoder)
            return Outcome(type(error).__name__, depth)
        specification.ends()
        return Outcome(ACCEPTED if decoder.at_boundary else "PeerLost", depth)

    def _stays_shut(self, decoder: FrameDecoder) -> None:
        """A decoder that has refused something hands out nothing any more, whatever comes."""
        left = memoryview(self.seeds[0])
        while left:
            view = decoder.next_buffer()
            size = min(len(view), len(left))
            view[:size] = left[:size]
            left = left[size:]
            try:
                frame = decoder.advance(size)
            except ProtocolError:
                return
            if frame is not None:
                raise Broken(f"the decoder goes on with a {frame.type.name} frame after it refused one")

    def close(self) -> None:
        return


def _refusal(frame: Frame) -> str:
    """The error by which either daemon refuses what the frame says; empty if it takes it."""
    try:
        _understand(frame)
    except (ProtocolError, Refused) as error:
        return type(error).__name__
    return ""


def _understand(frame: Frame) -> None:
    """All that is done with a frame before its connection's state matters."""
    if frame.type in PAGE_RECORDS:
        frame.page_runs(RAM_PAGES)
    elif frame.type is FrameType.HELLO:
        _unchanged(handshake.accept(handshake.read_hello(frame), bytes(TOKEN_BYTES), max_streams=8))
    elif frame.type is not FrameType.STATE:
        message = frame.message()
        _unchanged(message)
        if isinstance(message, messages.Probe):
            _unchanged(handshake.about(message, realtime_ns=1, free_bytes=0, max_streams=8))


def _unchanged(message: messages.Message) -> None:
    if messages.unpack(*messages.pack(message)) != message:
        raise Broken(f"{type(message).__name__} does not survive being sent")


class Placing:
    """A data stream into real RAM of two blocks: what lies there afterwards is what its valid records say."""

    name = "placing"
    shared = 120

    def __init__(self, loader: Callable[[RamLayout, threading.Lock], Loader] = Loader) -> None:
        self.seeds = [
            stream for stream in streams()
            if any(piece.kind in PAGE_RECORDS for piece in frames.cut(stream))
        ]  # fmt: skip
        shapes = (BlockShape("low", 384), BlockShape("high", RAM_PAGES - 384))
        self._ram = RamLayout([RamBlock.create(shape) for shape in shapes])
        self._loader = loader(self._ram, threading.Lock())

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        image: dict[int, bytes] = {}
        try:
            outcome, damaged = self._place(data, image)
            self._compare(image, damaged)
            return outcome
        finally:
            self._ram.zero([(0, RAM_PAGES)])

    def _place(self, data: bytes, image: dict[int, bytes]) -> tuple[Outcome, set[int]]:
        """The outcome, and the pages that may hold anything: those of a record that arrived damaged."""
        decoder, specification, depth = FrameDecoder(), Specification(data), 0
        try:
            for frame in feed(decoder, data):
                read = specification.beside(frame)
                if frame.type in PAGE_RECORDS:
                    refusal, pages = self._one(frame, read)
                    if refusal:
                        return Outcome(refusal, depth), set(pages)
                    image |= pages
                    depth += 1
        except ProtocolError as error:
            return Outcome(type(error).__name__, depth), set()
        return Outcome(ACCEPTED if decoder.at_boundary else "PeerLost", depth), set()

    def _one(self, frame: Frame, read: reading.Read) -> tuple[str, dict[int, bytes]]:
        """Why a record was refused, if it was, and its pages; of a damaged one without content."""
        wanted: dict[int, bytes] | None = None
        try:
            wanted = reading.pages_of(read, RAM_PAGES)
        except reading.Unreadable as error:
            reason = str(error)
        try:
            self._loader.place(frame)
        except (ProtocolError, VerificationError) as error:
            if wanted is not None:
                raise Broken(f"a valid record was refused: {error}") from error
            damaged = isinstance(error, VerificationError)
            runs = frame.page_runs(RAM_PAGES) if damaged else []
            return type(error).__name__, {page: b"" for run in runs for page in range(*run)}
        if wanted is None:
            raise Broken(f"a record was placed that is wrong: {reason}")
        return "", wanted

    def _compare(self, image: dict[int, bytes], damaged: set[int]) -> None:
        touched = {page for run in self._ram.touched().runs() for page in range(*run)}
        if stray := touched - image.keys() - damaged:
            raise Broken(f"pages {sorted(stray)[:8]} were written, and no record says so")
        row = np.empty((1, PAGE_BYTES), np.uint8)
        for page in touched - damaged:
            if bytes(self._ram.read(np.array([page]), row)) != (image[page] or bytes(PAGE_BYTES)):
                raise Broken(f"page {page} is not what its last record says")
        for page in image.keys() - touched - damaged:
            if image[page].strip(b"\0"):
                raise Broken(f"page {page} was never written")

    def close(self) -> None:
        self._ram.close()
