"""A guest that attaches again, paused, while its migration is still in the hands of this very daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migd.config import Config
from migd.daemon.departures import Departures
from migd.daemon.returns import Returns
from migd.guest.hosted import HostedGuest
from migd.guest.registry import GuestRegistry
from migd.host import MonotonicClock, SystemEntropy, ThreadWorker
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record
from migd.source.attempt import SourceServices
from migd.transport.in_flight import SharedRoom
from tests.support.scripted_guest import Observed

MIGRATION = "ab" * 16
LIMITS = Limits(go_s=0.2, connect_s=0.2)


@pytest.mark.parametrize("went", [True, False], ids=["GO follows", "no GO follows"])
async def test_the_journal_is_asked_only_when_the_session_is_over(tmp_path: Path, went: bool) -> None:
    """G2: on a slow disk GO is being written; the guest may not be resumed because it is not there yet."""
    departed, arrived = Journal(tmp_path / "source"), Journal(tmp_path / "destination")
    worker, guests = ThreadWorker(1), cast(GuestRegistry, None)
    services = SourceServices(
        MonotonicClock(), worker, departed, LIMITS, Observed(), SystemEntropy(), SharedRoom(1).open
    )
    departures = Departures(Config(limits=LIMITS), guests, services)
    returns = Returns(guests, departures, departed, arrived, worker, LIMITS, Observed())
    resumed: list[str] = []

    async def resume() -> None:
        resumed.append(MIGRATION)

    async def write_go() -> Any:
        await asyncio.sleep(0.2)
        assert not resumed
        if went:
            # A port that nothing listens on: the destination does not answer, and nothing is decided.
            departed.append(Record(migration=MIGRATION, mark=Mark.GO, peer="127.0.0.1:1"))

    guest = SimpleNamespace(name="vm1", migration=MIGRATION, state="paused", resume=resume)
    departures._running[MIGRATION] = asyncio.ensure_future(write_go())
    await returns.receive(cast(HostedGuest, guest))
    worker.close()
    assert resumed == ([] if went else [MIGRATION])
    last = departed.last(MIGRATION)
    assert (last.mark if last else None) == (Mark.GO if went else None)
