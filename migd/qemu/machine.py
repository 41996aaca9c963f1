"""QemuMachine: a stock QEMU as the guest that a migd daemon moves: arm, pause, save, load, start.

::

    (found running) RUNNING <-- resume --- PAUSED --- quit
                      |  ^---- pause ------->^
    INCOMING -- load, start     (-incoming defer: has never run here)

Whatever has to outlive this process is written into QEMU before it is done (``migd.qemu.memo``). Until
``start`` or ``resume`` nothing of the guest runs; each command to QEMU is bounded in time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from migd.errors import GuestError, MigdError, Refused
from migd.guest.control import Block, GuestState, Log, Running
from migd.qemu import device_state, inventory
from migd.qemu.device_state import Heading
from migd.qemu.inventory import Inventory
from migd.qemu.memo import Memo, MemoStore
from migd.qemu.monitor import Event, Monitor
from migd.qemu.process import QemuProcess, holder_of
from migd.qemu.ram_files import open_ram
from migd.qemu.ram_map import RamMap
from migd.qemu.settings import Settings
from migd.qemu.state_stream import StateStream, cancelled
from migd.qemu.tracking import Tracking
from migd.ram.page import PAGE_BYTES
from migd.ram.soft_dirty import SoftDirty

_EVENT_S = 0.05
_QUIT_S = 3.0


@dataclass(frozen=True)
class Armed:
    """How writes are found from now on; the descriptor, if there is one, is the caller's."""

    addresses: tuple[int, ...]
    log: Log
    pagemap_fd: int | None


class Immovable(Refused):
    """However writes are found, the guest cannot be moved as it is; the message says what to do."""


class QemuMachine:
    """One QEMU with its RAM; owns the monitor, the descriptors of RAM and of the process until ``close``."""

    def __init__(
        self,
        monitor: Monitor,
        found: Inventory,
        blocks: Sequence[Block],
        fds: Sequence[int],
        process: QemuProcess,
        memos: MemoStore,
    ) -> None:
        self.monitor = monitor
        self.blocks = tuple(blocks)
        self.fds = tuple(fds)
        self.process = process
        self.state = GuestState.RUNNING
        self.migration = ""
        self.map = self._mapped(found)
        self.hint_socket = found.hint_socket and os.path.join(f"/proc/{process.pid}/cwd", found.hint_socket)
        self.name = found.name
        self._found = found
        self._memos = memos
        self._settings: Settings | None = None
        """QEMU's own, while migd's are in force."""
        self._tracking = Tracking(process, self.fds)
        self._marks: SoftDirty | None = None
        self._stream: StateStream | None = None
        self._saving: asyncio.Future[bytes] | None = None
        """While the guest is paused: QEMU saves the state of a stopped guest once."""
        self._stopped_at_ns = 0
        self._resumed_at_ns = 0
        self._loaded = False
        self.armed = False
        """Writes are being found: this guest is about to leave."""

    @classmethod
    async def adopt(
        cls, monitor: Monitor, *, blocks: Sequence[Block] = (), fds: Sequence[int] = ()
    ) -> QemuMachine:
        """Of a QEMU that answers on ``monitor``, ours if this succeeds. Refused if it cannot be moved.

        Its RAM is looked for, unless it was started with RAM of ours: ``blocks`` in ``fds``, ours then, too.
        """
        found = await inventory.examine(monitor)
        if obstacles := found.obstacles():
            raise Immovable("; ".join(obstacles))
        opened: list[int] = []
        process: QemuProcess | None = None
        try:
            if not fds:
                for backend in found.backends:
                    opened.append(open_ram(backend, monitor.listener_pid))  # noqa: PERF401
                    # those so far are closed below
                blocks = [Block(each.id, each.bytes // PAGE_BYTES) for each in found.backends]
            process = QemuProcess(_pid_of(monitor, [*fds, *opened][0]))
            memos = MemoStore(monitor, found.memos)
            machine = cls(monitor, found, blocks, [*fds, *opened], process, memos)
            machine._tracking.mappings()
            await machine._remember(await memos.read())
        except BaseException:
            for fd in opened:
                os.close(fd)
            if process is not None:
                process.close()
            raise
        return machine

    async def _remember(self, memo: Memo | None) -> None:
        """What QEMU was in the middle of when nobody stood beside it any more."""
        run_state = self._found.run_state
        self._settings = memo.settings if memo is not None else None
        if run_state == "inmigrate":
            self.state, self.migration = GuestState.INCOMING, memo.migration if memo else ""
        elif run_state != "running" and memo is not None and memo.migration:
            self.state, self.migration = memo.state, memo.migration
            self._loaded = memo.state is GuestState.INCOMING
        elif memo is not None:
            if memo.holds_still and run_state == "paused":  # killed while it read the marks
                await self.monitor.ask("cont")
            await self._settle()

    def close(self) -> None:
        """Let go of the descriptors; QEMU goes on as it is."""
        self._drop_stream()
        self._drop_marks()
        for fd in self.fds:
            os.close(fd)
        self.fds = ()
        self.process.close()

    def _mapped(self, found: Inventory) -> RamMap:
        """GuestError if these blocks are not what QEMU uses as RAM."""
        sizes = {backend.id: backend.bytes for backend in found.backends}
        wanted = {block.name: block.pages * PAGE_BYTES for block in self.blocks}
        if sizes != wanted:
            raise GuestError(f"QEMU has RAM {_told(sizes)}, and the guest {_told(wanted)}")
        offset, places = 0, {}
        for name, size in wanted.items():
            places[name] = (offset, size)
            offset += size
        return RamMap.parse(found.mtree, places)

    # -- tracking -----------------------------------------------------------------------------------

    def tracking(self) -> str:
        """How writes would be found now, for people."""
        return self._tracking.described(self._found)

    async def arm(self, friends: Collection[int]) -> Armed:
        """Writes are found from now on (R1). LiveUnsupported if they cannot be, Immovable if nothing helps.

        ``friends``: processes that map RAM and are trusted not to write to it, such as the daemon.
        """
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: there is nothing to track")
        self._found = await inventory.examine(self.monitor)
        if obstacles := self._found.obstacles():
            raise Immovable("; ".join(obstacles))
        self._require_running(self._found.run_state)
        self.map = self._mapped(self._found)
        mappings = self._tracking.mappings()
        self._tracking.refuse_other_writers(friends)
        log = self._tracking.log(self._found)
        addresses = tuple(mapping.address for mapping in mappings)
        self.armed = True
        if log is Log.USERFAULTFD:
            return Armed(addresses, log, self.process.open_pagemap())
        await self.prepare(holds_still=True)
        self._drop_marks()
        self._marks = self._tracking.marks()
        await self.harvest()
        return Armed(addresses, log, None)

    async def harvest(self) -> bytes:
        """Pages written since the last time, one bit each.

        The guest holds still for it, unless it is paused: reading the marks and clearing them are two steps
        (R3, W06).
        """
        marks = self._marks
        if marks is None:
            raise GuestError("the guest's marks are not watched: arm it first")
        runs = self.state is GuestState.RUNNING
        if not runs and (obstacle := self._tracking.obstacle()):  # for the last time
            raise GuestError(f"writes may have been missed: {obstacle}")
        try:
            if runs:
                await self.monitor.ask("stop")
            written = await asyncio.to_thread(marks.written)
            await asyncio.to_thread(marks.clear)
        finally:
            if runs:
                await self.monitor.ask("cont")
        return written

    async def disarm(self) -> None:
        """Nobody harvests any more. What the kernel still protects costs one silent fault a page."""
        self._drop_marks()
        self.armed = False
        if self.state is GuestState.RUNNING:
            await self._settle()

    def _drop_marks(self) -> None:
        if self._marks is not None:
            self._marks.close()
            self._marks = None

    def _require_running(self, run_state: str) -> None:
        if run_state != "running":
            raise Immovable(f"QEMU says the guest is {run_state}: have it run first (QMP cont), or end it")

    # -- leaving ------------------------------------------------------------------------------------

    async def pause(self, migration: str) -> None:
        """Stop here; nothing of the guest runs from here on. Noted in QEMU before it is done."""
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: it cannot be paused")
        if self.state is GuestState.RUNNING:
            self._require_running((await self.monitor.ask("query-status"))["status"])
            await self.prepare()
            await self._memos.write(Memo(GuestState.PAUSED, migration, self._settings))
            self._stream = await StateStream.open(self.monitor)
            # Whether QEMU's answer comes or not: from here on only a RESUME has the guest run for sure.
            self.state, self.migration = GuestState.PAUSED, migration
            stopping = asyncio.ensure_future(self._stop())
            if self.armed:  # it will be asked for, and QEMU obeys in order: 2 ms less of the pause
                self._saving = asyncio.ensure_future(self._save(stopping))
            await stopping
        elif migration != self.migration:
            await self._memos.write(Memo(GuestState.PAUSED, migration, self._settings))
            self.migration = migration

    async def _stop(self) -> None:
        with self.monitor.expecting("STOP") as stopped:
            await self.monitor.ask("stop")
            self._stopped_at_ns = await _moment(stopped)

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def prepare(self, *, holds_still: bool = False) -> None:
        """migd's migration settings instead of QEMU's own, which are noted first: 8 ms before the pause."""
        if self._settings is None:
            settings = await Settings.of(self.monitor)
            await self._memos.write(Memo(self.state, self.migration, settings, holds_still))
            self._settings = settings
            await settings.for_migd().apply(self.monitor)

    async def save(self) -> bytes:
        """The device state of the paused guest. GuestError if QEMU put RAM into it, too."""
        if self.state is not GuestState.PAUSED:
            raise GuestError(f"a {self.state} guest is not saved")
        if self._saving is None:
            self._saving = asyncio.ensure_future(self._save())
        return await asyncio.shield(self._saving)

    async def _save(self, stopping: asyncio.Future[None] | None = None) -> bytes:
        if self._stream is None:  # it was paused by another than us
            self._stream = await StateStream.open(self.monitor)
        stream, self._stream = self._stream, None
        try:
            state, ram_bytes = await stream.save()
        finally:
            stream.close()
        if stopping is not None:
            await stopping
        if ram_bytes >= min(block.pages for block in self.blocks) * PAGE_BYTES:
            raise GuestError(f"QEMU counts {ram_bytes} bytes of RAM into its state: RAM was not left out")
        await self._refuse_balloon()
        heading = Heading(
            qemu=self._found.name, machine=self._found.machine, stopped_at_ns=self._stopped_at_ns
        )
        return device_state.encode(heading, state)

    async def saved(self) -> None:
        """A saving that was begun is over; what came of it can still be had."""
        if self._saving is not None:
            await asyncio.wait({self._saving})
            self._saving.exception()

    async def _refuse_balloon(self) -> None:
        """Memory that a balloon gives back is a hole, which no log sees (R20). GuestError if it has moved."""
        if (
            self._found.balloon_bytes
            and await inventory.balloon_bytes(self.monitor) != self._found.balloon_bytes
        ):
            raise GuestError("the guest's balloon was moved meanwhile: leave it alone during a migration")

    async def resume(self) -> Running:
        """Go on after a pause that led nowhere, with QEMU's own settings; nothing if it runs."""
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: START it")
        if self.state is GuestState.PAUSED:
            await self.saved()
            self._drop_stream()
            await cancelled(self.monitor)
            await self._continue()
            await self._settle()
        return self.last_pause

    async def _continue(self) -> None:
        with self.monitor.expecting("RESUME") as resumed:
            answer = asyncio.ensure_future(self.monitor.ask("cont"))
            # It runs once QEMU says so, and an emulated processor may hold the answer up for 20 ms.
            await asyncio.wait({resumed, answer}, return_when=asyncio.FIRST_COMPLETED)
            if resumed.done():
                answer.add_done_callback(_heard)
            else:
                await answer
            self._resumed_at_ns = await _moment(resumed)
        self.state, self.migration = GuestState.RUNNING, ""
        self._saving = None

    @property
    def last_pause(self) -> Running:
        return Running(stopped_at_ns=self._stopped_at_ns, resumed_at_ns=self._resumed_at_ns)

    async def _settle(self) -> None:
        """QEMU is as it would be without migd."""
        if self._settings is not None:
            await self._settings.apply(self.monitor)
            self._settings = None
        await self._memos.write(None)

    # -- arriving -----------------------------------------------------------------------------------

    async def expect(self, migration: str) -> None:
        """Wait for the device state of this migration, which is noted in QEMU."""
        if self.state is not GuestState.INCOMING or self._found.run_state != "inmigrate":
            raise GuestError(f"QEMU is {self._found.run_state}: start it with -incoming defer")
        settings = self._settings or await Settings.of(self.monitor)
        self._settings, self.migration = settings, migration
        await self._memos.write(Memo(GuestState.INCOMING, migration, settings))
        await settings.for_migd().apply(self.monitor)
        await self.monitor.ask("stop")  # as -S does: once it is loaded it waits for its start (H2)
        self._stream = await StateStream.open(self.monitor)
        await self._stream.await_state()

    async def load(self, blob: bytes) -> None:
        """Take the device state in; RAM is complete. GuestError if QEMU refuses it, and perhaps ends over it.

        Refused, and QEMU has seen nothing of it, if it is the state of another machine type.
        """
        stream, self._stream = self._stream, None
        if self.state is not GuestState.INCOMING or stream is None:
            raise GuestError(f"a {self.state} guest loads no device state, or not twice")
        try:
            heading, state = device_state.decode(blob)
            if heading.machine != self._found.machine:
                raise Refused(
                    f"the guest has machine type {heading.machine} at its source and {self._found.machine} "
                    f"here: start QEMU with -machine {heading.machine}"
                )
            run_state = await stream.load(state)
        finally:
            stream.close()
        if run_state != "paused":
            raise GuestError(f"QEMU is {run_state} after loading, not paused")
        self._stopped_at_ns = heading.stopped_at_ns
        self._loaded = True

    async def start(self) -> Running:
        """Run for the first time here. Idempotent."""
        if self.state is GuestState.PAUSED:
            raise GuestError("a paused guest is resumed, not started")
        if self.state is GuestState.INCOMING:
            if not self._loaded:
                raise GuestError("the guest has no device state yet")
            await self._continue()
        return self.last_pause

    async def started(self) -> None:
        """What may follow once the guest runs: nobody waits for it."""
        await self._settle()

    async def quit(self) -> None:
        """End QEMU: the guest runs elsewhere now, or never will run here."""
        try:
            await self.monitor.ask("quit")
            async with asyncio.timeout(_QUIT_S):
                await self.monitor.ended()
        except (MigdError, TimeoutError):
            return


async def _moment(event: asyncio.Future[Event]) -> int:
    """When it happened, by QEMU; now, if QEMU did not say."""
    await asyncio.wait({event}, timeout=_EVENT_S)
    return event.result().at_ns if event.done() else time.time_ns()


def _heard(answer: asyncio.Future[Any]) -> None:
    """Whatever it is, it comes too late to matter."""
    if not answer.cancelled():
        answer.exception()


def _pid_of(monitor: Monitor, fd: int) -> int:
    """The QEMU behind a monitor: who made its socket or, if that was libvirt, who maps its RAM."""
    holders = holder_of(fd)
    if monitor.listener_pid in holders:
        return monitor.listener_pid
    others = [pid for pid in holders if pid != os.getpid()]
    if len(others) != 1:
        raise GuestError(
            f"which process is the QEMU of {monitor.path}? {len(others)} map its RAM shared and writable: "
            f"run migd as root, or as QEMU's user; RAM needs share=on"
        )
    return others[0]


def _told(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} of {size} bytes" for name, size in sorted(sizes.items())) or "none"
