"""Daemon: the composition root. Builds one role, or both, from a Config, runs it, ends it in order."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any

import uvloop

from migd import __version__
from migd.config import Config
from migd.control import commands
from migd.control.commands import Reply, Request, StatusReport
from migd.control.server import ControlServer
from migd.daemon import status
from migd.daemon.adjustments import Adjustments
from migd.daemon.chronicle import Chronicle, Gate, open_gate
from migd.daemon.departures import Departures
from migd.daemon.event_log import EventLog
from migd.daemon.following import Following
from migd.daemon.history import History
from migd.daemon.resolving import Resolving
from migd.daemon.returns import Returns
from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.destination.session import DestinationServices
from migd.errors import Refused
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.host import MonotonicClock, RuntimeDir, SystemEntropy, ThreadWorker
from migd.migration.in_flight import frames_in_flight
from migd.migration.journal import Journal
from migd.migration.ports import Bandwidth, Link
from migd.ram.provider import provider
from migd.source.attempt import DirtyLogChoice, SourceServices
from migd.transport.bandwidth import SharedBandwidth
from migd.transport.in_flight import SharedRoom
from migd.transport.link import Dialogue
from migd.transport.tcp import Listener, TcpConnector, refuse_open_listener
from migd.wire import handshake
from migd.wire.framing import Frame
from migd.wire.messages import About, Probe

_SWITCH_INTERVAL_S = 0.0005
"""Instead of 5 ms: how long a worker's bytecode may keep the event loop from the interpreter lock."""


_QUIET_S = 10.0
"""How long a follower of events hears nothing: it must learn that we are there, and we that it is gone."""


class Role(StrEnum):
    """What a daemon process does; the value is the command that starts it."""

    SOURCE = "source"
    DESTINATION = "destination"
    SERVE = "serve"
    """Both: what arrived here may leave again."""

    @property
    def listens(self) -> bool:
        """For guests of other hosts."""
        return self is not Role.SOURCE

    @property
    def sends(self) -> bool:
        """Guests away."""
        return self is not Role.DESTINATION


class Daemon:
    """One daemon process. ``run`` once, within the event loop; it returns after SIGTERM or SIGINT."""

    def __init__(self, role: Role, config: Config, runtime_dir: Path, *, gate: Gate = open_gate) -> None:
        self.role = role
        self.config = config
        self.runtime_dir = runtime_dir
        self._gate = gate
        self._events = EventLog(role)
        self._clock = MonotonicClock()
        self._stopping = asyncio.Event()
        self._listener: Listener | None = None

    async def run(self, ready: Callable[[str], None] = lambda _line: None) -> None:
        """Serve until told to stop. ``ready`` is called with one line once every socket listens."""
        with RuntimeDir(self.runtime_dir):
            self._build()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
            try:
                await self._serve(ready)
            finally:
                self._worker.close()

    def _build(self) -> None:
        config, limits = self.config, self.config.limits
        ram = provider(config.daemon.ram)
        if self.role.listens:
            # First, since it is the likeliest to fail: nothing is left behind then.
            place = config.destination
            refuse_open_listener(place.listen, insecure_plaintext=place.insecure_plaintext)
            self._listener = Listener(place.listen, self._receive, limits)
        self._worker = ThreadWorker(config.daemon.workers)
        history = History(self.runtime_dir / "history.jsonl")
        observer = Chronicle(self._events, history, self._worker, self._gate)
        departed = Journal(self.runtime_dir / "journal" / "source")
        arrived = Journal(self.runtime_dir / "journal" / "destination")
        self._guests = GuestRegistry(
            self.runtime_dir / "guest.sock",
            self.runtime_dir,
            config.destination.guest_command,
            limits,
            self._returned,
            observer,
            ram=ram,
        )
        self._control = ControlServer(self.runtime_dir / "control.sock", self._handle)
        entropy = SystemEntropy()
        frames = frames_in_flight(directions=2 if self.role is Role.SERVE else 1)
        leaving = SourceServices(
            self._clock, self._worker, departed, limits, observer, entropy, SharedRoom(frames).open
        )
        self._departures = Departures(config, self._guests, leaving, self._connector)
        self._returns = Returns(
            self._guests, self._departures, departed, arrived, self._worker, limits, observer
        )
        self._incoming = SharedBandwidth(config.destination.max_bandwidth, self._clock)
        self._adjustments = Adjustments(
            self._departures, self._incoming, sends=self.role.sends, listens=self.role.listens
        )
        arriving = DestinationServices(
            clock=self._clock,
            worker=self._worker,
            entropy=entropy,
            journal=arrived,
            limits=limits,
            guests=self._guests,
            observer=observer,
            max_streams=config.destination.max_streams,
            room=SharedRoom(frames).open,
            bandwidth=self._incoming.open,
        )
        self._reception = Reception(arriving, self._converse, self._revive, self._about)
        self._following = Following(self._departures, self._reception, history, self._worker)
        self._resolving = Resolving(self._departures, self._returns, self._reception, arrived)
        if self.role.listens:
            self._guests.expect_guests()

    async def _receive(self, link: Link, frame: Frame) -> None:
        await self._reception.serve(link, frame)

    async def _returned(self, guest: HostedGuest) -> None:
        await self._returns.receive(guest)

    async def _revive(self, migration: str) -> HandOver:
        return await self._returns.revive(migration)

    def _about(self, question: Probe) -> About:
        free_bytes, max_streams = self._guests.free_bytes(), self.config.destination.max_streams
        return handshake.about(question, time.time_ns(), free_bytes, max_streams)

    def _connector(self, address: str, bandwidth: Bandwidth | None) -> TcpConnector:
        insecure = self.config.migration.insecure_plaintext
        return TcpConnector(
            address, self._clock, self.config.limits, insecure_plaintext=insecure, bandwidth=bandwidth
        )

    def _converse(self, link: Link, migration: str) -> Dialogue:
        return Dialogue(link, migration, self._clock, self.config.limits)

    async def _serve(self, ready: Callable[[str], None]) -> None:
        """Servers run until the stop signal; then migrations end first, servers after them."""
        async with asyncio.TaskGroup() as tasks:
            self._departures.own(tasks)
            servers: list[Coroutine[Any, Any, None]] = [self._guests.run(), self._control.run()]
            if self._listener is not None:
                servers.append(self._listener.run())
            running = [tasks.create_task(server) for server in servers]
            listening = f", listening on {self._listener.address}" if self._listener else ""
            ready(f"migd {self.role}: ready in {self.runtime_dir}{listening}")
            await self._stopping.wait()
            await self._end_migrations()
            for task in running:
                task.cancel()

    async def _end_migrations(self) -> None:
        await self._departures.end()
        for arriving in list(self._reception.sessions.values()):
            await arriving.stop()

    # -- commands -----------------------------------------------------------------------------------

    async def _handle(self, request: Request) -> AsyncIterator[Reply]:
        match request:
            case commands.Migrate() if not self.role.sends:
                raise Refused(
                    f"the {self.role} daemon in {self.runtime_dir} only takes guests in: to let them "
                    f"move on, run it as `migd serve`"
                )
            case commands.Migrate():
                async for reply in self._departures.migrate(request):
                    yield reply
            case commands.Status():
                yield self._status()
            case commands.Cancel(target=target):
                migration = self._departures.cancel(target)
                yield commands.Done(text=f"cancelling {migration}", migration=migration)
            case commands.SetBandwidth():
                yield commands.Done(text=self._adjustments.bandwidth(request))
            case commands.SetPolicy():
                yield commands.Done(text=self._adjustments.policy(request))
            case commands.Resolve(target=target, keeper=keeper):
                async for reply in self._resolving.resolve(target, keeper):
                    yield reply
            case commands.Attach(target=target):
                async for reply in self._following.attach(target):
                    yield reply
            case commands.Past():
                for entry in await self._following.past(request):
                    yield entry
            case commands.Events(since=since, follow=False):
                for event in self._events.since(since):
                    yield event
            case commands.Events(since=since):
                async for batch in self._events.follow(since, _QUIET_S):
                    for event in batch:
                        yield event
                    if not batch:
                        yield commands.Quiet()

    def _status(self) -> StatusReport:
        choice = DirtyLogChoice(self.config.migration.dirty_log)
        tracking = status.write_tracking(choice)
        return StatusReport(
            role=self.role,
            version=__version__,
            pid=os.getpid(),
            runtime_dir=str(self.runtime_dir),
            listen=self._listener.address if self._listener else "",
            write_tracking=tracking,
            max_outgoing_bytes_s=self._departures.bandwidth.limit_bytes_s,
            max_incoming_bytes_s=self._incoming.limit_bytes_s,
            limits=self.config.limits,
            guests=[status.of_guest(guest, choice, tracking) for guest in self._guests.guests.values()],
            migrations=[
                *(
                    status.of_departure(session, self._departures.limit_of(session.migration))
                    for session in self._departures.sessions.values()
                ),
                *(status.of_arrival(session) for session in self._reception.sessions.values()),
            ],
        )


def run_daemon(role: Role, config: Config, runtime_dir: Path, ready: Callable[[str], None]) -> None:
    """Run a daemon on the configured event loop until it is told to stop. Raises MigdError if it cannot."""
    factory = uvloop.new_event_loop if config.daemon.event_loop == "uvloop" else asyncio.new_event_loop
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.freeze()  # what was imported is no garbage: a full collection takes 12 ms with it, perhaps in a pause
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_run(role, config, runtime_dir, ready))


async def _run(role: Role, config: Config, runtime_dir: Path, ready: Callable[[str], None]) -> None:
    await Daemon(role, config, runtime_dir).run(ready)
