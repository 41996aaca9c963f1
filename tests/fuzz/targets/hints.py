"""The hint protocol: the decoder alone, the daemon's receiver, and the guest that answers."""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import Callable
from random import Random

from migd.guest import hints
from migd.guest.hint_answers import HintAnswers
from migd.guest.hint_receiver import SocketHints
from migd.guest.hints import Bitmap, HintDecoder, HintFrame, Ranges
from migd.guest.machine import Machine
from migd.limits import Limits
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from tests.fuzz import hint_frames
from tests.fuzz.clockless import ClocklessLoop
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome, flipped_bits

PAGES = 256
"""Of the guest that was recorded."""
_SILENCE = "nothing taken"
_MOST_TURNS = 10_000
_SOCKET_BYTES = 64 << 10


def _talks(directory: str) -> list[bytes]:
    return [talk for stream in recorded(directory) for talk in hint_frames.talks(stream)]


class HintFrames:
    """The decoder: garbage is skipped, a damaged frame is never handed out."""

    name = "hint-frames"
    shared = 220

    def __init__(self, decoder: Callable[[], HintDecoder] = HintDecoder) -> None:
        self.seeds = [*_talks("hint-answers"), *_talks("hint-requests")]
        self._decoder = decoder
        self._said = {seed: HintDecoder().feed(seed) for seed in self.seeds}

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return hint_frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        decoder, found = self._decoder(), list[HintFrame]()
        pieces = 1 + len(data) % 3
        size = -(-len(data) // pieces) or 1
        for at in range(0, len(data), size):
            found += decoder.feed(data[at : at + size])
        if decoder.garbage_bytes > len(data):
            raise Broken(f"{decoder.garbage_bytes} bytes of garbage in {len(data)}")
        for frame in found:
            if self._decoder().feed(hints.encode(frame)) != [frame]:
                raise Broken(f"{type(frame).__name__} does not survive being sent")
        for seed, said in self._said.items():
            if flipped_bits(data, seed) and not all(frame in said for frame in found):
                raise Broken("a flipped bit makes another frame")
        if decoder.garbage_bytes or decoder.rejected_frames:
            return Outcome("garbage", len(found))
        return Outcome(ACCEPTED if found else _SILENCE, len(found))

    def close(self) -> None:
        return


class HintReceiver:
    """What reaches the ledger lies inside of what the guest said of the epoch asked for, and comes once."""

    name = "hint-receiver"
    shared = 60

    def __init__(self, receiver: type[SocketHints] = SocketHints) -> None:
        self.seeds = _talks("hint-answers")
        self._receiver = receiver
        self._loop = ClocklessLoop()

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return hint_frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        return self._loop.run(self._receive(data[:_SOCKET_BYTES]))

    async def _receive(self, data: bytes) -> Outcome:
        ours, theirs = socket.socketpair()
        epoch = _epoch(data)
        delivered: list[PageBitmap] = []
        with theirs:
            receiver = self._receiver(ours, PAGES, Limits())
            try:
                await receiver.request(
                    epoch, lambda named, free: delivered.append(free) if named == epoch else None
                )
                theirs.sendall(data)
                theirs.shutdown(socket.SHUT_WR)
                for _ in range(_MOST_TURNS):
                    if ours.fileno() < 0:
                        break
                    await asyncio.sleep(0)
                else:
                    raise Broken("the receiver never comes to the end of what was sent")
                contract = await receiver.declare(0.01)
                await receiver.done()
            finally:
                receiver.close()
        self._judge(data, epoch, delivered)
        if receiver.distrusted:
            return Outcome("distrusted", len(delivered))
        if receiver.rejected:
            return Outcome("rejected records", len(delivered))
        return Outcome(ACCEPTED if contract is not FreeContract.NONE else "no contract", len(delivered))

    def _judge(self, data: bytes, epoch: int, delivered: list[PageBitmap]) -> None:
        allowed: set[int] = set()
        for frame in HintDecoder().feed(data):
            allowed |= _pages_inside(frame, epoch)
        seen: set[int] = set()
        for free in delivered:
            pages = set(free.indices().tolist())
            if pages & seen:
                raise Broken("a page was delivered twice in one answer")
            if stray := pages - allowed:
                raise Broken(f"pages {sorted(stray)[:8]} were delivered, and the guest did not say so")
            seen |= pages

    def close(self) -> None:
        self._loop.close()


def _epoch(data: bytes) -> int:
    """The one to ask for: that of the first answer in the bytes."""
    for piece in hint_frames.cut(data):
        if piece.epoch:
            return piece.epoch
    return 1


def _pages_inside(frame: HintFrame, epoch: int) -> set[int]:
    """Every page all of whose bytes a frame calls free."""
    match frame:
        case Ranges(named, ranges) if named == epoch:
            return {
                page
                for start, length in ranges
                for page in range(start // PAGE_BYTES, min(PAGES, (start + length) // PAGE_BYTES))
                if start <= page * PAGE_BYTES and (page + 1) * PAGE_BYTES <= start + length
            }
        case Bitmap(named, start, pages, bits) if named == epoch and start % PAGE_BYTES == 0:
            first = start // PAGE_BYTES
            return {
                first + at for at in range(min(pages, max(0, PAGES - first))) if bits[at // 8] >> at % 8 & 1
            }
        case _:
            return set()


class HintGuest:
    """The guest's end: whatever is asked, it says whole frames, and calls no page free that is in use."""

    name = "hint-guest"
    shared = 60

    def __init__(self) -> None:
        self.seeds = _talks("hint-requests")
        self._ram = mmap.mmap(-1, PAGES * PAGE_BYTES)
        self._machine = Machine(self._ram, FreeContract.ANYTHING)
        for start in range(0, PAGES, 16):
            self._machine.allocator.claim(start, start + 3)
        free = int.from_bytes(self._machine.allocator.free_bits(), "little")
        self._used = {page for page in range(PAGES) if not free >> page & 1}

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return hint_frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        ours, theirs = socket.socketpair()
        said = bytearray()
        with theirs:
            answers = HintAnswers(ours, self._machine)
            try:
                for at in range(0, min(len(data), _SOCKET_BYTES), 512):
                    theirs.sendall(data[at : min(at + 512, _SOCKET_BYTES)])
                    answers.receive()
                    answers.send()
                    said += _waiting(theirs)
            finally:
                answers.close()
        decoder = HintDecoder()
        found = decoder.feed(said)
        if decoder.garbage_bytes or decoder.rejected_frames:
            raise Broken("the guest says garbage")
        for frame in found:
            epoch = frame.epoch if isinstance(frame, Ranges | Bitmap) else 0
            if _pages_inside(frame, epoch) & self._used:
                raise Broken("the guest calls a page free that is in use")
        return Outcome(ACCEPTED if found else _SILENCE, len(found))

    def close(self) -> None:
        return


def _waiting(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""
