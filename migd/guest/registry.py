"""GuestRegistry: the guests of a daemon, those that attach and those that are spawned for a migration.

A guest process and its daemon are peers: either may die without the other. The guest process holds the RAM
descriptor, too, so RAM outlives the daemon; after a restart the guest attaches again and hands it back.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from migd.errors import GuestError, MigdError, Refused, ResourceError
from migd.guest import control
from migd.guest.control import Attach, GuestState
from migd.guest.hint_receiver import SocketHints
from migd.guest.hosted import HostedGuest
from migd.guest.link import GuestLink
from migd.guest.ram_supply import RamSupply
from migd.guest.spawner import SpawnedProcess, Spawner
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.ram.bitmap import PageBitmap
from migd.ram.block import MAX_RAM_PAGES, BlockShape
from migd.ram.layout import RamLayout
from migd.ram.provider import RamProvider

log = logging.getLogger(__name__)

_BACKLOG = 128
"""Guests that start at the same moment: one that finds no place here is told so at once, and ends."""
_ACCEPT_PAUSE_S = 0.1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of guests and RAM blocks: they become parts of file names, and the destination takes no other."""
_UCRED = struct.Struct("3i")


class GuestObserver(Protocol):
    """Is told of guests that come and go. No method may raise."""

    def attached(self, guest: HostedGuest) -> None: ...
    def detached(self, guest: HostedGuest) -> None: ...


class GuestRegistry:
    """Listens for guests on a unix socket, spawns incoming ones, and knows them all by name."""

    def __init__(
        self,
        socket_path: Path,
        log_dir: Path,
        spawn_command: Sequence[str],
        limits: Limits,
        returned: Callable[[HostedGuest], Awaitable[None]],
        observer: GuestObserver,
        *,
        ram: RamProvider,
    ) -> None:
        """``returned`` is awaited for a guest that brings its RAM: it was attached to a daemon before us.

        ``spawn_command`` is the argv of an incoming guest, see ``Spawner``.
        """
        self._path = socket_path
        self._spawner = Spawner(spawn_command, socket_path, log_dir)
        self._limits = limits
        self._returned = returned
        self._observer = observer
        self.guests: dict[str, HostedGuest] = {}
        self._supply = RamSupply(ram, self._rams)
        self._sock = control.new_socket()
        try:
            self._path.unlink(missing_ok=True)
            self._sock.bind(str(self._path))
            self._path.chmod(0o600)
            self._sock.listen(_BACKLOG)
        except OSError as error:
            self._sock.close()
            raise ResourceError(f"guest socket {self._path}: {error.strerror or error}") from error
        self._sock.setblocking(False)

    def get(self, name: str) -> HostedGuest:
        """MigdError, naming the guests there are, if it is not here."""
        guest = self._present(name)
        if guest is None:
            known = ", ".join(sorted(self.guests)) or "none"
            raise MigdError(f"no guest {name!r} is attached here (attached: {known})")
        return guest

    def expect_guests(self) -> None:
        """Have a process ready for the next incoming guest. ResourceError if none can be started."""
        try:
            self._spawner.prepare()
        except OSError as error:
            raise ResourceError(f"starting a process for incoming guests: {error}") from error

    async def run(self) -> None:
        """Accept guests until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    try:
                        sock, _ = await loop.sock_accept(self._sock)
                    except OSError as error:  # EMFILE: a later one may work
                        log.warning("accepting a guest failed: %s", error.strerror)
                        await asyncio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    self._tasks.create_task(self._serve(sock))
        finally:
            self._sock.close()
            self._path.unlink(missing_ok=True)
            self._spawner.close()
            for guest in list(self.guests.values()):
                guest.disconnect()

    async def _serve(self, sock: socket.socket) -> None:
        """One guest process from its ATTACH to its end."""
        sock.setblocking(False)
        try:
            attach, fds = await self._first_packet(sock)
        except (GuestError, OSError) as error:
            log.warning("a guest connection was refused: %s", error or "no ATTACH in time")
            sock.close()
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        try:
            guest, ours = self._admit(attach, fds)
        except MigdError as error:
            log.warning("guest %s refused: %s", attach.name, error)
            control.close_all(fds)
            with sock, suppress(OSError):  # it may be gone already
                control.send(sock, control.Declined(reason=str(error)))
            return
        await self._keep(guest, attach, sock, ours)

    async def _first_packet(self, sock: socket.socket) -> tuple[Attach, list[int]]:
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, readable.set)
        try:
            async with asyncio.timeout(self._limits.hello_s):
                await readable.wait()
        finally:
            loop.remove_reader(sock)
        packet = control.receive_from_guest(sock)
        if packet is None:
            raise GuestError("it closed the connection before ATTACH")
        attach, fds = packet
        if not isinstance(attach, Attach):
            control.close_all(fds)
            raise GuestError("a guest must begin with ATTACH")
        _, uid = _peer_of(sock)
        if uid not in (os.getuid(), 0):
            control.close_all(fds)
            raise GuestError(f"a guest of user {uid} may not attach here")
        return attach, fds

    def _admit(self, attach: Attach, fds: list[int]) -> tuple[HostedGuest, bool]:
        """The guest an ATTACH belongs to, and whether its RAM is new to it. Refused with the reason."""
        if attach.version != control.VERSION:
            raise Refused(f"the guest speaks control version {attach.version}, this daemon {control.VERSION}")
        for name in (attach.name, *(block.name for block in attach.blocks)):
            if not _NAME.fullmatch(name):
                raise Refused(f"{name[:80]!r} is no name: letters, digits and . _ -, at most 64 of them")
        pages = sum(block.pages for block in attach.blocks)
        if pages > MAX_RAM_PAGES:
            raise Refused(f"{pages} pages of RAM in all, a guest has at most 2^32-1")
        known = self._present(attach.name)
        if known is not None:
            expected = known.state is GuestState.INCOMING and known.migration == attach.migration
            if not expected or known.has_attached:
                raise Refused(f"a guest named {attach.name!r} is attached already")
            if fds:
                raise Refused(
                    f"guest {attach.name!r} is given its RAM here and brings {len(fds)} descriptors"
                )
            return known, True
        shapes = tuple(BlockShape(block.name, block.pages) for block in attach.blocks)
        if not fds and attach.state is not GuestState.RUNNING:
            raise Refused(
                f"guest {attach.name!r} is {attach.state} and brings no RAM: it belongs to nothing here"
            )
        if attach.read_only and not fds:
            raise Refused(f"guest {attach.name!r} never writes its RAM and brings none")
        if fds:
            ram = self._supply.adopt(shapes, fds, read_only=attach.read_only)
        else:
            ram = self._supply.make(attach.name, shapes)
        return self._add(attach.name, ram, attach.state, attach.migration), not fds

    def free_bytes(self) -> int:
        """RAM that a guest would be given now. ResourceError if the host does not tell."""
        return self._supply.free_bytes()

    def _rams(self) -> list[RamLayout]:
        return [guest.ram for guest in self.guests.values() if not guest.gone]

    def _present(self, name: str) -> HostedGuest | None:
        """The guest of this name, unless only its process is left, to end or to be reaped."""
        guest = self.guests.get(name)
        return None if guest is None or guest.gone or guest.released else guest

    def _add(self, name: str, ram: RamLayout, state: GuestState, migration: str) -> HostedGuest:
        # Epochs never repeat for one RAM object (R5), not even after a daemon restart.
        first_epoch = (int.from_bytes(os.urandom(4), "little") << 32) + 1
        ledger = Ledger(ram.pages, PageBitmap, first_epoch=first_epoch)
        guest = HostedGuest(name, ram, ledger, self._limits, state, migration)
        self.guests[name] = guest
        return guest

    async def _keep(self, guest: HostedGuest, attach: Attach, sock: socket.socket, new_ram: bool) -> None:
        """Answer ATTACH, and watch over the connection until the guest closes it."""
        guest.introduce(attach)
        try:
            hints = self._welcome(guest, sock, new_ram)
        except OSError as error:
            log.warning("guest %s could not be attached: %s", guest.name, error.strerror)
            sock.close()
            if guest.process is None and new_ram:
                guest.ram.unlink()  # nobody else has it
            self._remove(guest)
            return
        if guest.process is None and guest.ram.named:
            self._tasks.create_task(_unlink_at_end(guest.ram, _peer_of(sock)[0]))
        link = GuestLink(sock, guest.name)
        guest.connect(link, hints)
        log.info(
            "guest %s attached: %s, %d MiB, pid %d", guest.name, guest.state, guest.ram.bytes >> 20, guest.pid
        )
        self._observer.attached(guest)
        try:
            if not new_ram and not guest.in_readiness:
                await self._returned(guest)
            await link.gone.wait()
        finally:
            log.info("guest %s detached", guest.name)
            self._remove(guest)
            self._observer.detached(guest)

    def _welcome(self, guest: HostedGuest, sock: socket.socket, new_ram: bool) -> SocketHints:
        """ATTACHED, with RAM if it is new to the guest, and a hint socket. OSError if that fails."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        fds = [block.fd for block in guest.ram.blocks] if new_ram else []
        blocks = tuple(control.Block(block.name, block.pages) for block in guest.ram.blocks)
        with theirs:
            try:
                control.send(sock, control.Attached(blocks=blocks), [*fds, theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return SocketHints(ours, guest.ram.pages, self._limits)

    def _remove(self, guest: HostedGuest) -> None:
        if self.guests.get(guest.name) is guest:
            del self.guests[guest.name]
        guest.disconnect()

    # -- incoming guests ----------------------------------------------------------------------------

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> HostedGuest:
        """See ``migd.migration.ports.GuestHost``."""
        present = self._present(name)
        if present is not None:
            return self._assigned(present, migration, shapes)
        guest = self._add(name, self._supply.make(name, shapes), GuestState.INCOMING, migration)
        guest.pin(migration)
        try:
            guest.process = self._spawner.spawn(name, migration)
            pidfd = os.pidfd_open(guest.process.pid)
        except OSError as error:
            if guest.process is not None:
                guest.process.kill()
                guest.process.wait()
            guest.ram.unlink()
            guest.unpin(migration)
            self._remove(guest)
            what = error.filename or "a process"
            raise ResourceError(f"starting {what} for guest {name}: {error.strerror}") from error
        self._tasks.create_task(self._watch(guest, guest.process, pidfd))
        return guest

    def _assigned(self, guest: HostedGuest, migration: str, shapes: tuple[BlockShape, ...]) -> HostedGuest:
        """The guest in readiness, if this is one. Refused if not, or if its RAM is not fresh (R11)."""
        if not guest.in_readiness:
            raise Refused(f"a guest named {guest.name!r} is here already")
        if guest.ram.shapes != shapes:
            raise Refused(
                f"guest {guest.name!r} in readiness has RAM {_told(guest.ram.shapes)}, not {_told(shapes)}"
            )
        if not guest.ram.blank():
            raise Refused(f"the RAM of guest {guest.name!r} in readiness is not zero: start its QEMU anew")
        guest.expect(migration)
        guest.pin(migration)
        return guest

    async def _watch(self, guest: HostedGuest, process: SpawnedProcess, pidfd: int) -> None:
        """A spawned process is reaped when it ends, and missed even if it never attached.

        What it has started goes with it, if it was killed before its guest ran here.
        """
        try:
            await _ended(pidfd)
            if guest.state is GuestState.INCOMING:
                process.kill()
            process.wait()
            guest.ram.unlink()
        finally:
            os.close(pidfd)
            # It outlives its daemon on purpose: no warning from Popen's destructor.
            process.returncode = process.returncode or 0
        self._remove(guest)


def _told(shapes: Sequence[BlockShape]) -> str:
    return " + ".join(f"{shape.name} of {shape.bytes >> 20} MiB" for shape in shapes)


async def _unlink_at_end(ram: RamLayout, pid: int) -> None:
    """The files that are a guest's RAM go once its process has ended; both may outlive their daemon."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        ram.unlink()
        return
    except OSError as error:  # none left, or a process of another container: `migd clean` finds the files
        log.warning("the end of process %d cannot be seen, its RAM files stay: %s", pid, error.strerror)
        return
    try:
        await _ended(pidfd)
        ram.unlink()
    finally:
        os.close(pidfd)


async def _ended(pidfd: int) -> None:
    """Returns when the process has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)


def _peer_of(sock: socket.socket) -> tuple[int, int]:
    """Pid and user of the process at the other end, as the kernel has them."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid
