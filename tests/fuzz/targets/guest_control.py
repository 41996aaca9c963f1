"""The control protocol with a guest: one packet, with descriptors of any kind, at either end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from random import Random
from typing import Any

from migd.errors import GuestError
from migd.guest import control
from tests.fuzz import texts
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome, survives

Receive = Callable[[socket.socket], tuple[Any, list[int]] | None]
_MOST_FDS = 64
"""In one packet; the protocol knows 16."""


class Packets:
    """An input is a number of descriptors, and a packet. None of them may be left open by either end."""

    shared = 80

    def __init__(self, name: str, receive: Receive) -> None:
        self.name = name
        self.seeds = recorded(name)
        self._receive = receive
        self._kinds = [
            control.blob_fd(b"state"),
            control.blob_fd(b"free pages"),
            os.open("/", os.O_RDONLY | os.O_DIRECTORY),
            *os.pipe(),
            os.open("/dev/null", os.O_WRONLY),
            os.open("/proc/self/status", os.O_PATH),
        ]

    def mutate(self, data: bytes, chance: Random) -> bytes:
        fds = data[:1] or b"\0"
        if chance.random() < 0.3:
            fds = bytes([chance.choice((0, 1, 2, 3, 15, 16, 17, 40))])
        return fds + texts.json_mutated(data[1:], chance.choice(self.seeds)[1:], chance)

    def run(self, data: bytes) -> Outcome:
        before = _open_descriptors()
        sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sender, receiver:
            try:
                socket.send_fds(sender, [data[1:]], self._some(data[0] if data else 0))
            except OSError:  # larger than a packet can be
                return Outcome("not sent", 0)
            outcome = self._take(receiver)
        if (left := _open_descriptors() - before) > 0:
            raise Broken(f"{left} descriptors were left open")
        return outcome

    def _some(self, count: int) -> list[int]:
        return [self._kinds[at % len(self._kinds)] for at in range(min(count, _MOST_FDS))]

    def _take(self, receiver: socket.socket) -> Outcome:
        try:
            packet = self._receive(receiver)
        except GuestError as error:
            return Outcome(type(error).__name__, 0)
        if packet is None:
            return Outcome("end", 0)
        message, fds = packet
        try:
            if len(fds) > control.MAX_PACKET_FDS:
                raise Broken(f"{len(fds)} descriptors were taken")
            survives(message)
            return Outcome(_blobs(fds), 1)
        finally:
            control.close_all(fds)

    def close(self) -> None:
        control.close_all(self._kinds)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _blobs(fds: list[int]) -> str:
    """What becomes of descriptors that are read as device state (``HostedGuest.pause``)."""
    try:
        for fd in fds:
            control.blob_bytes(fd)
    except GuestError:
        return GuestError.__name__
    except OSError:  # a directory, say
        return OSError.__name__
    return ACCEPTED


class FromGuest(Packets):
    """What a daemon takes from a guest."""

    def __init__(self, receive: Receive = control.receive_from_guest) -> None:
        super().__init__("from-guest", receive)


class ToGuest(Packets):
    """What a guest takes from its daemon."""

    def __init__(self, receive: Receive = control.receive_from_daemon) -> None:
        super().__init__("to-guest", receive)
