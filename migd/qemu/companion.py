"""Companion: the process beside a stock QEMU that speaks for it to the migd daemon, as a guest.

To the daemon it is a guest like the stub: it attaches, is armed, paused, loaded, started, and survives its
daemon. To QEMU it is a QMP client and the host's end of the hint port. Either may die without the other: a
QEMU whose companion was killed runs on, or stays paused, and the next one finds in QEMU what was going on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from migd.errors import ConfigError, GuestError, MigdError
from migd.guest import control
from migd.guest.control import Block, GuestState
from migd.qemu.daemon_link import DaemonLink
from migd.qemu.hint_relay import HintRelay
from migd.qemu.launch import Launch
from migd.qemu.machine import Immovable, QemuMachine
from migd.qemu.monitor import Monitor
from migd.qemu.started import StartedQemu
from migd.ram.page import PAGE_BYTES
from migd.tasks import Runner

CONNECT_S = 5.0
RETRY_S = 0.2
ORPHAN_S = 60.0
"""A QEMU that waits for a guest which never came ends when no daemon has come back in this time."""

RAM_BLOCK = "ram"
"""What the RAM of a guest that begins here is called, as its memory backend must be."""

EXIT_DECLINED = 3
EXIT_ORPHAN = EXIT_DIED = 1
_EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


@dataclass(frozen=True)
class CompanionOptions:
    """``qmp`` for a QEMU that is there already, else ``command`` to start one."""

    name: str
    daemon: Path
    """Its guest socket."""
    qmp: Path | None = None
    command: tuple[str, ...] = ()
    incoming: str = ""
    """The migration that this is spawned for; empty for a guest of our own, or in readiness."""
    ram_bytes: int = 0
    """Of a guest that begins here."""


def run_companion(options: CompanionOptions) -> int:
    """Stand beside that QEMU until it ends: the exit code.

    0 QEMU has ended, or SIGTERM; 1 QEMU has died, or waited in vain for its guest; 3 declined by the daemon,
    or it cannot be moved; 130 SIGINT. ConfigError names a wrong option or an absent daemon, GuestError a QEMU
    that does not answer.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Companion(options).run())


class Companion:
    """One QEMU and its daemon."""

    def __init__(self, options: CompanionOptions) -> None:
        self._options = options
        self._machine: QemuMachine | None = None
        self._link: DaemonLink | None = None
        self._relay: HintRelay | None = None
        self._relaying: Runner | None = None
        self._declined = ""
        """Why, the last time: it is said once."""
        self._watching: Runner | None = None
        self._hint_socket: socket.socket | None = None
        """Before there is a QEMU to relay for."""
        self._own: StartedQemu | None = None
        """QEMU's process, if we have started it."""
        self._exit: asyncio.Future[int] | None = None
        self._ready = False
        """Has been attached once."""

    async def run(self) -> int:
        """See ``run_companion``."""
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        for number, code in _EXIT_CODES.items():
            loop.add_signal_handler(number, self._end, code)
        serving = Runner(self._serve())
        try:
            done = asyncio.ensure_future(serving.failure())
            ends: set[asyncio.Future[Any]] = {self._exit, done}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._exit.done():
                await done
            done.cancel()
            return self._exit.result()
        finally:
            await serving.stop()
            await self._close()

    def _end(self, code: int) -> None:
        assert self._exit is not None
        if not self._exit.done():
            self._exit.set_result(code)

    async def _close(self) -> None:
        """QEMU ends with us if we have started it; one that was there before goes on, with its settings.

        So does one with a guest that runs, or is to run again, if we end by a fault of our own.
        """
        if self._relaying is not None:
            await self._relaying.stop()
        if self._hint_socket is not None:
            self._hint_socket.close()
        if self._link is not None:
            self._link.close()
        if self._machine is not None:
            await self._machine.saved()
            with suppress(MigdError):
                await self._machine.disarm()
            if self._own is not None and not self._spared:
                await self._machine.quit()
            await self._machine.monitor.close()
            self._machine.close()
        if self._watching is not None:
            await self._watching.stop()
        if self._own is not None and self._spared:
            self._say(self._own.let_go())
        elif self._own is not None:
            if self._machine is None:
                self._own.terminate()
            await self._own.end()

    @property
    def _spared(self) -> bool:
        """Nobody has told us to end, and QEMU has a guest."""
        told = self._exit is not None and self._exit.done()
        return not told and self._machine is not None and self._machine.state is not GuestState.INCOMING

    # -- the daemon ---------------------------------------------------------------------------------

    async def _serve(self) -> None:
        options = self._options
        if options.qmp is not None:
            await self._stand_beside(await Monitor.connect(options.qmp, CONNECT_S))
        while True:
            self._link = await self._connected()
            try:
                await self._obey_all(self._link)
            finally:
                self._link.close()
            if self._machine is None:
                raise GuestError(f"the daemon at {options.daemon} broke off before it attached the guest")
            await self._left_alone(self._machine)

    async def _connected(self) -> DaemonLink:
        """With a daemon; the first one must be there, the next are waited for."""
        began = asyncio.get_running_loop().time()
        waited = self._link is not None
        while True:
            fds = self._machine.fds if self._machine is not None else ()
            try:
                return DaemonLink.connect(self._options.daemon, self._introduction(), fds)
            except OSError as error:
                if not waited:
                    reason = error.strerror or str(error)
                    raise ConfigError(
                        f"--socket {self._options.daemon}: {reason}; is `migd source` running?"
                    ) from error
            if self._state is GuestState.INCOMING and asyncio.get_running_loop().time() - began > ORPHAN_S:
                self._say(f"no daemon for {ORPHAN_S:.0f} s, never started")
                await self._quit(EXIT_ORPHAN)
            await asyncio.sleep(RETRY_S)

    @property
    def _state(self) -> GuestState:
        if self._machine is not None:
            return self._machine.state
        return GuestState.INCOMING if self._options.incoming else GuestState.RUNNING

    def _introduction(self) -> control.Attach:
        machine, options = self._machine, self._options
        own = (Block(RAM_BLOCK, options.ram_bytes // PAGE_BYTES),) if options.ram_bytes else ()
        return control.Attach(
            version=control.VERSION,
            name=options.name,
            pid=machine.process.pid if machine is not None else os.getpid(),
            state=self._state,
            blocks=machine.blocks if machine is not None else own,
            migration=machine.migration if machine is not None else options.incoming,
            kind=machine.name if machine is not None else "QEMU",
            tracking=machine.tracking() if machine is not None else "",
            opaque=True,
        )

    def _prepared(self) -> control.Prepared:
        machine = self._beside
        return control.Prepared(pid=machine.process.pid, kind=machine.name, tracking=machine.tracking())

    @property
    def _beside(self) -> QemuMachine:
        """GuestError while there is none yet."""
        if self._machine is None:
            raise GuestError("QEMU is not there yet")
        return self._machine

    async def _left_alone(self, machine: QemuMachine) -> None:
        """The daemon is gone: nobody harvests, nobody takes hints; the guest goes on as it is."""
        if self._relay is not None:
            self._relay.release()
        with suppress(MigdError):  # QEMU is held up: the next daemon, or companion, sets back what is left
            await machine.disarm()

    async def _obey_all(self, link: DaemonLink) -> None:
        """One request after the other, until the daemon is gone."""
        while (packet := await link.receive()) is not None:
            message, fds = packet
            try:
                await self._obey(link, message, fds)
            except (MigdError, OSError) as error:
                immovable = isinstance(error, Immovable)
                link.send(control.Failed(id=message.id, reason=str(error), immovable=immovable))
                if self._machine is None:
                    await asyncio.sleep(RETRY_S)  # the daemon is to hear the reason before our end
                    raise
            finally:
                control.close_all(fds)

    async def _obey(self, link: DaemonLink, message: control.ToGuest, fds: list[int]) -> None:
        """Do it and answer; descriptors left in ``fds`` are closed."""
        match message:
            case control.Attached():
                await self._attached(link, message, fds)
                return
            case control.Declined(reason=reason):
                if reason != self._declined:
                    self._say(f"the daemon declined: {reason}")
                self._declined = reason
                if self._machine is None or self._options.qmp is not None:
                    self._end(EXIT_DECLINED)
                await asyncio.sleep(RETRY_S)
                return
            case control.Quit():
                await self._quit(0)
                return
        machine = self._beside
        match message:
            case control.Expect(migration=migration):
                await machine.expect(migration)
                link.send(self._prepared())
            case control.Arm():
                await self._arm(link, message, machine)
            case control.Harvest():
                _answer(link, control.Harvested(id=message.id), await machine.harvest())
            case control.Disarm():
                await machine.disarm()
                link.send(control.Done(id=message.id))
            case control.Pause(migration=migration):
                await machine.pause(migration)
                link.send(control.Paused(id=message.id))
            case control.Save():
                _answer(link, control.Saved(id=message.id), await machine.save())
            case control.Resume():
                running = await machine.resume()
                link.send(_with_id(running, message.id))
            case control.Load():
                await self._load(machine, fds)
                link.send(control.Done(id=message.id))
            case control.Start():
                running = await machine.start()
                link.send(_with_id(running, message.id))
                await machine.started()

    async def _arm(self, link: DaemonLink, message: control.Arm, machine: QemuMachine) -> None:
        armed = await machine.arm({link.daemon_pid})
        fds = [] if armed.pagemap_fd is None else [armed.pagemap_fd]
        try:
            link.send(control.Armed(id=message.id, addresses=armed.addresses, log=armed.log), fds)
        finally:
            control.close_all(fds)
        await machine.prepare()  # while memory is sent: nobody waits

    async def _load(self, machine: QemuMachine, fds: list[int]) -> None:
        if not fds:
            raise GuestError("LOAD without a device state")
        try:
            await machine.load(control.blob_bytes(fds[0]))
        except GuestError as error:
            if self._own is not None and (failure := await self._own.failure(RETRY_S)) is not None:
                raise failure from error
            raise

    async def _quit(self, code: int) -> None:
        """QEMU ends, and we with it."""
        if self._machine is not None:
            if self._watching is not None:
                await self._watching.stop()
            await self._machine.quit()
        self._end(code)

    # -- QEMU ---------------------------------------------------------------------------------------

    async def _attached(self, link: DaemonLink, message: control.Attached, fds: list[int]) -> None:
        if fds:
            self._hint_socket = socket.socket(fileno=fds.pop())
        if self._machine is None:
            ram, fds[:] = fds[:], []
            await self._start(message.blocks, ram)
            if self._options.incoming:
                await self._beside.expect(self._options.incoming)
            link.send(self._prepared())
        if self._relay is not None and self._hint_socket is not None:
            self._relay.serve(self._hint_socket)
            self._hint_socket = None
        if not self._ready:
            self._ready = True
            machine = self._beside
            self._say(f"ready: {machine.name}, {machine.state}, writes found by {machine.tracking()}")

    async def _start(self, blocks: tuple[Block, ...], fds: list[int]) -> None:
        """Start QEMU on this RAM, and stand beside it; the descriptors are ours."""
        options = self._options
        directory = options.daemon.parent / f"qemu-{options.name}"
        launch = Launch(options.name, options.command, directory, bool(options.incoming))
        if not blocks or len(fds) != len(blocks):
            control.close_all(fds)
            raise GuestError(f"the daemon gave {len(blocks)} RAM blocks and {len(fds)} descriptors")
        try:
            self._own = StartedQemu(launch, blocks, fds)
            if self._own.untracked:
                self._say(f"writes are not tracked by the kernel: {self._own.untracked}")
            monitor = await self._own.monitor()
        except BaseException:
            control.close_all(fds)
            raise
        await self._stand_beside(monitor, blocks, fds)

    async def _stand_beside(
        self, monitor: Monitor, blocks: tuple[Block, ...] = (), fds: list[int] | None = None
    ) -> None:
        try:
            self._machine = await QemuMachine.adopt(monitor, blocks=blocks, fds=fds or [])
        except BaseException:
            await monitor.close()
            raise
        machine = self._machine
        self._watching = Runner(self._watch(machine))
        if machine.hint_socket:
            self._relay = HintRelay(machine.hint_socket, lambda: machine.map)
            self._relaying = Runner(self._relay.run())
        else:
            self._say("QEMU has no port org.migd.hints.0: its guest cannot say which pages are free")

    async def _watch(self, machine: QemuMachine) -> None:
        """We end with QEMU; the exit code says whether it was asked to."""
        await machine.monitor.ended()
        failure = await self._own.failure() if self._own is not None else None
        if failure is not None:
            self._say(str(failure))
        await asyncio.sleep(RETRY_S)  # for the answer to a daemon that has asked something, and hears why
        self._end(0 if failure is None else EXIT_DIED)

    def _say(self, line: str) -> None:
        """One line on stdout, whose reader may be gone: a daemon that spawned us and died."""
        with suppress(OSError):
            os.write(1, f"guest {self._options.name} {line}\n".encode())


def _answer(link: DaemonLink, message: control.FromGuest, blob: bytes) -> None:
    fd = control.blob_fd(blob)
    try:
        link.send(message, [fd])
    finally:
        os.close(fd)


def _with_id(running: control.Running, request: int) -> control.Running:
    return control.Running(
        id=request, stopped_at_ns=running.stopped_at_ns, resumed_at_ns=running.resumed_at_ns
    )
