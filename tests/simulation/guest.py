"""GuestProcess: a guest as a process of its own, which outlives its daemon and finds the next one.

It speaks migd's control protocol packet by packet; the states are those of ``migd.guest.guest``.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from migd.errors import GuestError
from migd.guest import control
from migd.guest.control import GuestState
from migd.guest.stub import ORPHAN_S
from migd.ram.block import BlockShape, RamBlock
from tests.simulation.hints import HintAnswers, Manners
from tests.simulation.memory import Image, Memory
from tests.simulation.sockets import MemorySocket

_RETRY_S = 0.4


class Place(Protocol):
    """The host a process lives on."""

    name: str

    def admit(self, process: GuestProcess) -> MemorySocket | None:
        """A connection to the daemon here, if there is one."""


class Watch(Protocol):
    """Is told what guests do, and keeps what crosses from one to the other."""

    def said(self, who: str, what: str) -> None: ...
    def spawned(self, process: GuestProcess) -> None: ...
    def paused(self, process: GuestProcess, image: Image) -> None: ...
    def runs(self, process: GuestProcess, image: Image | None) -> None:
        """Right now; from this image, or on from where it was paused."""

    def ended(self, process: GuestProcess) -> None: ...
    def wrong(self, what: str) -> None: ...
    def ship(self, image: Image) -> bytes:
        """A device state that stands for it."""

    def unship(self, state: bytes) -> Image | None: ...


@dataclass(frozen=True)
class Temper:
    """What a guest is like, wherever it runs."""

    name: str
    block_pages: tuple[int, ...] = (32,)
    steps_s: float = 1000.0
    """How often it does something, on average."""
    steps: int = 150
    """How often altogether: what it writes for ever is never sent."""
    writes_when_started: int = 10
    hints: Manners = field(default_factory=Manners)
    slow_answers: float = 0.0
    """How often it takes longer to obey than anybody waits."""
    can_arm: bool = True
    smuggles: bool = False
    """Sometimes it writes where no log sees it."""
    checks: bool = True


class GuestProcess:
    """``state`` as the guest has it. ``kill`` ends it at once, ``stop`` and ``go_on`` are signals, too."""

    def __init__(
        self,
        temper: Temper,
        place: Place,
        watch: Watch,
        dice: random.Random,
        *,
        migration: str = "",
    ) -> None:
        """A new guest that runs, with RAM of its own; or, for a ``migration``, one that waits for RAM."""
        self.temper = temper
        self.name = temper.name
        self.place = place
        self.migration = migration
        self.arrived_by = migration
        self.state = GuestState.INCOMING if migration else GuestState.RUNNING
        self.memory: Memory | None = None
        self.image: Image | None = None
        """What it was loaded with, or how it was paused."""
        self.alive = True
        self.ended = asyncio.Event()
        self._stopped = False
        self._watch = watch
        self._dice = dice
        self._loop = asyncio.get_running_loop()
        self._control: MemorySocket | None = None
        self._hints: HintAnswers | None = None
        self._orders: deque[tuple[control.ToGuest, list[int], list[Any]]] = deque()
        self._busy = False
        self._steps_left = temper.steps
        self._lost_at: float | None = None
        """Since when no daemon has taken it."""
        self._times = (0, 0)
        watch.spawned(self)
        if not migration:
            self._begin()
        self._connect()

    def _begin(self) -> None:
        shapes = [BlockShape(f"ram{number}", pages) for number, pages in enumerate(self.temper.block_pages)]
        fds = [RamBlock.create(shape).fd for shape in shapes]
        self.memory = Memory(fds, self.temper.block_pages, self._dice)
        self._watch.runs(self, None)
        self._plan_step()

    @property
    def running(self) -> bool:
        return self.alive and self.state is GuestState.RUNNING

    # -- what can be done to a process ---------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.ended.set()
        self._drop()
        if self.memory is not None:
            self.memory.close()
        self._watch.ended(self)

    def stop(self) -> None:
        """SIGSTOP."""
        self._stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        self._stopped = False
        self._obey_later()

    # -- its own work ---------------------------------------------------------------------------------

    def _plan_step(self) -> None:
        if self.running and self._steps_left > 0:
            self._loop.call_later(self._dice.expovariate(self.temper.steps_s), self._step_on)

    def _step_on(self) -> None:
        self.step()
        self._plan_step()

    def step(self) -> None:
        """Do one thing, if it runs and has something to do."""
        memory = self.memory
        if not self.running or self._stopped or self._steps_left <= 0 or memory is None:
            return
        self._steps_left -= 1
        draw, free = self._dice.random(), memory.free
        if free and (draw < 0.2 or not memory.owned):
            complaint = memory.take(self._dice.choice(free))
            if complaint:
                self._watch.wrong(f"guest {self.name} at {self.place.name}: {complaint}")
            return
        if not memory.owned:
            return
        page = self._dice.choice(list(memory.owned))
        if draw < 0.4:
            memory.give_up(page)
        elif draw < 0.75:
            memory.write(page)
        elif draw < 0.85:
            memory.scribble(page)
        elif draw < 0.9:
            memory.touch(page)
        elif draw < 0.95 or not self.temper.smuggles:
            memory.clear(page)
        else:
            memory.smuggle(page)

    # -- its daemon -----------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Again and again, until there is a daemon; one that never ran gives up in the end."""
        if not self.alive or self._control is not None:
            return
        lost_s = 0.0 if self._lost_at is None else self._loop.time() - self._lost_at
        if self.state is GuestState.INCOMING and lost_s > ORPHAN_S:
            self.kill()
            return
        sock = None if self._stopped else self.place.admit(self)
        if sock is None:
            self._loop.call_later(_RETRY_S, self._connect)
            return
        memory = self.memory
        blocks = () if memory is None else memory.block_pages
        hello = control.Attach(
            version=control.VERSION,
            name=self.name,
            pid=1,
            state=self.state,
            migration=self.migration,
            blocks=tuple(control.Block(f"ram{number}", pages) for number, pages in enumerate(blocks)),
        )
        self._control = sock
        sock.watch(self._readable)
        self._send(hello, [] if memory is None else memory.fds)

    def _send(self, message: control.FromGuest, fds: list[int] | None = None) -> None:
        if self._control is None:
            return
        try:
            control.send(self._control, message, fds)  # type: ignore[arg-type]  # all of a socket it needs
        except OSError:
            self._lose()

    def _readable(self) -> None:
        if self._control is None:
            return
        try:
            packet = control.receive_from_daemon(self._control)  # type: ignore[arg-type]
        except BlockingIOError:
            return
        if packet is None:
            self._lose()
            return
        self._orders.append((*packet, self._control.attached()))
        self._obey_later()

    def _drop(self) -> None:
        """Whatever is open towards the daemon."""
        for _, fds, _ in self._orders:
            control.close_all(fds)
        self._orders.clear()
        if self._hints is not None:
            self._hints.close()
            self._hints = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def _lose(self) -> None:
        """The daemon is gone: the guest goes on as it is, and nobody logs its writes."""
        self._drop()
        if self.memory is not None:
            self.memory.log = None
        if self._lost_at is None:
            self._lost_at = self._loop.time()
        self._loop.call_later(_RETRY_S, self._connect)

    # -- what the daemon asks ---------------------------------------------------------------------------

    def _obey_later(self) -> None:
        if self._busy or self._stopped or not self._orders:
            return
        self._busy = True
        slow = self._dice.random() < self.temper.slow_answers
        delay = self._dice.uniform(1.5, 4.0) if slow else self._dice.random() ** 4 * 5e-3
        self._loop.call_later(delay, self._obey_next)

    def _obey_next(self) -> None:
        self._busy = False
        if self._stopped or not self._orders or not self.alive:
            return
        message, fds, things = self._orders.popleft()
        try:
            self._obey(message, fds, things)
        except GuestError as error:
            self._send(control.Failed(id=message.id, reason=str(error)))
        finally:
            control.close_all(fds)
        self._obey_later()

    def _obey(self, message: control.ToGuest, fds: list[int], things: list[Any]) -> None:
        self._watch.said(f"guest {self.name} at {self.place.name}", type(message).__name__.upper())
        if not self.alive:  # just now
            return
        match message:
            case control.Attached(blocks=blocks):
                self._attached(blocks, fds, things)
            case control.Arm():
                self._arm(message)
            case control.Disarm():
                self._ram().log = None
                self._send(control.Done(id=message.id))
            case control.Pause(migration=migration):
                self._pause(message.id, migration)
            case control.Resume():
                self._resume(message.id)
            case control.Load():
                self._load(fds)
                self._send(control.Done(id=message.id))
            case control.Start():
                self._start(message.id)
            case control.Quit():
                self.kill()
            case control.Declined() if self.memory is None:
                self.kill()
            case control.Declined():
                self._lose()

    def _ram(self) -> Memory:
        if self.memory is None:
            raise GuestError("the guest has no RAM yet")
        return self.memory

    def _attached(self, blocks: tuple[control.Block, ...], fds: list[int], things: list[Any]) -> None:
        if self.memory is None:
            self.memory = Memory([os.dup(fd) for fd in fds], [block.pages for block in blocks], self._dice)
        self._lost_at = None
        if self._hints is not None:
            self._hints.close()
        self._hints = HintAnswers(
            things[0], self.memory, self.temper.hints, self._dice, lambda: self.running and not self._stopped
        )

    def _arm(self, message: control.Arm) -> None:
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: there is nothing to track")
        if not self.temper.can_arm:
            raise GuestError("the kernel cannot track writes")
        self._ram().log = set()
        self._send(control.Armed(id=message.id, addresses=()))

    def _pause(self, request: int, migration: str) -> None:
        memory = self._ram()
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: it cannot be paused")
        if self.state is GuestState.RUNNING:
            self.state = GuestState.PAUSED
            self.image = memory.image()
            self._times = (self._now_ns(), 0)
            self._watch.paused(self, self.image)
        self.migration = migration
        assert self.image is not None
        fds = [control.blob_fd(self._watch.ship(self.image)), control.blob_fd(memory.free_bitmap)]
        self._send(control.Paused(id=request), fds)
        control.close_all(fds)

    def _resume(self, request: int) -> None:
        if self.state is GuestState.INCOMING:
            raise GuestError("the guest has not started here: START it")
        if self.state is GuestState.PAUSED:
            self._run(None)
        self._answer_running(request)

    def _load(self, fds: list[int]) -> None:
        if self.state is not GuestState.INCOMING:
            raise GuestError(f"a {self.state} guest loads no device state")
        image = self._watch.unship(control.blob_bytes(fds[0]))
        if image is None:
            raise GuestError("this is no device state")
        self.image = image
        self._ram().restore(image)

    def _start(self, request: int) -> None:
        if self.state is GuestState.PAUSED:
            raise GuestError("a paused guest is resumed, not started")
        if self.image is None:
            raise GuestError("the guest has no device state yet")
        if self.state is GuestState.INCOMING:
            self._run(self.image)
            if self.temper.checks:
                self._loop.call_later(self._dice.random(), self._check)
        self._answer_running(request)

    def _run(self, image: Image | None) -> None:
        self.state, self.migration = GuestState.RUNNING, ""
        self._times = (self._times[0], self._now_ns())
        self._steps_left = max(self._steps_left, self.temper.writes_when_started)
        self._watch.runs(self, image)
        self._plan_step()

    def _answer_running(self, request: int) -> None:
        stopped, resumed = self._times
        self._send(control.Running(id=request, stopped_at_ns=stopped, resumed_at_ns=resumed))

    def _check(self) -> None:
        if self.running and self.memory is not None:
            wrong = self.memory.wrong_pages()
            self._send(control.Checked(pages=len(self.memory.owned), wrong=len(wrong)))

    def _now_ns(self) -> int:
        return int(self._loop.time() * 1e9)
