"""Where a guest is after a kill, as both daemons say, and what an operator does where nobody knows."""

from __future__ import annotations

import contextlib
import subprocess
from enum import StrEnum

from migd.control import commands
from migd.control.commands import GuestStatus
from migd.errors import MigdError
from migd.migration.state import SOURCE_TRANSITIONS, SourceState
from tests.support.pair import DaemonPair, DaemonProcess, Output, migd, start_migd


class Where(StrEnum):
    """Where the guest runs when all is over."""

    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere: it was killed where it ran"
    UNKNOWN = "nowhere: paused at the source, for the operator to decide"
    CONDEMNED = "nowhere: paused on both sides, for the operator to decide"


_ASKED = 5

RUNNING = frozenset({Where.SOURCE, Where.DESTINATION})

_OVER = [state for state, following in SOURCE_TRANSITIONS.items() if not following]


def where(pair: DaemonPair, name: str) -> Where | None:
    """None while it is on its way from one to another."""
    here, there = _state(pair.source.guest(name)), _state(pair.destination.guest(name))
    match here, there:
        case "running", "running":
            return None
        case "running", _:
            return Where.SOURCE
        case _, "running":
            # Until the source has let go of it, it may still be in doubt about it.
            return Where.DESTINATION if not here else None
        case "paused", "":
            return Where.UNKNOWN
        case "paused", "paused":
            return Where.CONDEMNED
        case "", _:
            return Where.NOWHERE
    return None


def over(daemon: DaemonProcess, name: str) -> bool:
    """No migration of this guest from this daemon goes on or is in doubt."""
    left = _departures(daemon, name)
    return not left or left[-1] in _OVER


def in_doubt(daemon: DaemonProcess, name: str) -> bool:
    """The daemon does not know where the guest runs, by its session or, restarted, by its log."""
    left = _departures(daemon, name)
    if left:
        return left[-1] == SourceState.UNKNOWN
    asked = f"guest {name}: GO was sent to "
    return _state(daemon.guest(name)) == "paused" and any(
        asked in line and "no answer came" in line for line in daemon.log.splitlines()
    )


def ask_to_resolve(daemon: DaemonProcess, name: str) -> None:
    """As `migd resolve` without the time that Python needs to start; what it brought is seen by the guest."""
    with contextlib.suppress(MigdError):
        list(daemon.client.ask(commands.Resolve(target=name)))


def second_end(pair: DaemonPair, name: str) -> str:
    """How a migration that nothing hits ends; asked about where a busy machine had it miss ``go_s``.

    Its state, and why, unless it is completed.
    """
    for _ in range(_ASKED):
        if (ended := pair.ended(name)).state != SourceState.UNKNOWN:
            break
        ask_to_resolve(pair.source, name)
    return ended.state if ended.state == SourceState.COMPLETED else f"{ended.state}: {ended.error}"


def start_resolve(daemon: DaemonProcess, name: str) -> subprocess.Popen[str]:
    """`migd resolve`, on its way; ``tests.support.pair.finish`` has its end."""
    return start_migd("resolve", name, "--runtime-dir", daemon.directory)


def resolve(daemon: DaemonProcess, name: str, *options: str) -> Output:
    return migd("resolve", name, *options, "--runtime-dir", daemon.directory)


def _departures(daemon: DaemonProcess, name: str) -> list[str]:
    """The states of this guest's migrations from this daemon, oldest first."""
    return [found.state for found in daemon.migrations(name) if found.direction == "out"]


def _state(guest: GuestStatus | None) -> str:
    return guest.state if guest is not None else ""
