"""Cancel in every phase where it is possible, and stop daemons in the middle: the guest runs on (G1, G5)."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from migd.control import commands
from migd.migration.state import CANCELLABLE, DestinationState, SourceState
from tests.support.pair import DaemonPair, daemon_pair, eventually, finish, migd, ram_digest
from tests.support.scene import Scene, name_of, scene

PHASES = sorted(CANCELLABLE - {SourceState.WAITING}, key=list(SourceState).index)
"""For WAITING see ``test_a_guest_that_waits_for_its_verdict_can_be_cancelled``."""


@pytest.fixture(scope="module")
def cancelled() -> Iterator[Scene]:
    """A guest in each cancellable phase; ``migd cancel`` for each, a second one for each, then they go on."""
    with scene(PHASES) as stage:
        for phase in PHASES:
            output = stage.pair.cancel(name_of(phase))
            assert output.exit_code == 0, output
            assert output.stdout == f"cancelling {stage.migrations[name_of(phase)]}\n"
        stage.pair.source.release_all()
        yield stage


@pytest.mark.parametrize("phase", PHASES)
def test_after_a_cancel_the_guest_runs_on_and_can_be_migrated(cancelled: Scene, phase: SourceState) -> None:
    pair, name = cancelled.pair, name_of(phase)
    ended = pair.ended(name)
    assert ended.state == SourceState.CANCELLED, ended
    again = pair.cancel(name)
    assert again.exit_code == 1
    assert again.complaint == f"migd: '{name}' is in no migration that leaves from here"
    here = pair.source.guest(name)
    assert here is not None
    assert here.state == "running"
    before = ram_digest(here.pid)
    eventually(lambda: ram_digest(here.pid) != before, f"{name} to write")
    eventually(lambda: pair.destination.guest(name) is None, f"the destination to forget {name}")
    moved = pair.migrate(name)
    assert moved.exit_code == 0, moved
    assert (moved.result.outcome, moved.result.wrong_pages) == ("completed", 0)
    assert pair.checked(name)[1] == 0


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(held=True) as pair:
        yield pair


def test_whoever_asks_in_the_last_moments_of_a_migration_hears_how_it_ended(pair: DaemonPair) -> None:
    """It is over, and not in the history yet."""
    guest = pair.guest()
    pair.source.hold(SourceState.BULK)
    migration = pair.launch(guest.name)
    pair.source.wait_held(SourceState.BULK)
    pair.source.hold(SourceState.CANCELLED)
    assert pair.cancel(guest.name).exit_code == 0
    pair.source.release(SourceState.BULK)
    pair.source.wait_held(SourceState.CANCELLED)
    replies = pair.source.client.ask(commands.Attach(target=migration))
    first = next(replies)
    assert isinstance(first, commands.Moving), first
    pair.source.release(SourceState.CANCELLED)
    last = list(replies)[-1]
    assert isinstance(last, commands.Finished), last
    assert last.result.outcome == "cancelled"


def test_a_migration_right_after_a_cancelled_one_waits_for_the_destination_to_let_go(
    pair: DaemonPair,
) -> None:
    guest = pair.guest()
    pair.source.hold(SourceState.BULK)
    pair.launch(guest.name)
    pair.source.wait_held(SourceState.BULK)
    eventually(lambda: pair.destination.guest(guest.name), "the incoming guest")
    assert pair.destination.process is not None
    pair.destination.process.send_signal(signal.SIGSTOP)
    try:
        assert pair.cancel(guest.name).exit_code == 0
        pair.source.release(SourceState.BULK)
        assert pair.ended(guest.name).state == SourceState.CANCELLED
        again = pair.start_migration(guest.name)
        eventually(lambda: pair.source.migrations(guest.name)[-1].state == SourceState.CONNECTING, "HELLO")
    finally:
        pair.destination.process.send_signal(signal.SIGCONT)
    output = finish(again)
    assert output.exit_code == 0, output
    assert output.result.wrong_pages == 0
    pair.discard(guest.name)


def test_a_guest_whose_name_another_migration_brings_is_refused_in_good_time(pair: DaemonPair) -> None:
    """That one may be about to end, so the destination waits a little; less than the source does."""
    guest = pair.guest(workload="idle")
    pair.source.hold(SourceState.BULK)
    migration = pair.start_migration(guest.name)
    pair.source.wait_held(SourceState.BULK)
    with daemon_pair() as other:
        other.guest(guest.name, workload="idle")
        output = other.migrate(guest.name, "--to", pair.address)
        assert output.exit_code == 3
        assert f"the destination refused: a guest named '{guest.name}' is here already" in output.result.error
    pair.source.release(SourceState.BULK)
    assert finish(migration).exit_code == 0
    pair.discard(guest.name)


def test_ctrl_c_cancels_and_says_so(pair: DaemonPair) -> None:
    guest = pair.guest()
    pair.source.hold(SourceState.BULK)
    migration = pair.start_migration(guest.name)
    pair.source.wait_held(SourceState.BULK)
    migration.send_signal(signal.SIGINT)
    output = finish(migration)
    assert output.exit_code == 130
    assert output.stderr == "cancelling ...\n"
    assert output.result.outcome == "cancelled"
    assert output.result.states == ["connecting", "arming", "bulk", "aborting", "cancelled"]
    assert pair.migrate(guest.name).exit_code == 0
    pair.discard(guest.name)


def test_a_second_cancel_changes_nothing(pair: DaemonPair) -> None:
    guest = pair.guest()
    pair.source.hold(SourceState.PAUSING)
    pair.source.hold(SourceState.ABORTING)
    migration = pair.start_migration(guest.name)
    pair.source.wait_held(SourceState.PAUSING)
    assert pair.cancel(guest.name).exit_code == 0
    pair.source.wait_held(SourceState.ABORTING)
    again = pair.cancel(guest.name)
    assert again.exit_code == 1
    assert again.complaint == f"migd: {guest.name}: too late to cancel, the migration is aborting"
    pair.source.release_all()
    assert finish(migration).exit_code == 130
    assert pair.migrate(guest.name).exit_code == 0
    pair.discard(guest.name)


def test_after_go_it_is_too_late(pair: DaemonPair) -> None:
    guest = pair.guest()
    pair.source.hold(SourceState.GOING)
    migration = pair.start_migration(guest.name)
    pair.source.wait_held(SourceState.GOING)
    refused = pair.cancel(guest.name)
    assert refused.exit_code == 1
    assert refused.complaint == f"migd: {guest.name}: too late to cancel, the migration is going"
    pair.source.release_all()
    assert finish(migration).exit_code == 0
    over = pair.cancel(guest.name)
    assert over.exit_code == 1
    assert over.complaint == f"migd: '{guest.name}' is in no migration that leaves from here"
    pair.discard(guest.name)


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_daemon_told_to_stop_ends_its_migration_first(role: str) -> None:
    with daemon_pair(held=True) as pair:
        guest = pair.guest()
        pair.source.hold(SourceState.BULK)
        migration = pair.start_migration(guest.name)
        pair.source.wait_held(SourceState.BULK)
        eventually(lambda: pair.destination.guest(guest.name), "the incoming guest")
        stopped, other = pair.source, pair.destination
        if role == "destination":
            stopped, other = other, stopped
        assert stopped.stop() == 0
        output = finish(migration)
        if role == "source":
            assert output.exit_code == 130
        else:
            assert output.exit_code == 1
            assert "the destination daemon is shutting down" in output.result.error
        assert other.status().role == other.role
        pair.source.release_all()
        stopped.restart()
        eventually(lambda: pair.destination.guest(guest.name) is None, "the destination to forget it")
        eventually(lambda: len(pair.copies(guest.name)) == 1, "the incoming guest to end")
        here = eventually(lambda: pair.source.guest(guest.name), "the guest to be back")
        assert here.state == "running"
        assert pair.migrate(guest.name).result.wrong_pages == 0
        assert pair.checked(guest.name)[1] == 0


def test_a_daemon_that_has_sent_go_brings_the_hand_over_to_its_end_before_it_stops() -> None:
    with daemon_pair(held=True) as pair:
        guest = pair.guest()
        pair.source.hold(SourceState.GOING)
        migration = pair.start_migration(guest.name)
        pair.source.wait_held(SourceState.GOING)
        assert pair.source.process is not None
        pair.source.process.terminate()
        pair.source.release_all()
        output = finish(migration)
        assert output.exit_code == 0, output
        assert pair.source.process.wait(10) == 0
        assert pair.checked(guest.name)[1] == 0
        assert guest.wait() == 0


def test_a_started_guest_outlives_the_daemon_that_started_it() -> None:
    with daemon_pair() as pair:
        guest = pair.guest()
        assert pair.migrate(guest.name).exit_code == 0
        there = pair.destination.guest(guest.name)
        assert there is not None
        assert pair.destination.stop() == 0
        before = ram_digest(there.pid)
        eventually(lambda: ram_digest(there.pid) != before, "the guest to write without a daemon")
        pair.destination.restart()
        back = eventually(lambda: pair.destination.guest(guest.name), "the guest to come back")
        assert (back.state, back.pid) == ("running", there.pid)


def test_the_destination_gives_up_a_guest_whose_go_does_not_come() -> None:
    """It may abort by itself until GO arrives, and a late GO is refused (G2, G3)."""
    with daemon_pair(destination="[limits]\ngo_s = 0.5\n", held=True) as pair:
        guest = pair.guest()
        pair.source.hold(SourceState.GOING)
        migration = pair.start_migration(guest.name)
        pair.source.wait_held(SourceState.GOING)
        eventually(
            lambda: pair.destination.migrations(guest.name)[-1].state == DestinationState.ABORTED,
            "the destination to give up",
        )
        pair.source.release_all()
        output = finish(migration)
        assert output.exit_code == 1
        assert "the destination aborted: no GO within 0.5 s" in output.result.error
        here = pair.source.guest(guest.name)
        assert here is not None
        assert here.state == "running"


def test_what_is_not_in_doubt_needs_no_resolving(pair: DaemonPair) -> None:
    guest = pair.guest(workload="idle")
    output = pair.resolve(guest.name)
    assert output.exit_code == 1
    assert output.complaint == f"migd: {guest.name}: nothing to resolve, the guest is running"
    unknown = migd("resolve", "nobody", "--runtime-dir", pair.source.directory)
    assert unknown.exit_code == 1
    assert "no guest 'nobody' is attached here" in unknown.complaint
    pair.discard(guest.name)
