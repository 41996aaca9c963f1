"""Registry: the guests of one simulated daemon, in the image of ``migd.guest.registry.GuestRegistry``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from migd.errors import GuestError, LiveUnsupported, MigdError, Refused, ResourceError
from migd.guest import control
from migd.guest.control import Attach, GuestState
from migd.guest.hint_receiver import SocketHints
from migd.guest.hosted import HostedGuest
from migd.guest.link import GuestLink, RequestRefused
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.migration.ports import DirtyLog
from migd.ram.bitmap import PageBitmap
from migd.ram.block import BlockShape, RamBlock
from migd.ram.layout import RamLayout
from tests.simulation.guest import GuestProcess
from tests.simulation.life import Life
from tests.simulation.memory import Memory
from tests.simulation.sockets import MemorySocket


class ExactLog:
    """See ``migd.migration.ports.DirtyLog``: every store since the last harvest, and nothing else."""

    name = "userfaultfd"
    sees_writes = True
    cost_s = 0.0

    def __init__(self, life: Life, memory: Memory) -> None:
        self._life = life
        self._memory = memory

    async def harvest(self) -> PageBitmap:
        self._life.check()
        if self._memory.log is None:
            raise GuestError("the dirty log is gone: the guest died or disarmed")
        return self.get_and_clear(self._memory)

    def get_and_clear(self, memory: Memory) -> PageBitmap:
        """In one step (R3)."""
        found, memory.log = memory.log, set()
        return PageBitmap.of(memory.pages, sorted(found or ()))

    def close(self) -> None:
        pass


@dataclass(eq=False)
class Hosted(HostedGuest):
    """The real one but for its dirty log, which is the simulated guest's own."""

    life: Life | None = None
    machine: GuestProcess | None = None
    new_log: Callable[[Life, Memory], DirtyLog] = ExactLog

    async def arm(self) -> DirtyLog:
        try:
            await self.link.order(control.Arm(), control.Armed, self.limits.guest_s)
        except RequestRefused as error:
            raise LiveUnsupported(str(error)) from error
        assert self.machine is not None
        assert self.life is not None
        if self.machine.memory is None:
            raise GuestError("the guest died")
        return self.new_log(self.life, self.machine.memory)


class _Process:
    """What the daemon has of a process that it spawned; see ``subprocess.Popen``."""

    def __init__(self, life: Life, process: GuestProcess) -> None:
        self._life = life
        self._process = process

    def kill(self) -> None:
        self._life.check()
        self._process.kill()


class Registry:
    """Knows the guests by name, admits those that attach, and has incoming ones spawned."""

    def __init__(
        self,
        life: Life,
        limits: Limits,
        dice: random.Random,
        spawn: Callable[[str, str], GuestProcess],
        returned: Callable[[HostedGuest], Awaitable[None]],
        said: Callable[[str], None],
    ) -> None:
        self._life = life
        self._limits = limits
        self._dice = dice
        self._spawn = spawn
        self._returned = returned
        self._said = said
        self._callers: asyncio.Queue[tuple[MemorySocket, GuestProcess]] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup | None = None
        self.full = False
        """There is no memory for another guest."""
        self.new_log: Callable[[Life, Memory], DirtyLog] = ExactLog
        self.guests: dict[str, HostedGuest] = {}

    def get(self, name: str) -> HostedGuest:
        guest = self._present(name)
        if guest is None:
            raise MigdError(f"no guest {name!r} is attached here")
        return guest

    def free_bytes(self) -> int:
        return 0 if self.full else 1 << 40

    def knock(self, process: GuestProcess) -> MemorySocket:
        """A guest process connects: its end of the connection."""
        ours, theirs = MemorySocket.pair(self._dice, packets=True)
        self._life.hold(ours.close)
        self._callers.put_nowait((ours, process))
        return theirs

    async def run(self) -> None:
        """Accept guests until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    sock, process = await self._callers.get()
                    self._tasks.create_task(self._serve(sock, process))
        finally:
            for guest in list(self.guests.values()):
                guest.disconnect()

    async def _serve(self, sock: MemorySocket, process: GuestProcess) -> None:
        try:
            attach, fds = await self._first_packet(sock)
        except (GuestError, OSError, TimeoutError):
            sock.close()
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        try:
            guest, ours = self._admit(attach, fds)
        except MigdError as error:
            self._said(f"guest {attach.name} refused: {error}")
            control.close_all(fds)
            with suppress(OSError):  # it may be gone already
                control.send(sock, control.Declined(reason=str(error)))  # type: ignore[arg-type]
            sock.close()
            return
        await self._keep(guest, attach, sock, process, new_ram=ours)

    async def _first_packet(self, sock: MemorySocket) -> tuple[Attach, list[int]]:
        readable = asyncio.Event()
        sock.watch(readable.set)
        try:
            async with asyncio.timeout(self._limits.hello_s):
                await readable.wait()
        finally:
            sock.watch(None)
        packet = control.receive_from_guest(sock)  # type: ignore[arg-type]
        if packet is None or not isinstance(packet[0], Attach):
            raise GuestError("a guest must begin with ATTACH")
        return packet[0], packet[1]

    def _admit(self, attach: Attach, fds: list[int]) -> tuple[HostedGuest, bool]:
        """The guest, and whether its RAM is new to it."""
        self._life.check()
        known = self._present(attach.name)
        if known is not None:
            expected = known.state is GuestState.INCOMING and known.migration == attach.migration
            if not expected or known.has_attached or fds:
                raise Refused(f"a guest named {attach.name!r} is attached already")
            return known, True
        if not fds:
            raise Refused(f"guest {attach.name!r} is {attach.state} and brings no RAM")
        shapes = [BlockShape(block.name, block.pages) for block in attach.blocks]
        ram = RamLayout([RamBlock.adopt(shape, fd) for shape, fd in zip(shapes, fds, strict=True)])
        return self._add(attach.name, ram, attach.state, attach.migration), False

    def _present(self, name: str) -> HostedGuest | None:
        guest = self.guests.get(name)
        return None if guest is None or guest.gone or guest.released else guest

    def _add(self, name: str, ram: RamLayout, state: GuestState, migration: str) -> Hosted:
        self._life.hold(ram.close)
        ledger = Ledger(ram.pages, PageBitmap, first_epoch=(self._dice.getrandbits(32) << 32) + 1)
        guest = Hosted(
            name, ram, ledger, self._limits, state, migration, life=self._life, new_log=self.new_log
        )
        self.guests[name] = guest
        return guest

    async def _keep(
        self, guest: HostedGuest, attach: Attach, sock: MemorySocket, process: GuestProcess, *, new_ram: bool
    ) -> None:
        """Answer ATTACH, and watch over the connection until the guest closes it."""
        assert isinstance(guest, Hosted)
        guest.machine = process
        hints, theirs = MemorySocket.pair(self._dice, packets=False)
        self._life.hold(hints.close)
        sock.attach(theirs)
        blocks = tuple(control.Block(block.name, block.pages) for block in guest.ram.blocks)
        fds = [block.fd for block in guest.ram.blocks] if new_ram else []
        try:
            control.send(sock, control.Attached(blocks=blocks), fds)  # type: ignore[arg-type]
        except OSError:
            for end in (hints, sock):
                end.close()
            self._remove(guest)
            return
        ends: list[Any] = [sock, hints]
        link = GuestLink(ends[0], guest.name)
        guest.connect(link, SocketHints(ends[1], guest.ram.pages, self._limits))
        self._said(f"guest {guest.name} attached, {guest.state}")
        try:
            if not new_ram:
                await self._returned(guest)
            await link.gone.wait()
        finally:
            self._remove(guest)

    def _remove(self, guest: HostedGuest) -> None:
        if self.guests.get(guest.name) is guest:
            del self.guests[guest.name]
        guest.disconnect()

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> HostedGuest:
        """See ``migd.migration.ports.GuestHost``."""
        self._life.check()
        if self._present(name) is not None:
            raise Refused(f"a guest named {name!r} is here already")
        if self.full:
            raise ResourceError("no memory for another guest")
        ram = RamLayout([RamBlock.create(shape) for shape in shapes])
        guest = self._add(name, ram, GuestState.INCOMING, migration)
        guest.pin(migration)
        process = self._spawn(name, migration)
        guest.machine = process
        guest.process = _Process(self._life, process)  # type: ignore[assignment]  # of Popen, what is used
        assert self._tasks is not None
        self._tasks.create_task(self._watch(guest, process))
        return guest

    async def _watch(self, guest: HostedGuest, process: GuestProcess) -> None:
        """A spawned process is missed even if it never attached."""
        await process.ended.wait()
        self._remove(guest)
