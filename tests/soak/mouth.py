"""HintMouth: a soaked guest's end of its hint socket: what it was asked, and what it says when.

It never waits for the daemon, and says what is due as fast as the socket takes it.
"""

from __future__ import annotations

import math
import random
import socket

from migd.guest import hints
from tests.soak.hinting import Saying

_RECEIVE_BYTES = 1 << 16


class HintMouth:
    """Owns ``sock`` until ``close``."""

    def __init__(self, sock: socket.socket, hello: hints.Hello, rng: random.Random) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.random = rng
        self._hello = hints.encode(hello)
        self._decoder = hints.HintDecoder()
        self._output = bytearray()
        self._planned: list[tuple[float, bytes]] = []
        """(when on the monotonic clock, what), in order."""
        self.open = True

    def requests(self, now: float) -> list[int]:
        """Epochs of the requests that have come; closes itself when the daemon has."""
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.close()
        epochs = []
        for frame in self._decoder.feed(data):
            if isinstance(frame, hints.Greet):
                self._planned.insert(0, (now, self._hello))
            elif isinstance(frame, hints.Request):
                epochs.append(frame.epoch)
        return epochs

    def plan(self, said: list[Saying], now: float) -> None:
        """Say this as well; nobody is spared what was planned for an earlier request."""
        self._planned += [(now + saying.delay_s, saying.data) for saying in said]
        self._planned.sort(key=lambda entry: entry[0])

    def wait_s(self, now: float) -> float:
        """Until something is due that is not yet on its way."""
        return max(0.0, self._planned[0][0] - now) if self._planned else math.inf

    def wants_to_say(self, now: float) -> bool:
        return bool(self._output) or self.wait_s(now) == 0.0

    def say(self, now: float) -> None:
        """What is due, as far as the socket takes it; closes itself when it was planned or cannot go on."""
        while self._planned and self._planned[0][0] <= now:
            _, data = self._planned.pop(0)
            if not data:
                self.close()
                return
            self._output += data
        try:
            sent = self.sock.send(self._output) if self._output else 0
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        del self._output[:sent]

    def close(self) -> None:
        if self.open:
            self.open = False
            self.sock.close()
