"""Which daemon a command talks to: the one in --runtime-dir, else one of those in the default directories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from migd.config import Config, default_runtime_dir, runtime_dir
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import MigrationStatus, StatusReport
from migd.daemon.targets import is_id_of
from migd.errors import ConfigError, MigdError, PeerLost

ROLES = ("serve", "source", "destination")
"""In the order in which they are asked, and preferred where several could answer."""

SENDERS = ("serve", "source")
RECEIVERS = ("serve", "destination")


@dataclass(frozen=True)
class Found:
    """A daemon that answers, and what it says of itself."""

    directory: Path
    report: StatusReport

    def __str__(self) -> str:
        return f"{self.report.role} in {self.directory}"


def all_here(directory: Path | None) -> list[Found]:
    """Every daemon that answers; ConfigError if none does. A daemon that cannot be understood is an error."""
    found: list[Found] = []
    places = _places(directory)
    for place in places:
        try:
            found.append(Found(place, _status(place)))
        except ConfigError:
            if directory:
                raise
    if not found:
        base = places[0].parent
        raise ConfigError(
            f"no migd daemon answers in {base} ({', '.join(place.name for place in places)}); start one with "
            f"`migd serve`, `migd source` or `migd destination`, or name its directory with --runtime-dir"
        )
    return found


def sender_of_guest(directory: Path | None, guest: str) -> ControlClient:
    """The daemon that this guest can leave from."""
    return _the_one(directory, lambda found: _sends(found) and _has_guest(found, guest), guest, _sends)


def sender_of(directory: Path | None, target: str) -> ControlClient:
    """The daemon that a migration leaves from, or has a guest that is paused for one."""
    return _the_one(directory, lambda found: _sends(found) and _knows(found, target), target, _sends)


def resolver_of(directory: Path | None, target: str) -> ControlClient:
    """The daemon to decide about a guest: the one that it left from, else where it arrived and is paused."""
    if directory:
        return ControlClient(directory)
    knowing = [found for found in all_here(None) if _knows(found, target)]
    if knowing and not any(map(_sends, knowing)):
        return _only(knowing, target)
    return sender_of(directory, target)


def sender(directory: Path | None) -> ControlClient:
    """The daemon that guests leave from."""
    return _the_one(directory, _sends, "sending", _sends)


def receiver(directory: Path | None) -> ControlClient:
    """The daemon that takes guests in."""
    return _the_one(directory, _receives, "receiving", _receives)


def follower_of(directory: Path | None, target: str) -> ControlClient:
    """The daemon that knows a migration; of two on this host the one that it leaves from has its result."""
    if directory:
        return ControlClient(directory)
    found = all_here(None)
    for knows in (_goes_out, _goes_on, _remembers):
        able = [daemon for daemon in found if knows(daemon, target)]
        if able:
            return ControlClient(able[0].directory)
    return ControlClient(found[0].directory)


def guest_socket() -> Path:
    """Where a new guest attaches by default: at the first daemon here that guests can leave from."""
    for role in SENDERS:
        path = default_runtime_dir(role) / "guest.sock"
        if path.exists():
            return path
    return path


def runtime_dirs(directory: Path | None, config: Config) -> list[Path]:
    """Whether a daemon answers or not: the directory that is named, else those usual ones that are there."""
    if directory is not None or config.daemon.runtime_dir:
        return [directory or runtime_dir(config, ROLES[0])]
    return [path for path in _places(None) if path.exists()]


def _places(directory: Path | None) -> list[Path]:
    return [directory] if directory else [default_runtime_dir(role) for role in ROLES]


def _status(place: Path) -> StatusReport:
    reply = ControlClient(place).ask_once(commands.Status())
    if not isinstance(reply, StatusReport):
        raise PeerLost(f"the daemon in {place} did not tell its status: {reply}")
    return reply


def _the_one(
    directory: Path | None, fits: Callable[[Found], bool], target: str, can: Callable[[Found], bool]
) -> ControlClient:
    """The only daemon that could, else the one that fits. ConfigError if there is none, or too many."""
    if directory:
        return ControlClient(directory)  # what is wrong with it, it says itself
    found = all_here(None)
    able = [daemon for daemon in found if can(daemon)]
    if not able:
        names, does = (
            ", ".join(map(str, found)),
            "takes guests in" if can is _receives else "sends guests away",
        )
        raise ConfigError(f"no daemon here {does} ({names}): start one with `migd serve`")
    return _only([daemon for daemon in able if fits(daemon)] or able[:1], target)


def _only(fitting: list[Found], target: str) -> ControlClient:
    if len(fitting) > 1:
        names = " and ".join(map(str, fitting))
        raise ConfigError(f"{target!r} is known to several daemons ({names}): name one with --runtime-dir")
    return ControlClient(fitting[0].directory)


def _sends(found: Found) -> bool:
    return found.report.role in SENDERS


def _receives(found: Found) -> bool:
    return found.report.role in RECEIVERS


def _has_guest(found: Found, name: str) -> bool:
    return any(guest.name == name for guest in found.report.guests)


def _named(migration: MigrationStatus, target: str) -> bool:
    return migration.guest == target or is_id_of(target, migration.migration)


def _knows(found: Found, target: str) -> bool:
    """A migration that leaves from there and is not over, or a guest that is paused for one."""
    return _goes_out(found, target) or any(
        target == guest.name or is_id_of(target, guest.migration)
        for guest in found.report.guests
        if guest.state == "paused"
    )


def _goes_out(found: Found, target: str) -> bool:
    return any(
        _named(migration, target) and migration.direction == "out" and not migration.over
        for migration in found.report.migrations
    )


def _goes_on(found: Found, target: str) -> bool:
    return any(_named(migration, target) and not migration.over for migration in found.report.migrations)


def _remembers(found: Found, target: str) -> bool:
    try:
        return bool(list(ControlClient(found.directory).ask(commands.Past(target=target, limit=1))))
    except MigdError:
        return False
