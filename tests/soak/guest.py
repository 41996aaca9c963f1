"""SoakedGuest: a guest process of the tests' own that writes while it is moved, and can be held to account.

It speaks the control and hint protocols as any guest does. Beside them it has a line to the soak, which has
its RAM and its journal, too, and which it waits for before its first instruction at a destination.
"""

from __future__ import annotations

import os
import random
import select
import socket
import time

import msgspec

from migd.errors import GuestError
from migd.guest import control, hints
from migd.guest.control import GuestState
from migd.guest.mapping import RamMapping
from migd.guest.workload import Pace
from tests.soak import words
from tests.soak.body import Body, DeviceState, blocks, own_ram
from tests.soak.hinting import Question, sayings
from tests.soak.journal import Running
from tests.soak.mouth import HintMouth
from tests.soak.page import PAGE_BYTES
from tests.soak.words import Behaviour, Making

WAIT_S = 30.0
_SLICE_S = 0.001
_IDLE_S = 1.0
_LAST_SMUGGLED = 8
"""Stores of a smuggler right before it stops: those to pages that were sent by then are lost for certain."""


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which guest to be: a new one with its ``making``, or the one that a ``migration`` brings."""

    daemon: str
    """Path of the daemon's guest socket."""
    witness: str
    """Path of the soak's socket."""
    name: str
    migration: str = ""
    making: Making | None = None


class SoakedGuest:
    """One guest process. ``run`` returns when it was told to quit, or nobody is there any more."""

    def __init__(self, assignment: Assignment, lifeline: socket.socket) -> None:
        """``lifeline`` ends when whoever asked for this guest is gone, or was killed in its stead."""
        self._assignment = assignment
        self._lifeline = lifeline
        self._state = GuestState.INCOMING if assignment.migration else GuestState.RUNNING
        self._migration = assignment.migration
        self._behaviour = Behaviour()
        self._pace = Pace(0)
        self._control = control.new_socket()
        self._witness = words.new_socket()
        self._hint_socket: socket.socket | None = None
        self._mouth: HintMouth | None = None
        """From the moment on when there is a contract to declare."""
        self._ram: RamMapping | None = None
        self._body: Body | None = None
        self._stopped_at_ns = self._resumed_at_ns = 0
        self._wrong_pages = 0
        self._halted = False
        self._quits = False

    def run(self) -> None:
        """Attach, and live."""
        self._witness.connect(self._assignment.witness)
        self._control.connect(self._assignment.daemon)
        making = self._assignment.making
        if making is not None:
            self._ram = own_ram(making)
        attach = control.Attach(
            version=control.VERSION,
            name=self._assignment.name,
            pid=os.getpid(),
            state=self._state,
            blocks=blocks(making) if making is not None else (),
            migration=self._migration,
        )
        control.send(self._control, attach, list(self._ram.fds) if self._ram is not None else [])
        while not self._quits:
            self._wait()
            self._work()

    # -- the loop -----------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until something has come, or something is due."""
        readers: list[socket.socket] = [self._control, self._witness, self._lifeline]
        writers: list[socket.socket] = []
        now = time.monotonic()
        wait_s = self._pace.wait_s(now) if self._stores else _IDLE_S
        mouth = self._mouth
        if mouth is not None and mouth.open:
            readers.append(mouth.sock)
            if mouth.wants_to_say(now):
                writers.append(mouth.sock)
            else:
                wait_s = min(wait_s, mouth.wait_s(now))
        readable, writable, _ = select.select(readers, writers, [], wait_s)
        if mouth is not None and mouth.sock in readable:
            self._listen(mouth)
        if mouth is not None and mouth.open and mouth.sock in writable:
            mouth.say(time.monotonic())
        if self._witness in readable:
            self._heed()
        if self._control in readable:
            self._obey_next()
        self._quits |= self._lifeline in readable

    @property
    def _stores(self) -> bool:
        return self._state is GuestState.RUNNING and self._body is not None and not self._halted

    def _work(self) -> None:
        """A slice of about a millisecond; between two slices is a safe point."""
        if not self._stores:
            return
        body = self._alive()
        now = time.monotonic()
        until = now + _SLICE_S
        while now < until and not self._pace.wait_s(now):
            self._pace.spend(body.tenant.step(), now)
            if self._behaviour.smuggles:
                body.smuggle()
            now = time.monotonic()

    def _alive(self) -> Body:
        """GuestError before there is a guest in this process."""
        if self._body is None:
            raise GuestError("the guest has no device state yet")
        return self._body

    def _listen(self, mouth: HintMouth) -> None:
        """R5: what is free is looked at after the request was read."""
        now = time.monotonic()
        for epoch in mouth.requests(now):
            body, behaviour = self._alive(), self._behaviour
            question = Question(epoch, body.journal.free_bits(), body.pages)
            mouth.plan(sayings(behaviour.manner, question, mouth.random), now)
            if behaviour.seize_share and self._stores:
                body.tenant.seize(behaviour.seize_share)

    # -- the soak -----------------------------------------------------------------------------------

    def _heed(self) -> None:
        packet = words.receive(self._witness)
        match packet:
            case None:
                self._quits = True
            case (words.Behave(behaviour), _):
                self._behave(behaviour)
                words.send(self._witness, words.Behaving())
            case (words.Halt(), _):
                self._halted = True
                words.send(self._witness, words.Halted())

    def _behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._pace = Pace(behaviour.rate_bytes_s)
        self._alive().tenant.reuse_share = behaviour.reuse_share

    def _await_comparison(self) -> None:
        """Nothing runs here before somebody else has looked at RAM."""
        words.send(self._witness, words.Starting())
        self._witness.settimeout(WAIT_S)
        packet = words.receive(self._witness)
        if packet is None or not isinstance(packet[0], words.Compared):
            raise GuestError(f"{packet} instead of a comparison")
        self._wrong_pages = packet[0].wrong_pages

    # -- the daemon ---------------------------------------------------------------------------------

    def _obey_next(self) -> None:
        try:
            packet = control.receive_from_daemon(self._control)
        except ConnectionResetError:
            packet = None
        if packet is None:
            self._quits = True
            return
        message, fds = packet
        try:
            self._obey(message, fds)
        except GuestError as error:
            control.send(self._control, control.Failed(id=message.id, reason=str(error)))
        finally:
            control.close_all(fds)

    def _obey(self, message: control.ToGuest, fds: list[int]) -> None:
        """Do it and answer; descriptors left in ``fds`` are closed."""
        match message:
            case control.Attached():
                self._attached(message.blocks, fds)
            case control.Arm():
                addresses, pagemap_fd = self._alive().arm()
                armed = control.Armed(id=message.id, addresses=tuple(addresses))
                control.send(self._control, armed, [pagemap_fd])
            case control.Disarm():
                self._alive().disarm()
                control.send(self._control, control.Done(id=message.id))
            case control.Pause():
                self._pause(message)
            case control.Resume() | control.Start():
                self._go_on(message.id)
            case control.Load():
                self._load(control.blob_bytes(fds[0]))
                control.send(self._control, control.Done(id=message.id))
            case control.Quit() | control.Declined():
                self._quits = True

    def _attached(self, given: tuple[control.Block, ...], fds: list[int]) -> None:
        """RAM, unless it was brought, and a hint socket; a new guest fills its RAM now."""
        if self._ram is None:
            self._ram = RamMapping(given, fds[: len(given)])
            del fds[: len(given)]
        self._hint_socket = socket.socket(fileno=fds.pop(0))
        making = self._assignment.making
        if making is not None:
            self._body = Body(making, self._ram)
            self._body.tenant.populate(hog=making.hog)
            self._body.journal.state = Running.YES
            self._introduce(self._body)

    def _load(self, blob: bytes) -> None:
        """The guest that was moved here is in this process from now on; it does not run yet."""
        if self._body is not None or self._ram is None:
            raise GuestError("a device state for a guest that has one, or no RAM")
        state = msgspec.msgpack.decode(blob, type=DeviceState)
        self._stopped_at_ns = state.stopped_at_ns
        self._body = Body(state.making, self._ram, state.journal)
        self._behave(state.behaviour)
        self._introduce(self._body)

    def _introduce(self, body: Body) -> None:
        """To the soak, and to a daemon that asks for hints."""
        making = body.making
        here = words.Here(self._assignment.name, os.getpid(), self._migration, making.block_pages)
        words.send(self._witness, here, (body.journal_fd, *body.ram.fds))
        hello = hints.Hello(making.contract, hints.Strength.STRONG, PAGE_BYTES, body.pages)
        assert self._hint_socket is not None
        self._mouth = HintMouth(self._hint_socket, hello, random.Random(making.seed ^ os.getpid()))

    def _pause(self, message: control.Pause) -> None:
        """Nothing is stored from here on. The soak hears of it before the daemon does."""
        body = self._alive()
        if self._state is GuestState.RUNNING:
            for _ in range(_LAST_SMUGGLED if self._behaviour.smuggles else 0):
                body.smuggle()
            self._stopped_at_ns = time.time_ns()
            self._state, body.journal.state = GuestState.PAUSED, Running.PAUSED
        self._migration = message.migration
        words.send(self._witness, words.Stopped())
        state = DeviceState(
            making=body.making,
            behaviour=self._behaviour,
            journal=body.journal.save(),
            stopped_at_ns=self._stopped_at_ns,
        )
        free_bits = body.all_free() if self._behaviour.lies_at_pause else body.journal.free_bits()
        fds = [control.blob_fd(msgspec.msgpack.encode(state)), control.blob_fd(free_bits)]
        try:
            control.send(self._control, control.Paused(id=message.id), fds)
        finally:
            control.close_all(fds)

    def _go_on(self, request: int) -> None:
        """After a pause that led nowhere, or for the first time here; again, it is only answered again."""
        body = self._alive()
        arrived = self._state is GuestState.INCOMING
        if arrived:
            self._await_comparison()
        if self._state is not GuestState.RUNNING:
            self._resumed_at_ns = time.time_ns()
            self._state, self._migration, body.journal.state = GuestState.RUNNING, "", Running.YES
        times = control.Running(
            id=request, stopped_at_ns=self._stopped_at_ns, resumed_at_ns=self._resumed_at_ns
        )
        control.send(self._control, times)
        if arrived:
            owned = int(body.journal.owned.sum())
            control.send(self._control, control.Checked(pages=owned, wrong=self._wrong_pages))
