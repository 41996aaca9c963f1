"""HintAnswers: the stub guest's end of the hint socket. It never blocks the guest and never fails it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from migd.guest import hints
from migd.guest.allocator import count_runs, runs_in
from migd.guest.machine import PAGE_BYTES, Machine

FRAME_PAGES = 1 << 20
"""Of a bitmap frame: 4 GiB of RAM, 128 KiB before compression, about a millisecond of it."""

SEND_S = 0.002
"""A daemon that reads as fast as a guest of terabytes can answer does not hold its workload up."""

_RANGE_BYTES = 16
_RECEIVE_BYTES = 1 << 16
_SEND_BYTES = 1 << 16


class HintAnswers:
    """Answers GREET and REQUEST on ``sock``, which it owns.

    Output waiting for the socket is bounded by one frame and a HELLO: an answer is encoded frame by frame
    as it drains, and a new REQUEST ends the answer before it.
    """

    def __init__(self, sock: socket.socket, machine: Machine) -> None:
        sock.setblocking(False)
        self.socket = sock
        self._machine = machine
        self._decoder = hints.HintDecoder()
        self._output = memoryview(b"")
        self._hello_due = False
        self._answer: Iterator[bytes] = iter(())
        self.wants_to_send = False
        """Something waits for the socket to take it."""

    def receive(self) -> None:
        """Take in what has arrived. OSError once the socket is of no more use."""
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the daemon closed the hint socket")
        for frame in self._decoder.feed(data):
            self._react(frame)

    def send(self) -> None:
        """Hand on what the socket takes in a slice of time. OSError once it is of no more use."""
        until = time.monotonic() + SEND_S
        while self._next_output():
            if time.monotonic() > until:
                return
            try:
                sent = self.socket.send(self._output[:_SEND_BYTES])
            except BlockingIOError:
                return
            self._output = self._output[sent:]
        self.wants_to_send = False

    def close(self) -> None:
        self.socket.close()

    def _react(self, frame: hints.HintFrame) -> None:
        match frame:
            case hints.Greet():
                self._hello_due = self.wants_to_send = True
            case hints.Request(epoch):
                # The free list as it is now, after the request was read (R5).
                allocator = self._machine.allocator
                self._answer = answer(epoch, allocator.free_bits(), allocator.pages)
                self.wants_to_send = True
            case hints.Done():
                self._answer = iter(())  # what is left of a frame still goes: half a frame is garbage
            case _:
                pass  # a daemon has no business to send it; hints never are worth an error

    def _next_output(self) -> bool:
        """Make sure there is output, if any is due: a frame begun is finished first."""
        if not self._output and self._hello_due:
            self._hello_due = False
            self._output = memoryview(self._hello())
        if not self._output:
            self._output = memoryview(next(self._answer, b""))
        return bool(self._output)

    def _hello(self) -> bytes:
        machine = self._machine
        return hints.encode(hints.Hello(machine.contract, hints.Strength.STRONG, PAGE_BYTES, machine.pages))


def answer(epoch: int, free_bits: bytes, pages: int) -> Iterator[bytes]:
    """The frames that tell which pages are free, each part as BITMAP or RANGES, whichever is smaller.

    ``free_bits``: one bit per page, least significant first, of a guest whose RAM begins at gpa 0.
    """
    free_pages = 0
    for first in range(0, pages, FRAME_PAGES):
        part = free_bits[first // 8 : (first + FRAME_PAGES) // 8]
        free = int.from_bytes(part, "little").bit_count()
        if free:
            yield from _part(epoch, first, min(FRAME_PAGES, pages - first), part)
        free_pages += free
    yield hints.encode(hints.End(epoch, free_pages))


def _part(epoch: int, first_page: int, pages: int, bits: bytes) -> Iterator[bytes]:
    bitmap = hints.encode(hints.Bitmap(epoch, first_page * PAGE_BYTES, pages, bits))
    if len(bitmap) <= count_runs(bits) * _RANGE_BYTES:
        yield bitmap
        return
    yield from hints.encode_ranges(
        epoch,
        (((first_page + start) * PAGE_BYTES, (stop - start) * PAGE_BYTES) for start, stop in runs_in(bits)),
    )
