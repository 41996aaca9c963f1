"""A guest that attaches again, paused, while its migration is still in the hands of this very daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migd.config import Config
from migd.daemon import Daemon, Role
from migd.errors import OutcomeUnknown
from migd.guest.hosted import HostedGuest
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record

MIGRATION = "ab" * 16


@pytest.mark.parametrize("went", [True, False], ids=["GO follows", "no GO follows"])
async def test_the_journal_is_asked_only_when_the_session_is_over(tmp_path: Path, went: bool) -> None:
    """G2: on a slow disk GO is being written; the guest may not be resumed because it is not there yet."""
    daemon = Daemon(Role.SOURCE, Config(limits=Limits(go_s=0.2, connect_s=0.2)), tmp_path)
    daemon._departures = Journal(tmp_path / "journal")
    resumed: list[str] = []

    async def resume() -> None:
        resumed.append(MIGRATION)

    async def write_go() -> Any:
        await asyncio.sleep(0.2)
        assert not resumed
        if went:
            # A port that nothing listens on: the destination does not answer.
            daemon._departures.append(Record(migration=MIGRATION, mark=Mark.GO, peer="127.0.0.1:1"))

    guest = cast(HostedGuest, SimpleNamespace(name="vm1", migration=MIGRATION, resume=resume))
    daemon._running[MIGRATION] = asyncio.ensure_future(write_go())
    if went:
        daemon._worker = cast(Any, None)  # nothing is decided, so nothing is written
        with pytest.raises(OutcomeUnknown):
            await daemon._return_paused(guest)
    else:
        await daemon._return_paused(guest)
    assert resumed == ([] if went else [MIGRATION])
