"""Migrations through the public Python API: what they do, tell, refuse and report."""

from __future__ import annotations

import socket
import threading
from typing import get_type_hints

import pytest

from migd import api, errors
from migd.api.daemon import MigrateOptions, PolicyOptions
from migd.control import commands
from migd.errors import (
    Cancelled,
    ConfigError,
    GuestError,
    MigdError,
    TimedOut,
    VerificationError,
)
from migd.migration.stats import Result


def unused_address() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_there_and_back(pair: api.DaemonPair) -> None:
    guest = pair.guest("traveller", ram="16Mi")
    for _ in range(2):
        for result in (pair.migrate("traveller"), pair.back("traveller", hints=False)):
            assert (result.outcome, result.wrong_pages, result.exit_code) == ("completed", 0, 0)
            assert result.checked_pages
            assert result.check() is result
    assert guest.wait() == 0
    assert not guest.alive
    arrived = pair.source.guest("traveller")
    assert arrived.alive
    assert arrived.pid != guest.pid
    assert "checked: " in arrived.log
    with pytest.raises(GuestError, match=r"no guest 'traveller' is attached in "):
        pair.destination.guest("traveller")


def test_a_migration_tells_what_it_does(pair: api.DaemonPair) -> None:
    pair.guest("told", ram="16Mi")
    migration = pair.source.migrate("told", pair.destination, hints=True)
    assert len(migration.id) == 32
    events = list(migration.follow())
    assert migration.done
    result = migration.wait(0)
    assert result.migration == migration.id
    told = [event.iteration for event in events if isinstance(event, commands.Iterated)]
    assert told == migration.iterations() == result.iterations
    assert migration.status().state == "completed"
    with pytest.raises(MigdError, match="is in no migration that"):
        migration.cancel()


def test_options_of_a_migration_arrive(pair: api.DaemonPair) -> None:
    pair.guest("optional", ram="8Mi", workload="idle")
    result = pair.migrate("optional", live=False, hints=False, streams=3, verify="late").check()
    assert (result.live, result.hints, result.streams) == (False, "off", 3)
    assert result.verification.startswith("late")


def test_the_api_has_every_option_of_a_migration() -> None:
    request = get_type_hints(commands.Migrate)
    for place in ("guest", "to", "detach", "version"):
        del request[place]
    assert get_type_hints(MigrateOptions) == request
    policy = get_type_hints(commands.SetPolicy)
    del policy["target"], policy["version"]
    assert get_type_hints(PolicyOptions) == policy


def test_a_migration_that_is_cancelled(pair: api.DaemonPair, silent: str) -> None:
    pair.guest("keen", ram="8Mi", workload="idle")
    migration = pair.source.migrate("keen", silent)
    with pytest.raises(TimedOut, match=r"was not over after 0 s; it goes on"):
        migration.wait(0)
    with pytest.raises(TimedOut):
        list(migration.follow(0))
    assert not migration.done
    assert migration.status().state == "connecting"
    migration.cancel()
    result = migration.wait()
    assert (result.outcome, result.exit_code) == ("cancelled", 130)
    with pytest.raises(Cancelled, match=f"keen -> {silent}: cancelled"):
        result.check()
    assert pair.source.guest("keen").alive


def test_limits_that_change_while_migrations_run(pair: api.DaemonPair, silent: str) -> None:
    pair.guest("limited", ram="8Mi", workload="idle")
    migration = pair.source.migrate("limited", silent, max_bandwidth_bytes_s=10**6)
    assert migration.status().max_bandwidth_bytes_s == 10**6
    assert pair.source.set_bandwidth(2 * 10**6, migration.id)
    assert migration.status().max_bandwidth_bytes_s == 2 * 10**6
    assert pair.source.set_policy("limited", downtime_limit_ms=5.0, on_exhausted="cancel")
    assert pair.source.set_bandwidth(10**9)
    assert pair.source.set_bandwidth(10**8, incoming=True)
    status = pair.source.status()
    assert (status.max_outgoing_bytes_s, status.max_incoming_bytes_s) == (10**9, 10**8)
    pair.source.set_bandwidth(0)
    pair.source.set_bandwidth(0, incoming=True)
    migration.cancel()
    assert migration.wait().outcome == "cancelled"


def test_a_migration_that_fails(pair: api.DaemonPair) -> None:
    pair.guest("unlucky", ram="8Mi", workload="idle")
    result = pair.source.migrate("unlucky", unused_address()).wait()
    assert result.outcome == "failed"
    with pytest.raises(MigdError, match="Connection refused"):
        result.check()
    assert pair.migrate("unlucky").check().outcome == "completed"


def test_migrations_that_never_begin(pair: api.DaemonPair) -> None:
    pair.guest("homely", ram="8Mi", workload="idle")
    for options, complaint in (
        ({"streams": 0}, "migrate: Expected `int` >= 1 - at `$.streams`"),
        ({"downtime_limit_ms": -1.0}, "migrate: Expected `float` > 0.0 - at `$.downtime_limit_ms`"),
        ({"verify": "maybe"}, "migrate: Invalid enum value 'maybe' - at `$.verify`"),
    ):
        with pytest.raises(ConfigError) as caught:
            pair.source.migrate("homely", pair.destination, **options)  # type: ignore[typeddict-item]
        assert str(caught.value) == complaint
    with pytest.raises(ConfigError, match="'nowhere' is no HOST:PORT"):
        pair.source.migrate("homely", "nowhere")
    with pytest.raises(MigdError, match="'ghost'"):
        pair.source.migrate("ghost", pair.destination)
    with pytest.raises(MigdError, match="knows of no migration 'homely'"):
        pair.source.migration("homely")
    with pytest.raises(MigdError, match="'homely' is in no migration"):
        pair.source.cancel("homely")
    with pytest.raises(MigdError, match="homely: nothing to resolve, the guest is running"):
        pair.source.resolve("homely")


def test_many_threads_share_the_objects(pair: api.DaemonPair) -> None:
    """Guests there at once, each waited for by several threads that ask for its status as well."""
    names = [f"shared{number}" for number in range(3)]
    for guest in [pair.source.start_guest(name, ram="8Mi", workload="idle") for name in names]:
        guest.ready()
    migrations = [pair.source.migrate(name, pair.destination) for name in names]
    found: list[tuple[str, str]] = []

    def watch(migration: api.Migration) -> None:
        list(migration.follow())
        found.append((migration.status().state, migration.wait().check().outcome))

    threads = [threading.Thread(target=watch, args=(each,)) for each in migrations for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [("completed", "completed")] * 9


def test_guests_end_and_their_names_are_free_again(pair: api.DaemonPair) -> None:
    for _ in range(2):
        pair.guest("again", ram="8Mi", workload="idle")
        pair.migrate("again").check()
        pair.end_guests()
        assert [daemon.status().guests for daemon in pair.daemons] == [[], []]


def _result(**figures: object) -> Result:
    return Result(migration="0" * 32, guest="vm1", peer="127.0.0.1:1", **figures)  # type: ignore[arg-type]


@pytest.mark.parametrize("exit_code", sorted(set(errors.EXIT_CODES) - {0}))
def test_a_result_raises_the_error_of_its_exit_code(exit_code: int) -> None:
    result = _result(outcome="failed", exit_code=exit_code, error="because")
    with pytest.raises(MigdError, match=r"vm1 -> 127.0.0.1:1: failed: because") as caught:
        result.check()
    assert caught.value.exit_code == exit_code


def test_a_result_with_wrong_pages_or_without_an_end_is_no_success() -> None:
    with pytest.raises(VerificationError, match="found 1 of 9 pages wrong"):
        _result(outcome="completed", checked_pages=9, wrong_pages=1).check()
    with pytest.raises(MigdError):
        _result().check()
    assert _result(outcome="completed").check().outcome == "completed"
