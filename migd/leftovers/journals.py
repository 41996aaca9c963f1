"""Which records of a journal are over, and which still decide who runs a guest.

A record may go if, without it, a daemon that is started again and anybody who asks it would be told and would
do exactly the same:

=========== ========= ======= =====================================================================
role        last      verdict without it
=========== ========= ======= =====================================================================
source      ABORTED   goes    a guest that comes back paused is resumed, as it is with the record
source      RELEASED  goes    the same would happen, which is wrong: so only if no such process lives
source      GO        stays   the guest would be resumed, though it may run at the destination
source      STARTED   stays   the guest would be resumed, though it runs at the destination
source      CONDEMNED stays   the guest would be resumed, though the operator has not said where it runs
destination ABORTED   goes    GO is answered with ABORTED, as it is with the record
destination READY     stays   the source may be asking; a daemon here answers it, once it is started
destination STARTED   stays   GO would be answered with ABORTED, and the source resume its copy
destination VERIFIED  stays   the same: the source may have died before it let go
destination CONDEMNED stays   the same, and the guest here might be taken for one that was to leave
=========== ========= ======= =====================================================================

What cannot be read stays. A file without a whole line announced nothing: it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path

from migd.errors import MigdError
from migd.leftovers.guests import GuestProcess
from migd.leftovers.leftover import Kind, Leftover, goes, stays
from migd.migration.journal import Journal, Mark, Record


class Side(StrEnum):
    """Whose journal; the value is the name of its directory."""

    SOURCE = "source"
    DESTINATION = "destination"


def journal_path(runtime_dir: Path, side: Side) -> Path:
    return runtime_dir / "journal" / side


def leftovers(runtime_dir: Path, guests: Sequence[GuestProcess]) -> Iterator[Leftover]:
    """The journals of both roles. ``guests`` are the guest processes that live on this host."""
    for side in Side:
        directory = journal_path(runtime_dir, side)
        if directory.is_dir():
            journal = Journal(directory)
            for migration in journal.migrations():
                yield _judge(journal, side, directory / f"{migration}.jsonl", guests)


def _judge(journal: Journal, side: Side, path: Path, guests: Sequence[GuestProcess]) -> Leftover:
    try:
        last = journal.last(path.stem)
    except MigdError as error:
        return stays(Kind.JOURNAL, path, f"cannot be read, and so may decide something: {error}")
    if last is None:
        return goes(Kind.JOURNAL, path, "no record in it was completed: nothing came of it")
    alive = [guest for guest in guests if guest.may_be(last.guest, path.parents[2])]
    reason = _over(side, last)
    if not reason:
        return stays(Kind.JOURNAL, path, _undecided(side, last))
    if last.mark is Mark.RELEASED and alive:
        pids = ", ".join(str(guest.pid) for guest in alive)
        return stays(
            Kind.JOURNAL,
            path,
            f"{reason}; but process {pids} may be its copy here, which must not be resumed",
        )
    return goes(Kind.JOURNAL, path, reason)


def _over(side: Side, last: Record) -> str:
    """Why a migration needs its records no more; empty if it does."""
    match side, last.mark:
        case Side.SOURCE, Mark.ABORTED:
            return f"over: guest {last.guest} ran on here"
        case Side.SOURCE, Mark.RELEASED:
            return f"over: guest {last.guest} left for {last.peer}"
        case Side.DESTINATION, Mark.ABORTED:
            return f"over: guest {last.guest or '(unknown)'} was never started here, and never will be"
    return ""


def _undecided(side: Side, last: Record) -> str:
    match side, last.mark:
        case Side.SOURCE, Mark.GO:
            return (
                f"GO was sent to {last.peer} and no answer came: only it knows who runs guest {last.guest}. "
                f"Start the daemon here again, and `migd resolve {last.guest}`"
            )
        case Side.SOURCE, Mark.STARTED:
            return (
                f"guest {last.guest} was started at {last.peer} and not yet let go of here: a paused copy of "
                f"it must not be resumed. Start the daemon here again, which sees to it"
            )
        case Side.SOURCE, Mark.CONDEMNED:
            return (
                f"the verdict on guest {last.guest} was bad ({last.detail}): it stays paused here and at "
                f"{last.peer}. Start the daemon here again, and `migd resolve {last.guest}`"
            )
        case Side.DESTINATION, Mark.CONDEMNED:
            return (
                f"the verdict on guest {last.guest} was bad ({last.detail}): it stays paused here. Start the "
                f"daemon here again, and `migd resolve {last.guest}`"
            )
        case Side.DESTINATION, Mark.READY:
            return (
                f"GO may have been sent for guest {last.guest}: its source may still ask. Start the daemon "
                f"here again, which answers that it was not started"
            )
        case Side.DESTINATION, Mark.STARTED | Mark.VERIFIED:
            return (
                f"guest {last.guest} was started here: should its source ask again, only this record keeps "
                f"it from resuming its own copy. It may go once the source's journal or history says that "
                f"the guest was let go"
            )
    return f"{last.mark} is no record of a {side}: look into it"
