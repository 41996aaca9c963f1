"""The same guest moved by migd: two daemons, a companion beside each QEMU."""

from __future__ import annotations

import time

from migd import api
from migd.api.daemon import MigrateOptions
from migd.errors import MigdError, TimedOut
from migd.migration.stats import Result
from migd.report import result_text
from migd.versus.cases import Contender, Measured
from migd.versus.venue import Venue

GUEST = "vm1"
DOWNTIME_LIMIT_MS = 20.0
"""What is promised. The tracking verification does not fit into it, and so comes right behind: it counts into
the total."""
_ATTACH_S = 10.0


def move(
    venue: Venue, contender: Contender, options: MigrateOptions | None = None
) -> tuple[Measured, Result]:
    """MigdError if it fails, or anything was found wrong."""
    with api.start_daemon("source") as here, api.start_daemon("destination") as there:
        here.start_qemu(GUEST, qmp=venue.source.qmp).ready()
        there.start_qemu(GUEST, qmp=venue.destination.qmp).ready()
        _await_attached(here)
        _await_attached(there)
        asked: MigrateOptions = {
            "downtime_limit_ms": DOWNTIME_LIMIT_MS,
            **(options or {}),
            "hints": contender is Contender.MIGD,
        }
        address = there.address
        began = time.perf_counter()
        result = here.migrate(GUEST, address, **asked).wait()
        total_s = time.perf_counter() - began
        if result.outcome != "completed":
            raise MigdError(result_text(result))
        measured = Measured(
            total_s=total_s,
            downtime_s=result.downtime.guest_s,
            wire_bytes=result.wire_bytes,
            started_s=result.total_s,
            detail=f"hints {result.hints}, {result.dirty_log}, {result.verification}",
        )
        venue.check()
        return measured, result


def _await_attached(daemon: api.OwnedDaemon) -> None:
    deadline = time.monotonic() + _ATTACH_S
    while not daemon.status().guests:
        if time.monotonic() > deadline:
            raise TimedOut(f"the guest did not attach in {daemon.runtime_dir}")
        time.sleep(0.02)
