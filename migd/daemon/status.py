"""What `migd status` says of one guest, one migration, and this host."""

from __future__ import annotations

import os

from migd.control.commands import GuestStatus, MigrationStatus
from migd.destination.session import DestinationSession
from migd.guest.control import STUB
from migd.guest.hosted import HostedGuest
from migd.ram import linux, soft_dirty
from migd.source.attempt import DirtyLogChoice
from migd.source.session import SourceSession


def of_guest(guest: HostedGuest, choice: DirtyLogChoice, here: str) -> GuestStatus:
    """``here``: the dirty log of guests that leave it to the daemon to tell, ``write_tracking``."""
    said = guest.description
    tracking = said.tracking if said is not None and choice is not DirtyLogChoice.COMPARE else ""
    return GuestStatus(
        name=guest.name,
        state=guest.state,
        ram_bytes=guest.ram.bytes,
        pid=guest.pid,
        migration=guest.migration,
        kind=said.kind if said is not None else STUB,
        tracking=tracking or here,
    )


def of_departure(session: SourceSession, max_bandwidth_bytes_s: int) -> MigrationStatus:
    done_pages, total_pages = session.balance_pages()
    return MigrationStatus(
        migration=session.migration,
        guest=session.result.guest,
        direction="out",
        peer=session.result.peer,
        state=session.state,
        over=session.ended,
        done_pages=done_pages,
        total_pages=total_pages,
        elapsed_s=session.moving_s,
        moved_bytes=session.wire_bytes,
        max_bandwidth_bytes_s=max_bandwidth_bytes_s,
        error=session.result.error,
    )


def of_arrival(session: DestinationSession) -> MigrationStatus:
    done_pages, total_pages = session.balance_pages()
    return MigrationStatus(
        migration=session.migration,
        guest=session.hello.guest,
        direction="in",
        peer=session.hello.software,
        state=session.state,
        over=session.ended,
        done_pages=done_pages,
        total_pages=total_pages,
        elapsed_s=session.moving_s,
        moved_bytes=session.placed_bytes,
        error=session.error,
    )


_SOFT_DIRTY = "there, and used only for a QEMU, which can be held still while they are read and cleared"


def write_tracking(choice: DirtyLogChoice) -> str:
    """Which dirty log a live migration from here uses, and where that is not the kernel's, why."""
    if choice is DirtyLogChoice.COMPARE:
        return "compare, as configured"
    try:
        os.close(linux.userfaultfd())
    except OSError as error:
        missing = f"{error.strerror}; soft-dirty: {_SOFT_DIRTY if soft_dirty.supported() else 'none'}"
    else:
        return "userfaultfd"
    if choice is DirtyLogChoice.USERFAULTFD:
        return f'none, as dirty_log = "userfaultfd" ({missing}): only --paused migrations'
    return f"compare ({missing})"
