"""Scribbling: what free-page hints are worth by themselves, with no migration around them.

A guest that says of pages that they are free must not care what is in them, as long as it has not written
them since it was asked. So they are overwritten, with the guest standing still, and it has to live on. The
parts are migd's own: its monitor, its way to arm a QEMU, its log, its relay and its end of the hint channel.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from migd.guest.hint_receiver import SocketHints
from migd.lab.workbench import MIB, Booted, Recipe
from migd.limits import Limits
from migd.qemu import preload
from migd.qemu.hint_relay import HintRelay
from migd.qemu.machine import QemuMachine
from migd.qemu.monitor import Monitor
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from migd.tasks import Runner
from tests.support.vm import FAILURES
from tests.support.vm_site import WAIT_S

PAGE_BYTES = 4096
GRAB_BYTES = 48 * MIB
GRAB_PAGES = GRAB_BYTES // PAGE_BYTES
_NOISE_BYTES = 4 * MIB
_LOOK_S = 0.005


@dataclass(frozen=True)
class Round:
    """What became of one answer, in pages."""

    hinted: int
    written: int
    """Of those hinted, by the guest, since it was asked."""
    scribbled: int


class Scribbler:
    """Beside one running guest."""

    def __init__(self, machine: QemuMachine, log: KernelDirtyLog, hints: SocketHints, pages: int) -> None:
        self._machine = machine
        self._log = log
        self._hints = hints
        self._pages = pages
        self._epoch = 0
        self._free = PageBitmap(pages)

    async def contract(self) -> FreeContract:
        return await self._hints.declare(WAIT_S)

    async def listen(self) -> int:
        """Arm the log, then ask, and take in the whole answer: how many pages are free."""
        self._log.begin()
        self._epoch += 1
        self._free = PageBitmap(self._pages)
        await self._hints.request(self._epoch, self._take)
        async with asyncio.timeout(WAIT_S):
            while not self._hints.answered(self._epoch):  # noqa: ASYNC110  # it sets no event
                await asyncio.sleep(_LOOK_S)
        return self._free.count()

    def _take(self, epoch: int, free: PageBitmap) -> None:
        if epoch == self._epoch:
            self._free |= free

    async def strike(self, *, zeros: bool = False, obey: bool = True) -> Round:
        """Overwrite what is free with noise, or zeros, while the guest stands still.

        ``obey`` the rule that a page which was written since is not free any more (R4).
        """
        ask = self._machine.monitor.ask
        await ask("stop")
        try:
            written = self._free & self._log.collect()
            target = self._free - written if obey else self._free
            await asyncio.to_thread(_overwrite, self._machine.fds[0], target, zeros)
        finally:
            await ask("cont")
        return Round(self._free.count(), written.count(), target.count())


@asynccontextmanager
async def scribbling(qmp: Path) -> AsyncIterator[Scribbler]:
    """Beside the QEMU with this monitor; it was started as ``tracked`` says."""
    monitor = await Monitor.connect(qmp, WAIT_S, retry=True)
    machine = await QemuMachine.adopt(monitor)
    (block,) = machine.blocks
    armed = await machine.arm(set())
    assert armed.pagemap_fd is not None
    log = KernelDirtyLog(armed.pagemap_fd, [ArmedRange(armed.addresses[0], block.pages, 0)], block.pages)
    relay = HintRelay(machine.hint_socket, lambda: machine.map)
    relaying = Runner(relay.run())
    ours, theirs = socket.socketpair()
    relay.serve(theirs)
    hints = SocketHints(ours, block.pages, Limits(hint_window_s=WAIT_S))
    try:
        yield Scribbler(machine, log, hints, block.pages)
    finally:
        hints.close()
        await relaying.stop()
        log.close()
        await monitor.close()
        machine.close()


async def live_through(guest: Booted, rounds: int, *, zeros: bool) -> list[Round]:
    """A guest is scribbled over again and again, and has to be right after each time. AssertionError if not.

    In every other round what is free is not for long: it is in use when the blow comes. And what was
    overwritten is used.
    """
    forks, found = 0, []
    async with scribbling(guest.qmp) as scribbler:
        assert await scribbler.contract() is (FreeContract.ZERO if zeros else FreeContract.ANYTHING)
        for number in range(rounds):
            assert await scribbler.listen() > GRAB_PAGES
            if number % 2:
                await ask(guest, "grab", bytes=GRAB_BYTES)
            done = await scribbler.strike(zeros=zeros)
            assert done.scribbled + done.written == done.hinted
            assert (done.written > GRAB_PAGES // 2) == bool(number % 2)
            assert await ask(guest, "release") == {"wrong": False}
            await ask(guest, "hog", bytes=2 * GRAB_BYTES)
            forks = await _right(guest, forks)
            found.append(done)
    return found


async def ask(guest: Booted, do: str, timeout_s: float = WAIT_S, **arguments: object) -> dict[str, Any]:
    """The guest's workload; the relay goes on meanwhile."""
    return await asyncio.to_thread(guest.workload.ask, do, timeout_s, **arguments)


async def _right(guest: Booted, forks: int) -> int:
    """It holds what it held, its children, files and kernel are well, and it goes on; forks so far."""
    checked = await ask(guest, "check")
    assert (checked["pages"], checked["wrong"]) == (2048, 0), checked
    while (status := await ask(guest, "status"))["forks"] <= forks:
        await asyncio.to_thread(time.sleep, 0.1)
    assert {name: status[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0), status
    return int(status["forks"])


def tracked(recipe: Recipe) -> Recipe:
    """The same, with a QEMU whose writes the kernel tracks."""
    variables = preload.environment(recipe.emulator.environment, ["ram"])
    return replace(recipe, emulator=replace(recipe.emulator, environment=variables))


def _overwrite(ram: int, pages: PageBitmap, zeros: bool) -> None:
    """Past QEMU's mapping, so that the log does not take it for the guest's."""
    content = bytes(_NOISE_BYTES) if zeros else os.urandom(_NOISE_BYTES)
    for start, stop in pages.runs():
        at, end = start * PAGE_BYTES, stop * PAGE_BYTES
        while at < end:
            at += os.pwrite(ram, content[: end - at], at)
