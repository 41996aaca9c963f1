"""Guest: a machine and its workload in one of three states, and the moves between them.

::

    (new) begin -> RUNNING <-- resume --- PAUSED
                    |  ^ \\---- pause ----->^
                    |  |
    INCOMING -- load, start      (spawned for a migration; has never run here)

A move that the state does not allow raises GuestError and changes nothing; one that was made already is
answered again, since a daemon that comes back may have missed the answer.
"""

from __future__ import annotations

import ctypes
import os
import time
from mmap import mmap
from typing import TYPE_CHECKING

from migd.errors import ConfigError, GuestError
from migd.guest import device_state
from migd.guest.content import PYTHON_INSTALLATION, FileContent
from migd.guest.control import Block, Checked, GuestState, Running
from migd.guest.machine import PAGE_BYTES, Machine
from migd.guest.workload import Workload, WorkloadPlan

if TYPE_CHECKING:
    from migd.ram.dirty_log import WriteProtection

SLICE_S = 0.001
"""How long the workload, or the self-check, goes on before the sockets are looked at again."""


class Guest:
    """A guest of one RAM block; without RAM until ``adopt_ram``."""

    def __init__(self, state: GuestState, migration: str) -> None:
        self.state = state
        self.migration = migration
        """The one it is paused or incoming for, else empty."""
        self.blocks: tuple[Block, ...] = ()
        self.ram_fd = -1
        self.machine: Machine | None = None
        self.workload: Workload | None = None
        self._ram: mmap | None = None
        self._content: FileContent | None = None
        self._stopped_at_ns = 0
        self._resumed_at_ns = 0
        self._protection: WriteProtection | None = None

    # -- memory -------------------------------------------------------------------------------------

    def adopt_ram(self, block: Block, fd: int) -> None:
        """Map RAM that the daemon made; ``fd`` is ours if this succeeds. GuestError if its size is wrong."""
        size = os.fstat(fd).st_size
        if size != block.pages * PAGE_BYTES or not size:
            raise GuestError(f"RAM block {block.name!r}: {block.pages} pages announced, {size} bytes passed")
        try:
            self._ram = mmap(fd, size)
        except OSError as error:
            raise GuestError(f"RAM block {block.name!r} cannot be mapped: {error.strerror}") from error
        self.ram_fd = fd
        self.blocks = (block,)

    def arm(self) -> tuple[int, int]:
        """Log every write to RAM from now on: (address of the mapping, pagemap descriptor, still ours).

        LiveUnsupported where the kernel cannot; GuestError for a guest that has not started here.
        """
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: there is nothing to track")
        prepare_arming()
        from migd.ram.dirty_log import WriteProtection

        self.disarm()
        ram = self._mapped_ram()
        # Released at once: an exported buffer would keep the mapping from being closed.
        address = ctypes.addressof(ctypes.c_char.from_buffer(ram))
        self._protection = WriteProtection([(address, len(ram))])
        return address, self._protection.pagemap_fd

    def disarm(self) -> None:
        """Log writes no more, if they were."""
        if self._protection is not None:
            self._protection.close()
            self._protection = None

    def close(self) -> None:
        """Let RAM go."""
        self.disarm()
        self._use(None)
        if self._ram is not None:
            self._ram.close()
            os.close(self.ram_fd)
            self._ram, self.ram_fd = None, -1

    # -- moves --------------------------------------------------------------------------------------

    def begin(self, content: FileContent, plan: WorkloadPlan) -> None:
        """A new guest starts to fill its RAM."""
        self._use(content)
        self.machine = Machine(self._mapped_ram(), plan.contract)
        self.workload = Workload(self.machine, content, plan)

    def pause(self, migration: str) -> tuple[bytes, bytes]:
        """Stop here, at a safe point: (device state, free bitmap). Nothing writes to RAM from here on."""
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: it cannot be paused")
        machine, workload = self._running_parts()
        if self.state is GuestState.RUNNING:
            self._stopped_at_ns = time.time_ns()
            self.state = GuestState.PAUSED
        self.migration = migration
        return device_state.save(machine, workload, self._stopped_at_ns), machine.allocator.free_bits()

    def resume(self) -> Running:
        """Go on after a pause that led nowhere."""
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: START it")
        if self.state is GuestState.PAUSED:
            self._run()
        return self._last_pause()

    def load(self, blob: bytes) -> None:
        """Take in a device state, to be started later; a second one replaces the first."""
        if self.state is not GuestState.INCOMING:
            raise GuestError(f"a {self.state} guest loads no device state")
        state = device_state.parse(blob)
        content = _content_here(state.plan.fill)
        try:
            self.machine, self.workload = state.restore(self._mapped_ram(), content)
        except GuestError:
            content.close()
            raise
        self._use(content)
        self._stopped_at_ns = state.stopped_at_ns

    def start(self) -> Running:
        """Run for the first time here; every owned page is checked from now on."""
        if self.state is GuestState.PAUSED:
            raise GuestError("a paused guest is resumed, not started")
        machine, _ = self._running_parts()
        if self.state is GuestState.INCOMING:
            self._run()
            machine.begin_check()
        return self._last_pause()

    def _use(self, content: FileContent | None) -> None:
        if self._content is not None:
            self._content.close()
        self._content = content

    def _run(self) -> None:
        self._resumed_at_ns = time.time_ns()
        self.state, self.migration = GuestState.RUNNING, ""

    def _last_pause(self) -> Running:
        return Running(stopped_at_ns=self._stopped_at_ns, resumed_at_ns=self._resumed_at_ns)

    # -- running ------------------------------------------------------------------------------------

    def wait_s(self, now: float) -> float | None:
        """Seconds until there is something to do, on the monotonic clock; None: nothing ever."""
        if self.state is not GuestState.RUNNING or self.machine is None or self.workload is None:
            return None
        return 0.0 if self.machine.check is not None else self.workload.wait_s(now)

    def work(self) -> Checked | None:
        """A slice of the workload and one of the self-check; the report of a check that ended in it."""
        if self.state is not GuestState.RUNNING or self.machine is None or self.workload is None:
            return None
        now = time.monotonic()
        deadline = now + SLICE_S
        while now < deadline and self.workload.wait_s(now) == 0:
            self.workload.step(now)
            now = time.monotonic()
        return self._check(self.machine)

    def _check(self, machine: Machine) -> Checked | None:
        check = machine.check
        if check is None or not check.run(time.monotonic() + SLICE_S, time.monotonic):
            return None
        machine.check = None
        return Checked(pages=check.pages, wrong=machine.wrong_pages, first_wrong=machine.first_wrong)

    def _running_parts(self) -> tuple[Machine, Workload]:
        if self.machine is None or self.workload is None:
            raise GuestError("the guest has no device state yet")
        return self.machine, self.workload

    def _mapped_ram(self) -> mmap:
        if self._ram is None:
            raise GuestError("the guest has no RAM yet")
        return self._ram


def prepare_arming() -> None:
    """Import what arming needs, numpy with it: 70-100 ms during which the workload stands still.

    A guest that arrives does this behind its self-check, when no migration waits for it any more.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # saves 40-100 ms of starting threads
    import migd.ram.dirty_log  # noqa: F401


def _content_here(fill: tuple[str, ...]) -> FileContent:
    """What the guest wrote from at the source, or the Python installation where this host lacks it."""
    try:
        return FileContent(fill)
    except ConfigError:
        return FileContent((PYTHON_INSTALLATION,))
