"""Events, the past, and migrations that others began, through the public Python API."""

from __future__ import annotations

import os
import signal

import pytest

from migd import api
from migd.control.events import GuestAttached, MigrationBegan, MigrationFinished, StateEntered
from migd.errors import (
    ConfigError,
    MigdError,
    PeerLost,
    TimedOut,
)
from tests.support.pair import eventually


def test_events_of_a_migration(pair: api.DaemonPair) -> None:
    before = [event.seq for event in pair.source.events()][-1:] or [0]
    pair.guest("eventful", ram="8Mi", workload="idle")
    migration = pair.source.migrate("eventful", pair.destination)
    seen = []
    for event in pair.source.events(before[0], follow=True, timeout_s=30):
        seen.append(event)
        if isinstance(event, MigrationFinished):
            break
    assert isinstance(seen[0], GuestAttached)
    assert isinstance(seen[1], MigrationBegan)
    assert seen[1].migration == migration.id
    states = [event.state for event in seen if isinstance(event, StateEntered)]
    assert states[-1] == "completed"
    assert list(pair.source.events(before[0]))[: len(seen)] == seen
    with pytest.raises(TimedOut, match=r"had not said all after 0.2 s"):
        list(pair.source.events(follow=True, timeout_s=0.2))


def test_following_events_of_a_daemon_that_ends() -> None:
    with api.start_daemon("source") as daemon:
        events = daemon.events(follow=True)
        daemon.start_guest("vm1", ram="8Mi", workload="idle")
        assert isinstance(next(events), GuestAttached)
        os.kill(daemon.pid, signal.SIGKILL)
        with pytest.raises(PeerLost):
            list(events)
        daemon.process.wait()  # its socket takes connections until it is gone
        with pytest.raises(ConfigError, match="no migd daemon answers"):
            list(daemon.events())


def test_migrations_of_the_past_and_of_others(pair: api.DaemonPair) -> None:
    pair.guest("famous", ram="8Mi", workload="idle")
    migration = pair.source.migrate("famous", pair.destination)
    attached = api.connect(pair.source.runtime_dir).attach("famous")
    assert attached.id == migration.id
    result = migration.wait().check()
    assert attached.wait() == pair.source.attach(migration.id).wait() == result
    arrival = pair.destination.arrival("famous")
    assert (arrival.migration, arrival.outcome, arrival.exit_code) == (migration.id, "completed", 0)
    assert [past.record for past in pair.source.history("famous")] == [result]
    assert [past.record for past in pair.destination.history(migration.id)] == [arrival]
    assert len(pair.source.history(limit=1)) == 1
    for ask, complaint in (
        (pair.source.arrival, "knows of no migration 'famous' that comes in"),
        (pair.destination.attach, "knows of no migration 'famous' that leaves"),
    ):
        with pytest.raises(MigdError, match=complaint):
            ask("famous")


def test_waiting_for_an_arrival_is_bounded() -> None:
    """The destination waits for a guest process that never attaches."""
    with api.start_pair({"destination": {"guest_command": ["sleep", "60"]}}) as pair:
        pair.guest("vm1", ram="8Mi", workload="idle")
        migration = pair.source.migrate("vm1", pair.destination)
        eventually(lambda: pair.destination.status().migrations, "the migration's arrival")
        with pytest.raises(TimedOut):
            pair.destination.arrival("vm1", timeout_s=0.2)
        migration.cancel()
        assert pair.destination.arrival("vm1").outcome == "aborted"
        assert migration.wait().outcome == "cancelled"
