"""A whole destination: reception, sessions, streams, hand-over, around all that a source says."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np

from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.destination.session import DestinationServices, DestinationSession
from migd.errors import GuestError, MigdError, Refused
from migd.limits import Limits
from migd.migration.journal import Journal, Mark
from migd.migration.state import DestinationState
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.layout import RamLayout
from migd.transport.in_flight import SharedRoom
from migd.transport.link import Dialogue, FrameLink
from migd.wire import handshake
from tests.fuzz import frames, mutation, tape
from tests.fuzz.clockless import ClocklessLoop
from tests.fuzz.meaning import meaning
from tests.fuzz.played import GivenEntropy, PlayedChannel, SameThread
from tests.fuzz.seeds import recorded
from tests.fuzz.tape import Connection, Tape
from tests.fuzz.target import ACCEPTED, Broken, Outcome, flipped_bits
from tests.support.scripted_guest import ArrivedGuest, Observed

_MOST_PAGES = 1 << 14
_TURNS = 40
"""Of the loop, after which HELLO was answered if it ever will be without more being said."""


class _Guest(ArrivedGuest):
    """Takes any device state, and remembers what RAM held when it did: that is what READY vouches for."""

    def __init__(self, name: str, ram: RamLayout) -> None:
        super().__init__(name, ram)
        self.state: bytes | None = None
        self.image: dict[int, bytes] = {}

    async def load(self, device_state: bytes) -> None:
        self.calls.append("load")
        self.state = device_state
        row = np.empty((1, PAGE_BYTES), np.uint8)
        for run in self.ram.touched().runs():
            for page in range(*run):
                self.image[page] = bytes(self.ram.read(np.array([page]), row))


class _Host:
    """See ``migd.migration.ports.GuestHost``: refuses what does not fit, as the real one does."""

    def __init__(self) -> None:
        self.guests: dict[str, _Guest] = {}

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> _Guest:
        if sum(shape.pages for shape in shapes) > _MOST_PAGES:
            raise Refused("there is no room for so many pages")
        guest = _Guest(name, RamLayout([RamBlock.create(shape) for shape in shapes]))
        self.guests[migration] = guest
        return guest


class Session:
    """HELLO to verdict: READY only for the image, and the device state, that all streams say."""

    name = "session"
    shared = 20

    def __init__(self) -> None:
        self.seeds = recorded("session")
        self._loop = ClocklessLoop()
        self._limits = Limits()
        self._entropy = GivenEntropy()
        self._directory = tempfile.mkdtemp(prefix="migd-fuzz-")
        self._room = SharedRoom(4)
        self._room.open()  # so that buffers are kept from one input to the next

    def mutate(self, data: bytes, chance: Random) -> bytes:
        try:
            found = tape.unpacked(data)
        except ValueError:
            return mutation.mangled(data, b"", chance)
        connections = list(found.connections)
        if not connections or chance.random() < 0.1:
            return replace(found, connections=tuple(mutation.reordered(connections, chance))).packed()
        at = chance.randrange(len(connections))
        connections[at] = self._changed(connections[at], chance)
        return replace(found, connections=tuple(connections[: tape.MAX_CONNECTIONS])).packed()

    def _changed(self, connection: Connection, chance: Random) -> Connection:
        choice = chance.random()
        if choice < 0.25:
            return replace(connection, data=mutation.flipped(connection.data, b"", chance))
        if choice < 0.3:
            return replace(connection, ends=not connection.ends)
        other = chance.choice(tape.unpacked(chance.choice(self.seeds)).connections).data
        data = frames.mutated(connection.data, other, chance)
        return replace(connection, data=frames.settled(data) if chance.random() < 0.5 else data)

    def run(self, data: bytes) -> Outcome:
        try:
            played = tape.unpacked(data)
        except ValueError as error:
            return Outcome(f"no tape: {error}", 0)
        if not played.connections:
            return Outcome("nothing said", 0)
        host = _Host()
        try:
            reception = self._loop.run(self._play(played, host))
            depth = 0
            outcome = Outcome("refused before a session", 0)
            for migration, session in reception.sessions.items():
                self._judge(data, played, session, host.guests.get(migration))
                if len(session.path) > depth:
                    depth, outcome = len(session.path), Outcome(_verdict(session), len(session.path))
            return outcome
        finally:
            for guest in host.guests.values():
                guest.ram.close()
            for left in Path(self._directory).iterdir():
                left.unlink()

    async def _play(self, played: Tape, host: _Host) -> Reception:
        """All connections, each behind the answer to the first."""
        reception = self._reception(played, host)
        async with asyncio.TaskGroup() as tasks:
            for number, connection in enumerate(played.connections):
                tasks.create_task(_serve(reception, connection))
                for _ in range(0 if number else _TURNS):
                    await asyncio.sleep(0)
        return reception

    def _reception(self, played: Tape, host: _Host) -> Reception:
        self._entropy.given = played.token
        services = DestinationServices(
            clock=self._loop,
            worker=SameThread(),
            entropy=self._entropy,
            journal=Journal(Path(self._directory)),
            limits=self._limits,
            guests=host,
            observer=Observed(),
            max_streams=8,
            room=self._room.open,
        )
        return Reception(
            services,
            lambda link, migration: Dialogue(link, migration, self._loop, self._limits),
            _nothing_from_before,
            lambda question: handshake.about(question, realtime_ns=1, free_bytes=1, max_streams=8),
        )

    def _judge(self, data: bytes, played: Tape, session: DestinationSession, guest: _Guest | None) -> None:
        if session.error.startswith("unexpected"):
            raise Broken(f"the session fails with {session.error}")
        if not session.over.is_set() or not session.ended:
            raise Broken(f"the session is left behind in {session.state}")
        ready = DestinationState.READY in session.path
        marks = [record.mark for record in Journal(Path(self._directory)).records(session.migration)]
        if ready != (Mark.READY in marks):
            raise Broken(f"{[*map(str, session.path)]}, and the journal says {[*map(str, marks)]}")
        if guest is None:
            return
        started = "start" in guest.calls
        if started and marks.index(Mark.STARTED) < marks.index(Mark.READY):
            raise Broken("started before it was ready")
        if started == ("discard" in guest.calls):
            raise Broken(f"neither started nor ended, or both: {guest.calls}")
        if ready or started:
            self._vouch(data, played, session.migration, guest, started)

    def _vouch(self, data: bytes, played: Tape, migration: str, guest: _Guest, started: bool) -> None:
        """What became READY is what was said, by somebody else's reading."""
        said = meaning(played, migration)
        if not said.ready:
            raise Broken("READY for what the specification refuses")
        if guest.state != said.state:
            raise Broken("another device state was loaded than the one that was sent")
        if started and not said.go:
            raise Broken("started, and nobody said GO")
        blank = bytes(PAGE_BYTES)
        for page in said.image.keys() | guest.image.keys():
            if guest.image.get(page, blank) not in said.image.get(page, {blank}):
                raise Broken(f"READY, and page {page} is not what was sent")
        if seed := self._flipped(data):
            original = meaning(tape.unpacked(seed), migration)
            if original.image != said.image or original.state != said.state:
                raise Broken("a flipped bit went unnoticed")

    def _flipped(self, data: bytes) -> bytes | None:
        """The recording of which this is a copy with one or two bits flipped."""
        return next((seed for seed in self.seeds if flipped_bits(data, seed)), None)

    def close(self) -> None:
        self._loop.close()
        shutil.rmtree(self._directory)


async def _serve(reception: Reception, connection: Connection) -> None:
    """As ``migd.transport.tcp.Listener`` does."""
    link = FrameLink(PlayedChannel(connection.data, connection.ends))
    try:
        async with asyncio.timeout(5.0):
            frame = await link.receive()
        await reception.serve(link, frame)
    except (TimeoutError, MigdError):
        return
    finally:
        link.close()


async def _nothing_from_before(migration: str) -> HandOver:
    raise GuestError(f"{migration}: nothing was here before")


def _verdict(session: DestinationSession) -> str:
    if DestinationState.READY in session.path:
        return ACCEPTED
    before = session.path[-2] if len(session.path) > 1 else session.path[-1]
    return f"aborted in {before}"
