"""Host: a machine with a disk, guest processes, and at most one daemon at a time; in migd's own composition.

``Daemon`` puts together what ``migd.daemon.daemon`` puts together for `migd serve`, with simulated ports.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from migd.config import Config
from migd.control.commands import Accepted, Migrate
from migd.daemon.departures import Departures
from migd.daemon.resolving import Resolving
from migd.daemon.returns import Returns
from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.destination.session import DestinationServices
from migd.errors import MigdError
from migd.guest.hosted import HostedGuest
from migd.migration.in_flight import frames_in_flight
from migd.migration.journal import Mark
from migd.migration.ports import Bandwidth, Link, Observer
from migd.migration.state import SourceState
from migd.source.attempt import SourceServices
from migd.transport.bandwidth import SharedBandwidth
from migd.transport.in_flight import SharedRoom
from migd.transport.link import Dialogue, FrameLink
from migd.wire import handshake
from migd.wire.framing import Frame
from migd.wire.messages import About, Probe
from migd.wire.protocol import Keeper
from tests.simulation.guest import GuestProcess, Temper, Watch
from tests.simulation.life import DiceEntropy, LaterWorker, Life, VirtualClock, WatchedJournal
from tests.simulation.network import CableConnector, MemoryChannel, Network
from tests.simulation.registry import Registry
from tests.simulation.sockets import MemorySocket


class Events(Watch, Protocol):
    """Is told everything that happens anywhere."""

    def at_journal(self, host: Host, life: Life, when: str, mark: Mark) -> str:
        """A record is about to be appended, or has been; see ``tests.simulation.life.Moment``."""

    def observer(self, host: Host, life: Life) -> Observer: ...


class Daemon:
    """One life of a daemon in both roles. ``run`` until ``stop``, or until it is killed."""

    def __init__(
        self, host: Host, life: Life, network: Network, events: Events, config: Config, dice: random.Random
    ) -> None:
        self._host = host
        self._life = life
        self._network = network
        self._config = config
        self._limits = limits = config.limits
        self._stopping = asyncio.Event()
        self._callers: asyncio.Queue[MemoryChannel] = asyncio.Queue()
        self._clock = clock = VirtualClock(life)
        worker = LaterWorker(life, dice)
        entropy = DiceEntropy(dice)
        observer = events.observer(host, life)

        def moment(when: str, mark: Mark) -> str:
            return events.at_journal(host, life, when, mark)

        departed = WatchedJournal(host.disk / "source", life, moment)
        arrived = WatchedJournal(host.disk / "destination", life, moment)
        self.guests = Registry(
            life, limits, dice, host.spawn, self._returned, lambda what: events.said(host.name, what)
        )
        frames = frames_in_flight(directions=2)
        leaving = SourceServices(clock, worker, departed, limits, observer, entropy, SharedRoom(frames).open)
        guests: Any = self.guests
        self.departures = Departures(config, guests, leaving, self._connector)
        self.returns = Returns(guests, self.departures, departed, arrived, worker, limits, observer)
        destination = DestinationServices(
            clock=clock,
            worker=worker,
            entropy=entropy,
            journal=arrived,
            limits=limits,
            guests=self.guests,
            observer=observer,
            max_streams=config.destination.max_streams,
            room=SharedRoom(frames).open,
            bandwidth=SharedBandwidth(config.destination.max_bandwidth, clock).open,
        )
        self.reception = Reception(destination, self._converse, self._revive, self._about)
        self._resolving = Resolving(self.departures, self.returns, self.reception, arrived)
        network.listen(host.address, life, self._callers.put_nowait)

    async def _returned(self, guest: HostedGuest) -> None:
        await self.returns.receive(guest)

    async def _revive(self, migration: str) -> HandOver:
        return await self.returns.revive(migration)

    def _about(self, question: Probe) -> About:
        return handshake.about(question, 1, self.guests.free_bytes(), self._config.destination.max_streams)

    def _connector(self, address: str, bandwidth: Bandwidth | None) -> CableConnector:
        return CableConnector(self._network, address, self._life, self._clock, self._limits, bandwidth)

    def _converse(self, link: Link, migration: str) -> Dialogue:
        return Dialogue(link, migration, self._clock, self._limits)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            self.departures.own(tasks)
            running = [tasks.create_task(self.guests.run()), tasks.create_task(self._listen())]
            await self._stopping.wait()
            await self.departures.end()
            for arriving in list(self.reception.sessions.values()):
                await arriving.stop()
            for task in running:
                task.cancel()

    def stop(self) -> None:
        """SIGTERM."""
        self._stopping.set()

    # -- connections, as ``migd.transport.tcp.Listener`` has them ------------------------------------

    async def _listen(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                channel = await self._callers.get()
                tasks.create_task(self._greet(FrameLink(channel)))

    async def _greet(self, link: FrameLink) -> None:
        try:
            frame = await self._first_frame(link)
            if frame is not None:
                await self.reception.serve(link, frame)
        finally:
            link.close()

    async def _first_frame(self, link: FrameLink) -> Frame | None:
        try:
            async with asyncio.timeout(self._limits.hello_s):
                return await link.receive()
        except (TimeoutError, MigdError):
            return None

    # -- commands -------------------------------------------------------------------------------------

    async def migrate(self, request: Migrate) -> str:
        """The id of a migration that has begun. MigdError as the operator would read it."""
        async for reply in self.departures.migrate(request):
            if isinstance(reply, Accepted):
                return reply.migration
        raise MigdError("nothing was accepted")

    async def resolve(self, target: str, keeper: Keeper | None = None) -> str:
        """`migd resolve`, with ``keeper`` forced."""
        said = ""
        async for reply in self._resolving.resolve(target, keeper):
            said = type(reply).__name__
        return said

    @property
    def idle(self) -> bool:
        """No session of either role acts any more."""
        arriving = all(session.over.is_set() for session in self.reception.sessions.values())
        leaving = (
            session.ended or session.state is SourceState.UNKNOWN
            for session in self.departures.sessions.values()
        )
        return arriving and all(leaving)


class Host:
    """See ``tests.simulation.guest.Place``."""

    def __init__(
        self,
        name: str,
        disk: Path,
        network: Network,
        events: Events,
        config: Config,
        dice: random.Random,
        tempers: dict[str, Temper],
    ) -> None:
        self.name = name
        self.disk = disk
        self.address = f"{name}:7440"
        self.config = config
        self.processes: list[GuestProcess] = []
        self.daemon: Daemon | None = None
        self.life: Life | None = None
        self.lives: list[Life] = []
        self._network = network
        self._events = events
        self._dice = dice
        self._tempers = tempers
        self._running: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        return self.life is not None and self.life.alive

    def boot(self) -> None:
        """Start a daemon, if there is none."""
        if self.up:
            return
        self._events.said(self.name, "the daemon starts")
        self.life = Life(f"daemon {len(self.lives) + 1} of {self.name}")
        self.lives.append(self.life)
        self._running = self.life.spawn(self._serve(self.life))

    async def _serve(self, life: Life) -> None:
        self.daemon = Daemon(
            self, life, self._network, self._events, self.config, random.Random(self._dice.random())
        )
        await self.daemon.run()
        life.exit()

    def kill(self) -> None:
        """kill -9 of the daemon."""
        if self.life is not None and self.life.alive:
            self._events.said(self.name, "the daemon is KILLED")
            self.life.kill()
            self.daemon = None

    async def stop(self) -> None:
        """SIGTERM, and wait for its end."""
        if self.daemon is not None and self._running is not None and self.up:
            self._events.said(self.name, "the daemon is told to end")
            self.daemon.stop()
            await asyncio.wait({self._running})
            self.daemon = None

    async def command(self, work: Callable[[Daemon], Any]) -> str:
        """What the operator is told: the answer, or the error."""
        life, daemon = self.life, self.daemon
        if life is None or not life.alive or daemon is None:
            return "no daemon"
        task = life.spawn(work(daemon))
        await asyncio.wait({task})
        if task.cancelled():
            return "killed"
        error = task.exception()
        if error is not None and not isinstance(error, MigdError):
            return "killed" if not life.alive else f"BUG: {error!r}"
        return str(error) if error is not None else str(task.result())

    # -- guests -----------------------------------------------------------------------------------------

    def admit(self, process: GuestProcess) -> MemorySocket | None:
        return self.daemon.guests.knock(process) if self.up and self.daemon is not None else None

    def spawn(self, name: str, migration: str) -> GuestProcess:
        process = GuestProcess(
            self._tempers[name], self, self._events, random.Random(self._dice.random()), migration=migration
        )
        self.processes.append(process)
        return process

    def new_guest(self, name: str) -> GuestProcess:
        return self.spawn(name, "")
