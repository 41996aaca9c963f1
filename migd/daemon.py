"""Daemon: the composition root. Builds one role, or both, from a Config, runs it, ends it in order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Any

import uvloop

from migd import __version__
from migd.config import Config, DestinationConfig
from migd.control import commands
from migd.control.commands import GuestStatus, MigrationStatus, Reply, Request, StatusReport
from migd.control.server import ControlServer
from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.destination.session import DestinationServices
from migd.errors import ConfigError, GuestError, MigdError, Refused
from migd.guest.control import GuestState
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.host import MonotonicClock, RuntimeDir, SystemEntropy, ThreadWorker
from migd.migration.convergence import Exhausted, Policy
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Link, Observer
from migd.migration.state import DESTINATION_TRANSITIONS, DestinationState, Progress, SourceState
from migd.migration.stats import Result
from migd.ram import linux
from migd.source.attempt import Attempt, Compression, SourceOptions, SourceServices, Verify
from migd.source.peer import DestinationPeer
from migd.source.resolution import Resolution
from migd.source.session import SourceSession
from migd.transport.link import Dialogue
from migd.transport.tcp import Listener, TcpConnector, parse_address
from migd.wire.framing import Frame

log = logging.getLogger(__name__)

_POLL_S = 0.05
"""How often a waiting `migd migrate` hears of progress."""

_REMEMBERED = 64
"""Migrations that are over and still shown in `migd status`."""

_SWITCH_INTERVAL_S = 0.0005
"""Instead of 5 ms: how long a worker's bytecode may keep the event loop from the interpreter lock."""


class Role(StrEnum):
    """What a daemon process does; the seams allow both in one."""

    SOURCE = "source"
    DESTINATION = "destination"


async def _unobserved(_state: str) -> None:
    """The observer of a daemon that nobody looks into."""


class Daemon:
    """One daemon process. ``run`` once, within the event loop; it returns after SIGTERM or SIGINT."""

    def __init__(
        self, role: Role, config: Config, runtime_dir: Path, *, observer: Observer = _unobserved
    ) -> None:
        self.role = role
        self.config = config
        self.runtime_dir = runtime_dir
        self._observer = observer
        self._clock = MonotonicClock()
        self._stopping = asyncio.Event()
        self._sessions: dict[str, SourceSession] = {}
        self._running: dict[str, asyncio.Task[Result]] = {}
        self._leaving: dict[str, HostedGuest] = {}
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
        if self.role is Role.DESTINATION:
            # First, since it is the likeliest to fail: nothing is left behind then.
            refuse_open_plaintext(config.destination)
            self._listener = Listener(config.destination.listen, self._receive, limits)
        self._worker = ThreadWorker(config.daemon.workers)
        self._departures = Journal(self.runtime_dir / "journal" / "source")
        self._arrivals = Journal(self.runtime_dir / "journal" / "destination")
        self._guests = GuestRegistry(
            self.runtime_dir / "guest.sock",
            self.runtime_dir,
            config.destination.guest_command,
            limits,
            self._returned,
        )
        self._control = ControlServer(self.runtime_dir / "control.sock", self._handle)
        services = DestinationServices(
            clock=self._clock,
            worker=self._worker,
            entropy=SystemEntropy(),
            journal=self._arrivals,
            limits=limits,
            guests=self._guests,
            observer=self._observer,
            max_streams=config.destination.max_streams,
        )
        self._reception = Reception(services, self._converse, self._revive)
        if self.role is Role.DESTINATION:
            self._guests.expect_guests()

    async def _receive(self, link: Link, frame: Frame) -> None:
        await self._reception.serve(link, frame)

    def _converse(self, link: Link, migration: str) -> Dialogue:
        return Dialogue(link, migration, self._clock, self.config.limits)

    async def _serve(self, ready: Callable[[str], None]) -> None:
        """Servers run until the stop signal; then migrations end first, servers after them."""
        async with asyncio.TaskGroup() as self._tasks:
            servers: list[Coroutine[Any, Any, None]] = [self._guests.run(), self._control.run()]
            if self._listener is not None:
                servers.append(self._listener.run())
            running = [self._tasks.create_task(server) for server in servers]
            listening = f", listening on {self._listener.address}" if self._listener else ""
            ready(f"migd {self.role}: ready in {self.runtime_dir}{listening}")
            await self._stopping.wait()
            await self._end_migrations()
            for task in running:
                task.cancel()

    async def _end_migrations(self) -> None:
        """Before GO: cancelled, and the guest runs on. After GO: the hand-over is brought to its end."""
        for session in self._sessions.values():
            session.cancel()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self.config.limits.go_s)
        for arriving in list(self._reception.sessions.values()):
            await arriving.stop()

    # -- commands -----------------------------------------------------------------------------------

    async def _handle(self, request: Request) -> AsyncIterator[Reply]:
        match request:
            case commands.Migrate():
                async for reply in self._migrate(request):
                    yield reply
            case commands.Status():
                yield self._status()
            case commands.Cancel(target=target):
                session = self._session_of(target)
                if not session.cancel():
                    raise MigdError(f"{target}: too late to cancel, the migration is {session.state}")
                yield commands.Done(text=f"cancelling {session.migration}")
            case commands.Resolve(target=target):
                async for reply in self._resolve(target):
                    yield reply

    async def _migrate(self, request: commands.Migrate) -> AsyncIterator[Reply]:
        session = self._new_session(request)
        task = self._launch(session, session.run())
        yield commands.Accepted(migration=session.migration)
        if not request.detach:
            async for reply in self._follow(session, task):
                yield reply

    def _new_session(self, request: commands.Migrate) -> SourceSession:
        guest = self._guests.get(request.guest)
        if guest.state is not GuestState.RUNNING or guest.name in self._busy():
            raise Refused(
                f"guest {guest.name} is {guest.state} and in a migration already: see `migd status`"
            )
        limits = self.config.limits
        migration = secrets.token_hex(16)
        peer = self._peer(request.to, migration)
        services = SourceServices(self._clock, self._worker, self._departures, limits, self._observer)
        attempt = Attempt(migration, guest, guest.ledger, peer, self._options(request), services)
        session = SourceSession(attempt)
        self._sessions[migration] = session
        self._leaving[migration] = guest
        guest.pin(migration)
        return session

    def _peer(self, address: str, migration: str) -> DestinationPeer:
        limits, insecure = self.config.limits, self.config.migration.insecure_plaintext
        connector = TcpConnector(address, self._clock, limits, insecure_plaintext=insecure)
        if insecure:
            log.warning("%s: guest memory goes to %s in plaintext, unauthenticated", migration, address)
        return DestinationPeer(connector, migration, self._clock, limits)

    def _options(self, request: commands.Migrate) -> SourceOptions:
        """The configuration, with what the request says instead."""
        config = self.config.migration
        policy = Policy(
            downtime_limit_s=(request.downtime_limit_ms or config.downtime_limit_ms) / 1e3,
            max_iterations=config.max_iterations,
            max_total_s=config.max_total_s,
            on_exhausted=Exhausted(config.on_exhausted),
        )
        return SourceOptions(
            streams=request.streams or config.streams,
            live=request.live,
            hints=config.hints if request.hints is None else request.hints,
            verify=Verify(request.verify or config.verify),
            compression=Compression(request.compression or config.compression),
            policy=policy,
        )

    def _launch(self, session: SourceSession, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = self._tasks.create_task(work)
        self._running[session.migration] = task
        task.add_done_callback(lambda _: self._over(session))
        return task

    def _over(self, session: SourceSession) -> None:
        self._running.pop(session.migration, None)
        if session.ended:  # else its outcome is unknown, and a late verification may still come
            self._leaving.pop(session.migration).unpin(session.migration)
        ended = [migration for migration, session in self._sessions.items() if session.ended]
        for migration in ended[:-_REMEMBERED]:
            del self._sessions[migration]

    async def _follow(self, session: SourceSession, task: asyncio.Task[Result]) -> AsyncIterator[Reply]:
        """Events of a migration, then its result. Whoever stops listening does not stop it."""
        shown = 0
        while not task.done():
            await asyncio.wait({task}, timeout=_POLL_S)
            done, total = session.balance_pages()
            yield commands.Moving(state=session.state, done_pages=done, total_pages=total)
            ended = session.iterations_ended()
            for iteration in ended[shown:]:
                yield commands.Iterated(iteration=iteration)
            shown = len(ended)
        yield commands.Finished(result=task.result())

    def _busy(self) -> set[str]:
        return {session.result.guest for session in self._sessions.values() if not session.ended}

    def _session_of(self, target: str) -> SourceSession:
        for session in reversed(self._sessions.values()):
            if target in (session.migration, session.result.guest) and not session.ended:
                return session
        raise MigdError(f"{target!r} is in no migration that leaves from here")

    def _status(self) -> StatusReport:
        return StatusReport(
            role=self.role,
            version=__version__,
            pid=os.getpid(),
            runtime_dir=str(self.runtime_dir),
            listen=self._listener.address if self._listener else "",
            write_tracking=_write_tracking(),
            limits=self.config.limits,
            guests=[_guest_status(guest) for guest in self._guests.guests.values()],
            migrations=[*self._departing(), *self._arriving()],
        )

    def _departing(self) -> list[MigrationStatus]:
        return [
            MigrationStatus(
                migration=session.migration,
                guest=session.result.guest,
                direction="out",
                peer=session.result.peer,
                state=session.state,
                done_pages=session.balance_pages()[0],
                total_pages=session.balance_pages()[1],
                error=session.result.error,
            )
            for session in self._sessions.values()
        ]

    def _arriving(self) -> list[MigrationStatus]:
        return [
            MigrationStatus(
                migration=session.migration,
                guest=session.hello.guest,
                direction="in",
                peer=session.hello.software,
                state=session.state,
                done_pages=session.balance_pages()[0],
                total_pages=session.balance_pages()[1],
                error=session.error,
            )
            for session in self._reception.sessions.values()
        ]

    # -- after a restart, and unknown outcomes --------------------------------------------------------

    async def _returned(self, guest: HostedGuest) -> None:
        """A guest is back, paused or incoming, from before this daemon was started: the journal decides."""
        try:
            if guest.state is GuestState.INCOMING:
                await self._return_incoming(guest)
            elif self._arrivals.last(guest.migration) is not None:
                log.error("guest %s was paused by a bad verdict (%s)", guest.name, guest.migration)
            else:
                await self._return_paused(guest)
        except MigdError as error:
            log.error("guest %s: %s", guest.name, error)  # noqa: TRY400  # the reason is the message

    async def _return_incoming(self, guest: HostedGuest) -> None:
        """STARTED is durable: it runs. Anything less: GO had not come, so it never will (R13)."""
        last = self._arrivals.last(guest.migration)
        if last is not None and last.mark is Mark.STARTED:
            await guest.start()
            log.warning("guest %s: started, as the journal says", guest.name)
            return
        detail = "the destination daemon was restarted before GO"
        self._arrivals.append(
            Record(migration=guest.migration, mark=Mark.ABORTED, guest=guest.name, detail=detail)
        )
        await guest.discard()

    async def _return_paused(self, guest: HostedGuest) -> None:
        """No GO in the journal: it is ours and runs on (G1). GO: only the destination knows (G3)."""
        if (running := self._running.get(guest.migration)) is not None:
            # Only its connection was lost: the session may be writing GO just now (G2).
            await asyncio.wait({running})
        last = self._departures.last(guest.migration)
        if last is None or last.mark is Mark.ABORTED:
            await guest.resume()
            log.warning("guest %s: resumed after a restart, GO had not been sent", guest.name)
            return
        log.warning("guest %s: GO had been sent to %s, asking it", guest.name, last.peer)
        await self._resolution(guest, last).run()

    async def _resolve(self, target: str) -> AsyncIterator[Reply]:
        """Ask the destination about an outcome that this daemon, or the one before it, does not know."""
        unknown = [session for session in self._sessions.values() if session.state is SourceState.UNKNOWN]
        for session in unknown:
            if target in (session.migration, session.result.guest):
                async for reply in self._follow(session, self._launch(session, session.resolve())):
                    yield reply
                return
        guest = self._guests.get(target)
        last = self._departures.last(guest.migration) if guest.migration else None
        if guest.state is not GuestState.PAUSED or last is None or last.mark is Mark.ABORTED:
            raise MigdError(f"{target}: nothing to resolve, the guest is {guest.state}")
        yield commands.Done(text=await self._resolution(guest, last).run())

    def _resolution(self, guest: HostedGuest, record: Record) -> Resolution:
        peer = self._peer(record.peer, record.migration)
        return Resolution(record, guest, peer, self._departures, self._worker)

    async def _revive(self, migration: str) -> HandOver:
        """The hand-over of a guest that was started here before this daemon was. GuestError if it is gone."""
        record = self._arrivals.last(migration)
        guest = self._guests.guests.get(record.guest) if record is not None else None
        if guest is None:
            raise GuestError(f"STARTED is in the journal of {migration}, but its guest has not come back")
        progress = Progress(DestinationState.READY, DESTINATION_TRANSITIONS)
        limits = self.config.limits
        return HandOver(migration, guest, progress, self._arrivals, self._worker, limits, self._observer)


def refuse_open_plaintext(config: DestinationConfig) -> None:
    """ConfigError for an address beyond loopback, unless the operator accepts plaintext: then a warning."""
    if config.insecure_plaintext:
        log.warning(
            "destination.insecure_plaintext is on: whoever reaches %s can read guest memory on its way and "
            "send guests here",
            config.listen,
        )
    elif not _is_loopback(config.listen):
        raise ConfigError(
            f"destination.listen: {config.listen} can be reached from other hosts, and guest memory would "
            f"cross the network in plaintext, unauthenticated; set destination.insecure_plaintext = true to "
            f"accept that"
        )


def _is_loopback(address: str) -> bool:
    """Whether HOST:PORT leads to this host alone; a name that means nothing is the listener's to refuse."""
    try:
        found = socket.getaddrinfo(*parse_address(address), type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(ipaddress.ip_address(str(place[0])).is_loopback for *_, place in found)


def run_daemon(role: Role, config: Config, runtime_dir: Path, ready: Callable[[str], None]) -> None:
    """Run a daemon on the configured event loop until it is told to stop. Raises MigdError if it cannot."""
    factory = uvloop.new_event_loop if config.daemon.event_loop == "uvloop" else asyncio.new_event_loop
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_run(role, config, runtime_dir, ready))


async def _run(role: Role, config: Config, runtime_dir: Path, ready: Callable[[str], None]) -> None:
    await Daemon(role, config, runtime_dir).run(ready)


def _guest_status(guest: HostedGuest) -> GuestStatus:
    return GuestStatus(
        name=guest.name,
        state=guest.state,
        ram_bytes=guest.ram.bytes,
        pid=guest.pid,
        migration=guest.migration,
    )


def _write_tracking() -> str:
    try:
        os.close(linux.userfaultfd())
    except OSError as error:
        return f"none ({error.strerror}): only --paused migrations"
    return "userfaultfd"
