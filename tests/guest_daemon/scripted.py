"""A guest that does what a test says, over the real SEQPACKET socket, and a registry for it to attach to."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migd.guest import control
from migd.guest.control import Attach, Block, GuestState, ToGuest
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.limits import Limits
from migd.ram.block import BlockShape, RamBlock
from migd.ram.provider import provider

PAGES = 256
MIGRATION = "0123456789abcdef" * 2


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something is so; the test's own time-out is the limit."""
    while not condition():  # noqa: ASYNC110  # of other processes' doing, which set no event
        await asyncio.sleep(0.005)


def attach(**fields: Any) -> Attach:
    said = {"version": control.VERSION, "name": "vm1", "pid": os.getpid(), "state": GuestState.RUNNING,
            "blocks": (Block("ram", PAGES),), **fields}  # fmt: skip
    return Attach(**said)


def ram_fd(pages: int = PAGES) -> int:
    """Sealed RAM as a guest hands it back; the caller closes it."""
    return RamBlock.create(BlockShape("ram", pages)).fd


@dataclass
class ScriptedGuest:
    """The guest's end of the control socket: blocking calls, in a thread where they wait."""

    sock: socket.socket
    fds: list[int] = field(default_factory=list)
    """Descriptors that came with the last packet; all are kept until ``close``."""
    _kept: list[int] = field(default_factory=list)

    def say(self, message: control.Message, fds: Sequence[int] = ()) -> None:
        control.send(self.sock, message, list(fds))

    async def hear(self) -> ToGuest | None:
        """The next packet; None at the end."""
        try:
            packet = await asyncio.to_thread(control.receive_from_daemon, self.sock)
        except ConnectionResetError:
            return None
        if packet is None:
            return None
        message, self.fds = packet
        self._kept += self.fds
        return message

    async def answer(self, message: control.Message, fds: Sequence[int] = ()) -> ToGuest | None:
        """Hear a request and answer it with its id."""
        request = await self.hear()
        if request is not None:
            self.say(control.msgspec.structs.replace(message, id=request.id), fds)
        return request

    def close(self) -> None:
        control.close_all(self._kept)
        self._kept = []
        self.sock.close()


class Visits:
    """See ``migd.guest.registry.GuestObserver``: who came and went."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def attached(self, guest: HostedGuest) -> None:
        self.seen.append(("attached", guest.name))

    def detached(self, guest: HostedGuest) -> None:
        self.seen.append(("detached", guest.name))


@dataclass
class House:
    """A running registry and what it reported."""

    registry: GuestRegistry
    path: Path
    returned: list[HostedGuest]
    visits: Visits
    _dialled: list[ScriptedGuest] = field(default_factory=list)

    def dial(self) -> ScriptedGuest:
        sock = control.new_socket()
        sock.settimeout(10)
        sock.connect(str(self.path))
        guest = ScriptedGuest(sock)
        self._dialled.append(guest)
        return guest

    async def attached(
        self, message: Attach | None = None, fds: Sequence[int] = ()
    ) -> tuple[HostedGuest, ScriptedGuest]:
        """A guest that has attached, from both sides; its hint socket is in ``fds``."""
        message = message or attach()
        guest = self.dial()
        guest.say(message, fds)
        answer = await guest.hear()
        assert isinstance(answer, control.Attached), answer
        await until(lambda: message.name in self.registry.guests)
        return self.registry.get(message.name), guest

    def close(self) -> None:
        for guest in self._dialled:
            guest.close()


@asynccontextmanager
async def house(
    directory: Path,
    command: Sequence[str] = ("sleep", "60"),
    returned: Callable[[HostedGuest], Awaitable[None]] | None = None,
    ram: str = "memfd",
    **limits: float,
) -> AsyncIterator[House]:
    """A registry that runs while the context is entered."""
    back: list[HostedGuest] = []

    async def note(guest: HostedGuest) -> None:
        back.append(guest)

    path = directory / "guest.sock"
    visits = Visits()
    registry = GuestRegistry(
        path, directory, command, Limits(**limits), returned or note, visits, ram=provider(ram)
    )
    running = asyncio.create_task(registry.run())
    await asyncio.sleep(0)
    home = House(registry, path, back, visits)
    try:
        yield home
        assert not running.done(), "the registry ended by itself"
    finally:
        for guest in registry.guests.values():
            if guest.process is not None:
                guest.process.kill()
                guest.process.wait()
        running.cancel()
        await asyncio.wait({running})
        home.close()
        if not running.cancelled():
            running.result()
