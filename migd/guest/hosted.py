"""HostedGuest: one guest as its daemon holds it, the port through which sessions move it."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field

from migd.errors import GuestError, LiveUnsupported, Refused
from migd.guest import control
from migd.guest.control import GuestState, Log
from migd.guest.guest_log import GuestLog
from migd.guest.hint_receiver import SocketHints
from migd.guest.link import GuestLink, RequestRefused
from migd.guest.spawner import SpawnedProcess
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.migration.ports import DirtyLog, PauseReport, Resumption, SelfCheck
from migd.ram.bitmap import PageBitmap
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from migd.ram.layout import RamLayout
from migd.ram.static_log import StaticDirtyLog

log = logging.getLogger(__name__)

_OPAQUE_HANDOVER_S = 0.012
"""Under QEMU 10 with a serial port for devices: 4 ms to save 270 KB of state, 5 to load it, 3 for the steps
between three processes (docs/performance.md)."""


@dataclass(eq=False)
class HostedGuest:
    """One guest: its RAM, its page ledger, and its process as far as it is connected.

    Serves a session as ``SourceGuest`` or ``DestinationGuest`` (migd.migration.ports).
    """

    name: str
    ram: RamLayout
    ledger: Ledger[PageBitmap]
    limits: Limits
    state: GuestState
    migration: str = ""
    """The one it is paused or incoming for, else empty."""
    process: SpawnedProcess | None = None
    hints: SocketHints | None = None
    opaque: bool = False
    """See ``migd.guest.control.Attach``."""
    _attach: control.Attach | None = None
    _pins: set[str] = field(default_factory=set)
    _link: GuestLink | None = None
    _attached: asyncio.Event = field(default_factory=asyncio.Event)
    _gone: asyncio.Event = field(default_factory=asyncio.Event)
    _judged: asyncio.Event = field(default_factory=asyncio.Event)
    _arrived: bool = False
    released: bool = False
    """It runs elsewhere: what is left of it here only has to end, and its name may be taken."""

    @property
    def link(self) -> GuestLink:
        if self._link is None:
            raise GuestError(f"guest {self.name} is not connected")
        return self._link

    @property
    def has_attached(self) -> bool:
        return self._attached.is_set()

    @property
    def gone(self) -> bool:
        """Its process has ended, or was given up."""
        return self._gone.is_set()

    def introduce(self, attach: control.Attach) -> None:
        """What the guest's process says of itself."""
        self._attach, self.opaque = attach, attach.opaque

    @property
    def description(self) -> control.Attach | control.Prepared | None:
        """The newest that its process has said of ``pid``, ``kind`` and ``tracking``; None before it has."""
        link = self._link
        if link is not None and link.is_prepared:
            return link.prepared.result()
        return self._attach

    @property
    def pid(self) -> int:
        """Of the process that runs it; 0 until one has attached."""
        return self.description.pid if self.description is not None else 0

    def connect(self, link: GuestLink, hints: SocketHints) -> None:
        """The guest's process has attached."""
        self._link, self.hints = link, hints
        self._attached.set()

    @property
    def in_readiness(self) -> bool:
        """It has attached to be the guest of a migration that is still to come."""
        return self.state is GuestState.INCOMING and not self.migration and not self.gone

    def expect(self, migration: str) -> None:
        """The guest in readiness is this migration's. GuestError if it cannot be told."""
        self.link.tell(control.Expect(migration=migration))
        self.migration = migration

    def disconnect(self) -> None:
        """The guest's process is gone, or has let go of its daemon; RAM stays with the process."""
        self._gone.set()
        if self._link is not None:
            self._link.close()
        if self.hints is not None:
            self.hints.close()
        self._close_ram()

    def pin(self, migration: str) -> None:
        """A migration reads or writes RAM: it stays open here until ``unpin``, even if the process ends.

        What is read of RAM after its descriptor is closed would be zeros, and what is written would go to
        whatever file has that descriptor by then.
        """
        self._pins.add(migration)

    def unpin(self, migration: str) -> None:
        self._pins.discard(migration)
        self._close_ram()

    def _close_ram(self) -> None:
        if self._gone.is_set() and not self._pins:
            self.ram.close()

    # -- SourceGuest --------------------------------------------------------------------------------

    @property
    def reports_free_at_pause(self) -> bool:
        """PAUSED brings the bitmap, unless the guest cannot be looked into (migd.guest.control)."""
        return not self.opaque

    @property
    def handover_s(self) -> float:
        """See ``migd.migration.ports.SourceGuest``."""
        return _OPAQUE_HANDOVER_S if self.opaque else 0.0

    @property
    def checks_itself(self) -> bool:
        """See ``migd.migration.ports.LoadedGuest``."""
        return not self.opaque

    async def arm(self) -> DirtyLog:
        """The kernel's log of the guest's own mapping, or the guest's. LiveUnsupported where it has neither.

        Refused if the guest cannot be moved at all. A guest that never writes its RAM has nothing to log.
        """
        if self.ram.read_only:
            return StaticDirtyLog(self.ram.pages)
        try:
            answer, fds = await self.link.ask(control.Arm(), control.Armed, self.limits.guest_s)
        except RequestRefused as error:
            if error.immovable:
                raise Refused(str(error)) from error
            raise LiveUnsupported(str(error)) from error
        if answer.log is Log.SOFT_DIRTY:
            control.close_all(fds)
            return GuestLog(self.link, answer.log, self.ram.pages, self.limits.guest_s)
        if len(fds) != 1 or len(answer.addresses) != len(self.ram.blocks):
            control.close_all(fds)
            raise GuestError(
                f"guest {self.name} armed {len(answer.addresses)} blocks with {len(fds)} descriptors"
            )
        places = zip(answer.addresses, self.ram.blocks, self.ram.first_pages, strict=True)
        ranges = [ArmedRange(address, block.pages, first) for address, block, first in places]
        dirty_log = KernelDirtyLog(fds[0], ranges, self.ram.pages)
        try:
            await asyncio.to_thread(dirty_log.begin)
        except BaseException:
            dirty_log.close()
            raise
        return dirty_log

    async def disarm(self) -> None:
        await self.link.order(control.Disarm(), control.Done, self.limits.guest_s)

    async def pause(self, migration: str) -> PauseReport:
        """Acknowledged at a safe point, with device state and final free bitmap (R13, R14)."""
        self.state, self.migration = GuestState.PAUSED, migration
        _, fds = await self.link.ask(control.Pause(migration=migration), control.Paused, self.limits.guest_s)
        if self.opaque:
            control.close_all(fds)
            return PauseReport(None, None)
        try:
            if len(fds) != 2:
                raise GuestError(f"guest {self.name} paused with {len(fds)} descriptors, not 2")
            state, bitmap = (control.blob_bytes(fd) for fd in fds)
            if len(bitmap) != -(-self.ram.pages // 8):
                raise GuestError(f"guest {self.name}: a free bitmap of {len(bitmap)} bytes at pause")
            return PauseReport(state, PageBitmap.from_bytes(bitmap, self.ram.pages))
        except OSError as error:  # no memfd at all: a directory, a socket, a file open for writing only
            raise GuestError(f"guest {self.name}: its state cannot be read: {error.strerror}") from error
        finally:
            control.close_all(fds)

    async def save(self) -> bytes:
        """See ``migd.migration.ports.SourceGuest``."""
        _, fds = await self.link.ask(control.Save(), control.Saved, self.limits.guest_s)
        try:
            if len(fds) != 1:
                raise GuestError(f"guest {self.name} saved its state in {len(fds)} descriptors, not 1")
            return control.blob_bytes(fds[0])
        except OSError as error:
            raise GuestError(f"guest {self.name}: its state cannot be read: {error.strerror}") from error
        finally:
            control.close_all(fds)

    def await_verdict(self) -> None:
        """It arrived here before a restart of this daemon, and nothing was said of it yet."""
        self._arrived = True

    @property
    def awaits_verdict(self) -> bool:
        """See ``migd.migration.ports.SourceGuest``."""
        return self._arrived and not self._judged.is_set()

    async def verdict(self) -> None:
        """Returns when the guest may leave again. GuestError if its arrival was found wrong."""
        try:
            async with asyncio.timeout(self.limits.verdict_s):
                await self._judged.wait()
        except TimeoutError:
            waited = f"{self.limits.verdict_s:g} s"
            log.warning("guest %s: no verdict on its arrival within %s, it may leave", self.name, waited)
            self.judged()
        if self.state is not GuestState.RUNNING:
            raise GuestError(f"guest {self.name} is {self.state}: the verdict on its arrival was bad")

    async def resume(self) -> None:
        """A guest that does not answer in time obeys all the same, before it hears of anything else."""
        before = self.state, self.migration
        self.state, self.migration = GuestState.RUNNING, ""
        try:
            await self.link.order(control.Resume(), control.Running, self.limits.guest_s)
        except RequestRefused:
            self.state, self.migration = before
            raise

    async def release(self) -> None:
        """It runs elsewhere: its process here ends."""
        self.released = True
        if not self._gone.is_set():
            self.link.tell(control.Quit())

    async def lost(self) -> None:
        await self._gone.wait()

    # -- DestinationGuest ---------------------------------------------------------------------------

    async def attached(self) -> None:
        """Returns when the guest's process has attached and can be loaded. GuestError within ``begin_s``."""
        missing = "attach"
        try:
            async with asyncio.timeout(self.limits.begin_s):
                await self._attached.wait()
                if self.opaque:
                    missing = "have its machine ready"
                    await self.link.unasked(self.link.prepared, "its machine was ready")
        except TimeoutError as error:
            within = f"within {self.limits.begin_s:g} s"
            raise GuestError(f"the process of guest {self.name} did not {missing} {within}") from error

    async def load(self, device_state: bytes) -> None:
        fd = control.blob_fd(device_state)
        try:
            await self.link.order(control.Load(), control.Done, self.limits.guest_s, [fd])
        finally:
            os.close(fd)

    async def start(self) -> Resumption:
        """Idempotent: a guest that runs already answers with the same times."""
        answer = await self.link.order(control.Start(), control.Running, self.limits.guest_s)
        self.unpin(self.migration)
        self._arrived = self._arrived or self.state is GuestState.INCOMING
        self.state, self.migration = GuestState.RUNNING, ""
        return Resumption(answer.stopped_at_ns, answer.resumed_at_ns)

    def judged(self) -> None:
        """See ``migd.migration.ports.DestinationGuest``."""
        self._judged.set()

    async def self_check(self) -> SelfCheck:
        """GuestError if the guest ends before it reports."""
        checked = await self.link.unasked(self.link.checked, "its self-check")
        return SelfCheck(checked.pages, checked.wrong, checked.first_wrong)

    async def discard(self) -> None:
        """End a process that never ran the guest here: QUIT, and by signal if it was spawned here."""
        try:
            self.link.tell(control.Quit())
        except GuestError:
            log.debug("guest %s: not connected, nothing to tell", self.name)
        if self.process is not None:
            self.process.kill()
        self.disconnect()
        self.unpin(self.migration)
