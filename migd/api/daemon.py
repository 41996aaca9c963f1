"""Daemon: a daemon that runs on this host, and what one can ask of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypedDict, Unpack, cast

import msgspec

from migd.api.guest import Guest
from migd.api.migration import WAIT_S, Migration, accepted
from migd.config import default_runtime_dir
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import MigrationStatus, Reply, Request, StatusReport
from migd.control.events import Event
from migd.errors import ConfigError, GuestError, MigdError, OutcomeUnknown, PeerLost, of_exit_code
from migd.migration.stats import Arrival
from migd.wire.protocol import Keeper

ROLES = ("serve", "source", "destination")


class PolicyOptions(TypedDict, total=False):
    """When a migration pauses its guest, or gives up; may change while it runs."""

    downtime_limit_ms: float | None
    max_iterations: int | None
    max_total_s: float | None
    on_exhausted: Literal["force", "cancel"] | None


class MigrateOptions(PolicyOptions, total=False):
    """What one migration may have otherwise than configured; see ``migd.control.commands.Migrate``."""

    live: bool
    hints: bool | None
    streams: int | None
    verify: Literal["auto", "strict", "late", "off"] | None
    compression: Literal["auto", "lz4", "none"] | None
    dirty_log: Literal["auto", "userfaultfd", "compare"] | None
    max_bandwidth_bytes_s: int | None


class Daemon:
    """A daemon by its runtime directory. Whoever holds this does not own it, and never ends it.

    Every call is a connection of its own, so that threads may share the object. A daemon that does not answer
    is a ConfigError, one that goes away or falls silent meanwhile a PeerLost, and a refusal the error
    of the exit code that ``migd`` would have ended with.
    """

    runtime_dir: Path
    """Of its sockets, its journal and the logs of guests that arrived."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir

    def __repr__(self) -> str:
        return f"<migd.api.{type(self).__name__} in {self.runtime_dir}>"

    @property
    def client(self) -> ControlClient:
        """For a request that has no method here."""
        return ControlClient(self.runtime_dir)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.status().pid

    @property
    def address(self) -> str:
        """HOST:PORT where it takes guests in. ConfigError if it is a source only."""
        address = self.status().listen
        if not address:
            raise ConfigError(f"the daemon in {self.runtime_dir} takes no guests in: it is a source")
        return address

    def status(self) -> StatusReport:
        """Its guests, migrations and limits, now."""
        reply = self._ask_once(commands.Status())
        assert isinstance(reply, StatusReport), reply
        return reply

    def guest(self, name: str) -> Guest:
        """The process that is this guest here, now. GuestError if none of that name is attached."""
        for guest in self.status().guests:
            if guest.name == name:
                return Guest(name, guest.pid, self.runtime_dir / f"guest-{name}.log")
        raise GuestError(f"no guest {name!r} is attached in {self.runtime_dir}")

    def migrate(self, guest: str, to: str | Daemon, **options: Unpack[MigrateOptions]) -> Migration:
        """Begin to move a guest to another daemon, or HOST:PORT; returns at once. Not given: as configured.

        ConfigError for an option out of its range; MigdError if the daemon refuses.
        """
        address = to.address if isinstance(to, Daemon) else to
        request = _checked(commands.Migrate(guest=guest, to=address, **options))
        replies = self.client.ask(request)
        return Migration(accepted(next(replies, None)), replies, self.migration, self.cancel)

    def attach(self, target: str) -> Migration:
        """The last migration that leaves here with this id, or of this guest, as ``migrate`` gives it.

        Also one that others began, or one of the last that are over. MigdError if there is none.
        """
        migration = self.migration(target, "out").migration
        replies = self.client.ask(commands.Attach(target=migration))
        return Migration(migration, replies, self.migration, self.cancel)

    def arrival(self, target: str, timeout_s: float = WAIT_S) -> Arrival:
        """How the migration with this id, or of this guest, ended that comes in here; waits for its end.

        MigdError if there is none, TimedOut.
        """
        migration = self.migration(target, "in").migration
        for reply in self._ask(commands.Attach(target=migration), timeout_s):
            if isinstance(reply, commands.Arrived):
                return reply.record
        raise OutcomeUnknown(f"the daemon in {self.runtime_dir} ended before migration {migration} did")

    def migration(self, target: str, direction: Literal["out", "in", ""] = "") -> MigrationStatus:
        """The last migration with this id, or of this guest. MigdError if the daemon knows of none."""
        for found in reversed(self.status().migrations):
            if target in (found.migration, found.guest) and direction in ("", found.direction):
                return found
        which = {"out": " that leaves", "in": " that comes in", "": ""}[direction]
        raise MigdError(f"the daemon in {self.runtime_dir} knows of no migration {target!r}{which}")

    def events(self, since: int = 0, *, follow: bool = False, timeout_s: float = math.inf) -> Iterator[Event]:
        """What has happened after event number ``since``, as far as it remembers; then what comes.

        Ends with what is remembered unless it is to ``follow``. TimedOut; PeerLost if the daemon ends.
        """
        for reply in self._ask(commands.Events(since=since, follow=follow), timeout_s):
            if not isinstance(reply, commands.Quiet):
                yield cast(Event, reply)
        if follow:
            raise PeerLost(f"the daemon in {self.runtime_dir} has ended")

    def history(self, target: str = "", limit: int = 20) -> list[commands.Remembered]:
        """Migrations that are over, the newest last; of a ``target``, those with its id or of this guest."""
        replies = self._ask(commands.Past(target=target, limit=limit))
        return [reply for reply in replies if isinstance(reply, commands.Remembered)]

    def cancel(self, target: str) -> str:
        """End the migration with this id, or of this guest, before GO: what was done, in words."""
        return self._words(commands.Cancel(target=target))

    def set_policy(self, target: str, **options: Unpack[PolicyOptions]) -> str:
        """Change when the migration with this id, or of this guest, pauses it: what was done, in words."""
        return self._words(commands.SetPolicy(target=target, **options))

    def set_bandwidth(self, bytes_s: int, target: str = "", *, incoming: bool = False) -> str:
        """Limit the bytes sent per second, 0 for no limit; in words.

        Of the migration with this id, or of this guest; without one of all that leaves, or arrives.
        """
        return self._words(commands.SetBandwidth(bytes_s=bytes_s, target=target, incoming=incoming))

    def resolve(self, target: str, *, keeper: Literal["source", "destination"] | None = None) -> str:
        """Have the destination asked about an unknown outcome: what was decided, in words.

        ``keeper`` is where the guest is to run if nobody else can decide: `migd resolve --help` says when.
        """
        return self._words(commands.Resolve(target=target, keeper=Keeper(keeper) if keeper else None))

    def _words(self, request: Request) -> str:
        match reply := self._ask_once(request):
            case commands.Done(text=text):
                return text
            case commands.Finished(result=result):
                return f"{result.outcome}: {result.error}" if result.error else result.outcome
            case _:
                raise PeerLost(f"the daemon in {self.runtime_dir} answered {reply!r}")

    def _ask_once(self, request: Request) -> Reply:
        """The last reply."""
        last: Reply | None = None
        for reply in self._ask(request):
            last = reply
        if last is None:
            raise PeerLost(f"the daemon in {self.runtime_dir} gave no answer")
        return last

    def _ask(self, request: Request, timeout_s: float = math.inf) -> Iterator[Reply]:
        """All replies but a refusal: that is the error of its exit code."""
        for reply in self.client.ask(request, timeout_s):
            if isinstance(reply, commands.Failed):
                raise of_exit_code(reply.exit_code, reply.error)
            yield reply


def connect(runtime_dir: Path | str | None = None) -> Daemon:
    """The daemon in this directory; without one, in a default directory: serve, source, destination.

    ConfigError if none answers there.
    """
    places = [Path(runtime_dir)] if runtime_dir is not None else [default_runtime_dir(role) for role in ROLES]
    for place in places[:-1]:
        with suppress(ConfigError):
            return _answering(place)
    return _answering(places[-1])


def _answering(runtime_dir: Path) -> Daemon:
    daemon = Daemon(runtime_dir)
    daemon.status()
    return daemon


def _checked(request: commands.Migrate) -> commands.Migrate:
    """ConfigError for what is out of range: msgspec looks at that only while it decodes."""
    try:
        return msgspec.convert(msgspec.to_builtins(request), commands.Migrate)
    except msgspec.ValidationError as error:
        raise ConfigError(f"migrate: {error}") from error
