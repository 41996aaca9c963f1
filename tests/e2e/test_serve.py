"""Daemons with both roles: guests come, go and come back, several at once, and leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from migd.control import commands
from migd.control.commands import MigrationStatus, Remembered
from migd.control.events import StateEntered
from migd.migration.state import DestinationState, SourceState
from migd.migration.stats import Arrival, Result
from tests.support.pair import (
    DaemonPair,
    DaemonProcess,
    daemon_pair,
    eventually,
    finish,
    processes_naming,
    spoil,
)

ROUND_TRIPS = 10
AT_ONCE = 4


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(serve=True) as pair:
        yield pair


@pytest.fixture(scope="module")
def held() -> Iterator[DaemonPair]:
    with daemon_pair(serve=True, held=True) as pair:
        yield pair


def descriptors(daemon: DaemonProcess) -> list[str]:
    """What a daemon has open, sockets and pipes without their numbers."""
    assert daemon.process is not None
    found = []
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry).partition(":[")[0])
        except FileNotFoundError:
            continue
    return sorted(found)


def past(daemon: DaemonProcess, target: str = "") -> list[Remembered]:
    replies = list(daemon.client.ask(commands.Past(target=target, limit=100)))
    assert all(isinstance(reply, Remembered) for reply in replies), replies
    return cast(list[Remembered], replies)


def arrivals(daemon: DaemonProcess, target: str) -> list[Arrival]:
    return [entry.record for entry in past(daemon, target) if isinstance(entry.record, Arrival)]


def departures(daemon: DaemonProcess) -> list[Result]:
    return [entry.record for entry in past(daemon) if isinstance(entry.record, Result)]


def going_out(daemon: DaemonProcess, guest: str) -> MigrationStatus | None:
    return next((found for found in daemon.migrations(guest) if found.direction == "out"), None)


def at_rest(daemon: DaemonProcess, guests: list[str]) -> bool:
    """These guests run here, no migration acts, and only the spare process waits for a guest."""
    status = daemon.status()
    running = sorted(guest.name for guest in status.guests if guest.state == "running" and guest.pid)
    outputs = [
        _output(pid) for pid in processes_naming("migd.guest.incoming", f"{daemon.directory}/guest.sock")
    ]
    # One that was given a guest writes to its log: it may be here still when the guest has left.
    expected = [os.devnull, *(f"{daemon.directory}/guest-{name}.log" for name in guests)]
    return (
        running == guests and all(found.over for found in status.migrations) and sorted(outputs) == expected
    )


def _output(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def test_there_and_back_ten_times_under_churn_leaves_nothing_behind(pair: DaemonPair) -> None:
    guest = pair.guest("traveller", ram="32Mi", workload="churn", rate="20M")
    open_after_first: list[list[str]] = []
    for trip in range(ROUND_TRIPS):
        for here, back in ((pair.source, False), (pair.destination, True)):
            assert here.wait(pair.launch(guest.name, back=back)) == 0, (trip, here.log)
            result = departures(here)[-1]
            assert result.checked_pages, (trip, result)
            assert (result.wrong_pages, result.rescued_pages, result.late_dirty_pages) == (0, 0, 0)
        if trip in (0, ROUND_TRIPS - 1):  # from the first trip on, everything is imported and opened
            eventually(lambda: at_rest(pair.source, [guest.name]), "the guest to be home")
            eventually(lambda: at_rest(pair.destination, []), "the other side to be empty")
            open_now = [descriptors(pair.source), descriptors(pair.destination)]
            open_after_first = open_after_first or open_now
    assert open_now == open_after_first
    assert guest.wait() == 0
    here = pair.source.guest(guest.name)
    assert here is not None
    assert here.pid != guest.pid
    assert len(pair.source.migrations(guest.name)) == 2 * ROUND_TRIPS
    pair.discard(guest.name)


def test_four_guests_at_once_each_way(pair: DaemonPair) -> None:
    names = [f"crowd{number}" for number in range(AT_ONCE)]
    for guest in [pair.start_guest(name, ram="16Mi", workload="churn", rate="4M") for name in names]:
        guest.ready()
    for here, launch_back in ((pair.source, False), (pair.destination, True)):
        ids = [pair.launch(name, back=launch_back) for name in names]
        assert [here.wait(migration) for migration in ids] == [0] * AT_ONCE
        there = pair.source if launch_back else pair.destination
        assert [there.wait(name) for name in names] == [0] * AT_ONCE
        results = departures(here)[-AT_ONCE:]
        assert {result.migration for result in results} == set(ids)
        assert [result.wrong_pages for result in results] == [0] * AT_ONCE
        assert all(result.checked_pages for result in results)
    for name in names:
        pair.discard(name)


def test_one_guest_leaves_while_another_arrives(held: DaemonPair) -> None:
    """Both migrations stand in the middle of it at the same time, and go on to their ends."""
    leaving, coming = held.guest("leaving"), held.guest("coming")
    assert held.migrate(coming.name).exit_code == 0
    held.source.hold(SourceState.BULK, "leaving")
    held.destination.hold(SourceState.BULK, "coming")
    processes = [held.start_migration(leaving.name), held.start_back(coming.name)]
    held.source.wait_held("leaving")
    held.destination.wait_held("coming")
    directions = {found.guest: found.direction for found in held.source.status().migrations if not found.over}
    assert directions == {leaving.name: "out", coming.name: "in"}
    held.source.release_all()
    held.destination.release_all()
    for output in map(finish, processes):
        assert output.exit_code == 0, output
        assert output.result.wrong_pages == 0
    for name, daemon in ((leaving.name, held.destination), (coming.name, held.source)):
        here = daemon.guest(name)
        assert here is not None
        assert here.state == "running"
        held.discard(name)


def test_two_guests_of_one_name_cannot_be_on_one_side(pair: DaemonPair) -> None:
    first = pair.guest("twin", ram="4Mi", workload="idle")
    assert pair.migrate(first.name).exit_code == 0
    assert first.wait() == 0
    second = pair.guest("twin", ram="4Mi", workload="idle")
    third = pair.start_guest("twin", ram="4Mi", workload="idle")
    assert third.wait() == 3
    assert "a guest named 'twin' is attached already" in third.log
    pair.guests["twin"] = second
    for output in (pair.migrate("twin"), pair.back("twin")):
        assert output.exit_code == 3
        assert "a guest named 'twin' is here already" in output.result.error
    assert {daemon.guest("twin").state for daemon in (pair.source, pair.destination)} == {"running"}
    pair.discard("twin")


# -- a guest that moves on at once -----------------------------------------------------------------------


def test_a_guest_moves_on_as_soon_as_the_verdict_on_its_arrival_is_there(held: DaemonPair) -> None:
    """Until then the next migration waits, and says so."""
    guest = held.guest("hasty")
    held.source.hold(SourceState.VERIFYING)
    first = held.start_migration(guest.name, "--verify", "late")
    held.source.wait_held(SourceState.VERIFYING)
    second = held.start_back(guest.name)
    waiting = eventually(
        lambda: next(
            (found for found in held.destination.migrations(guest.name) if found.direction == "out"), None
        ),
        "the second migration",
    )
    assert waiting.state == SourceState.WAITING
    assert held.source.migrations(guest.name)[-1].direction == "out", "it went off before the verdict"
    held.source.release_all()
    for output in (finish(first), finish(second)):
        assert output.exit_code == 0, output
        assert output.result.wrong_pages in (0, None)
    assert output.result.states[:2] == ["waiting", "connecting"]
    assert held.source.wait(guest.name) == 0
    held.discard(guest.name)


def test_a_guest_that_waits_for_its_verdict_can_be_cancelled(held: DaemonPair) -> None:
    guest = held.guest("patient")
    held.source.hold(SourceState.VERIFYING)
    first = held.start_migration(guest.name)
    held.source.wait_held(SourceState.VERIFYING)
    held.destination.hold(SourceState.WAITING)
    second = held.start_back(guest.name)
    held.destination.wait_held(SourceState.WAITING)
    reply = held.destination.client.ask_once(commands.Cancel(target=guest.name))
    assert isinstance(reply, commands.Done), reply
    held.destination.release_all()
    output = finish(second)
    assert output.exit_code == 130
    assert output.result.states == ["waiting", "aborting", "cancelled"]
    held.source.release_all()
    assert finish(first).result.wrong_pages == 0
    assert held.back(guest.name).result.wrong_pages == 0
    held.discard(guest.name)


def test_a_verdict_that_never_comes_is_waited_for_no_longer_than_verdict_s() -> None:
    limits = "[limits]\nverdict_s = 0.5\n"
    with daemon_pair(destination=limits, held=True, serve=True) as pair:
        guest = pair.guest()
        pair.source.hold(SourceState.VERIFYING)
        first = pair.start_migration(guest.name)
        pair.source.wait_held(SourceState.VERIFYING)
        away = pair.guest("bystander", ram="4Mi", workload="idle")
        eventually(
            lambda: pair.destination.migrations(guest.name)[-1].state == DestinationState.COMPLETED,
            "the destination to wait no longer",
        )
        # The source's own copy of the guest is still there, paused: its name is taken.
        refused = pair.back(guest.name)
        assert refused.exit_code == 3
        assert f"a guest named '{guest.name}' is here already" in refused.result.error
        assert refused.result.states[0] == "connecting"
        pair.source.release_all()
        assert finish(first).exit_code == 0
        assert away.alive


def test_a_bad_verdict_keeps_a_waiting_guest_where_it_is(held: DaemonPair) -> None:
    """Somebody has written to the paused RAM behind the log's back; the image is not sent on."""
    guest = held.guest("spoilt")
    held.source.hold(SourceState.VERIFYING)
    first = held.start_migration(guest.name, "--verify", "late")
    held.source.wait_held(SourceState.VERIFYING)
    second = held.start_back(guest.name)
    eventually(lambda: going_out(held.destination, guest.name), "the second migration")
    spoil(guest.pid)
    held.source.release_all()
    assert finish(first).exit_code == 5
    output = finish(second)
    assert output.exit_code == 1
    assert "the verdict on its arrival was bad" in output.result.error
    assert output.result.states == ["waiting", "aborting", "failed"]
    here = held.destination.guest(guest.name)
    assert here is not None
    assert here.state == "paused"
    eventually(lambda: arrivals(held.destination, guest.name), "the arrival to be over")
    (arrival,) = arrivals(held.destination, guest.name)
    assert (arrival.outcome, arrival.exit_code) == ("failed", 5)
    assert "guest paused" in arrival.error
    held.discard(guest.name)


# -- the roles -------------------------------------------------------------------------------------------


def test_a_daemon_that_only_receives_says_what_to_do(pair: DaemonPair) -> None:
    with daemon_pair() as narrow:
        reply = narrow.destination.client.ask_once(commands.Migrate(guest="vm1", to=narrow.address))
        assert isinstance(reply, commands.Failed)
        assert reply.exit_code == 3
        assert "only takes guests in: to let them move on, run it as `migd serve`" in reply.error


def test_events_tell_both_directions_in_order(pair: DaemonPair) -> None:
    guest = pair.guest("told", ram="4Mi", workload="idle")
    since = [0, 0]
    for position, daemon in enumerate((pair.source, pair.destination)):
        since[position] = [reply.seq for reply in daemon.client.ask(commands.Events())][-1]
    result = pair.migrate(guest.name).result
    for daemon, seq, direction in zip((pair.source, pair.destination), since, ("out", "in"), strict=True):
        assert daemon.wait(guest.name) == 0
        eventually(lambda d=daemon, s=seq: "migration-finished" in types(d, s), "the end to be told")
        told = list(daemon.client.ask(commands.Events(since=seq)))
        assert [event.seq for event in told] == list(range(seq + 1, seq + 1 + len(told)))
        mine = [event for event in told if getattr(event, "migration", "") == result.migration]
        assert type(mine[0]).__name__ == "MigrationBegan"
        assert type(mine[-1]).__name__ == "MigrationFinished"
        assert (mine[-1].outcome, mine[-1].exit_code, mine[-1].direction) == ("completed", 0, direction)
        states = [event.state for event in mine if isinstance(event, StateEntered)]
        if direction == "out":
            assert states == result.states
            iterations = [event.iteration for event in mine if type(event).__name__ == "IterationEnded"]
            assert iterations == result.iterations
        else:
            assert states == [str(state) for state in DestinationState if state not in ("aborted", "failed")]
    pair.discard(guest.name)


def types(daemon: DaemonProcess, since: int) -> list[str]:
    return [event.__struct_config__.tag for event in daemon.client.ask(commands.Events(since=since))]
