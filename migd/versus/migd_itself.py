"""The same guest moved by migd: two daemons, and a companion beside each QEMU."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

from migd import api
from migd.errors import MigdError, TimedOut
from migd.versus.cases import Measured
from migd.versus.venue import Venue

GUEST = "vm1"
DOWNTIME_LIMIT_MS = 20.0
"""What is promised. The tracking verification does not fit into it, and so comes right behind: it counts into
the total."""

_ATTACH_S = 10.0


class Pair:
    """Both daemons with the venue's QEMUs as their guests: one runs, the other is in readiness."""

    def __init__(self, venue: Venue) -> None:
        with ExitStack() as owned:
            self._here = owned.enter_context(api.start_daemon("source"))
            self._there = owned.enter_context(api.start_daemon("destination"))
            for daemon, side in ((self._here, venue.source), (self._there, venue.destination)):
                daemon.start_qemu(GUEST, qmp=side.qmp).ready()
                _await_attached(daemon)
            self._owned = owned.pop_all()

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._owned.close()

    def move(self, *, hints: bool) -> Measured:
        """MigdError if it fails, or anything was found wrong."""
        address = self._there.address
        began = time.perf_counter()
        migration = self._here.migrate(GUEST, address, hints=hints, downtime_limit_ms=DOWNTIME_LIMIT_MS)
        result = migration.wait()
        total_s = time.perf_counter() - began
        if result.outcome != "completed":
            raise MigdError(f"the migration {result.outcome}: {result.error}")
        return Measured(
            total_s=total_s,
            downtime_s=result.downtime.guest_s,
            wire_bytes=result.wire_bytes,
            started_s=result.total_s,
            live=any(iteration.live and iteration.sent_pages for iteration in result.iterations),
            skipped_pages=result.skipped_free_pages,
            detail=f"hints {result.hints}, {result.dirty_log}, {result.verification}",
        )


def _await_attached(daemon: api.OwnedDaemon) -> None:
    deadline = time.monotonic() + _ATTACH_S
    while not daemon.status().guests:
        if time.monotonic() > deadline:
            raise TimedOut(f"the guest did not attach in {daemon.runtime_dir}:\n{daemon.log}")
        time.sleep(api.processes.LOOK_S)
