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

import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from migd.errors import ConfigError, GuestError
from migd.guest import device_state
from migd.guest.allocator import PageAllocator
from migd.guest.content import PYTHON_INSTALLATION, FileContent
from migd.guest.control import Block, Checked, GuestState, Running
from migd.guest.image import ImageJournal, RamImage, short_runs
from migd.guest.machine import Machine
from migd.guest.mapping import RamMapping
from migd.guest.workload import Phase, Workload, WorkloadPlan, WorkloadProgress

if TYPE_CHECKING:
    from migd.ram.dirty_log import WriteProtection

SLICE_S = 0.001
"""How long the workload, or the self-check, goes on before the sockets are looked at again."""


class Guest:
    """A guest; without RAM until ``adopt_ram``."""

    def __init__(self, state: GuestState, migration: str) -> None:
        self.state = state
        self.migration = migration
        """The one it is paused or incoming for, else empty."""
        self.ram: RamMapping | None = None
        self.machine: Machine | None = None
        self.workload: Workload | None = None
        self._image_journal: ImageJournal | None = None
        self._content: FileContent | None = None
        self._stopped_at_ns = 0
        self._resumed_at_ns = 0
        self._protection: WriteProtection | None = None

    # -- memory -------------------------------------------------------------------------------------

    @property
    def blocks(self) -> tuple[Block, ...]:
        """None before it has RAM."""
        return self.ram.blocks if self.ram is not None else ()

    def adopt_ram(self, blocks: Sequence[Block], fds: Sequence[int], *, read_only: bool = False) -> None:
        """Map RAM; ``fds`` are ours if this succeeds. GuestError if it is not of these sizes."""
        self.ram = RamMapping(blocks, fds, read_only=read_only)

    def arm(self) -> tuple[list[int], int]:
        """Log every write to RAM from now on: (address of each block, pagemap descriptor, still ours).

        LiveUnsupported where the kernel cannot; GuestError for a guest that has not started here.
        """
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: there is nothing to track")
        if self._mapping().read_only:
            raise GuestError("the guest cannot write its RAM: there is nothing to track")
        prepare_arming()
        from migd.ram.dirty_log import WriteProtection

        self.disarm()
        places = self._mapping().places()
        self._protection = WriteProtection(places)
        return [address for address, _ in places], self._protection.pagemap_fd

    def disarm(self) -> None:
        """Log writes no more, if they were."""
        if self._protection is not None:
            self._protection.close()
            self._protection = None

    def close(self) -> None:
        """Let RAM go."""
        self.disarm()
        self._use(None)
        if self.ram is not None:
            self.ram.close()
            self.ram = None

    # -- moves --------------------------------------------------------------------------------------

    def begin(self, content: FileContent, plan: WorkloadPlan) -> None:
        """A new guest starts to fill its RAM."""
        self._use(content)
        self.machine = Machine(self._mapping().memory, plan.contract)
        self.workload = Workload(self.machine, content, plan)

    def serve(self, image: RamImage, content: FileContent, plan: WorkloadPlan) -> None:
        """A new guest is what an image holds, all of it in use that is not free; ``image.fd`` is ours now."""
        self._use(content)
        self.adopt_ram([image.block], [image.fd], read_only=True)
        allocator = PageAllocator.from_free_bits(image.free_bits, image.pages)
        self.machine = Machine(self._mapping().memory, plan.contract, allocator)
        self._image_journal = ImageJournal(image.fd, self.machine)
        self.workload = Workload(self.machine, content, plan)
        progress = WorkloadProgress(phase=Phase.STEADY, random=plan.seed)
        self.workload.resume(progress, list(short_runs(allocator.owned_runs())), [])

    def pause(self, migration: str) -> tuple[bytes, bytes]:
        """Stop here, at a safe point: (device state, free bitmap). Nothing writes to RAM from here on."""
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: it cannot be paused")
        machine, workload = self._running_parts()
        if self._image_journal is not None:
            self._image_journal.run(math.inf, time.monotonic)
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
            self.machine, self.workload = state.restore(self._mapping().memory, content)
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

    @property
    def filled(self) -> float:
        """How much of what has to be done before it is ready is done: 0 to 1."""
        if self._image_journal is not None:
            return self._image_journal.fraction
        return self.workload.filled if self.workload is not None else 0.0

    @property
    def ready(self) -> bool:
        """RAM holds what the plan says, or the journal what the image does."""
        if self._image_journal is not None:
            return self._image_journal.complete
        return self.workload is not None and self.workload.ready

    def wait_s(self, now: float) -> float | None:
        """Seconds until there is something to do, on the monotonic clock; None: nothing ever."""
        if self.state is not GuestState.RUNNING or self.machine is None or self.workload is None:
            return None
        if self.machine.check is not None or not self.ready:
            return 0.0
        return self.workload.wait_s(now)

    def work(self) -> Checked | None:
        """A slice of the workload and one of the self-check; the report of a check that ended in it."""
        if self.state is not GuestState.RUNNING or self.machine is None or self.workload is None:
            return None
        now = time.monotonic()
        deadline = now + SLICE_S
        if self._image_journal is not None:
            self._image_journal.run(deadline, time.monotonic)
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

    def _mapping(self) -> RamMapping:
        if self.ram is None:
            raise GuestError("the guest has no RAM yet")
        return self.ram


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
