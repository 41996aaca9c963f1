"""`migd resolve` against real daemons: condemned guests, lost ones, forced sides, restarts in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from migd.control import commands
from migd.migration.journal import Journal, Mark
from migd.migration.state import DestinationState, SourceState
from migd.wire.protocol import Keeper
from tests.support.pair import (
    DaemonPair,
    DaemonProcess,
    GuestProcess,
    daemon_pair,
    eventually,
    finish,
    migd,
    ram_digest,
    spoil,
)

LIMITS = "[limits]\ngo_s = 1.0\nverdict_s = 3.0\n"


@pytest.fixture
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(held=True, source=LIMITS, destination=LIMITS) as pair:
        yield pair


@dataclass(frozen=True)
class Said:
    """How `migd resolve` ends, without the time that Python takes to start."""

    exit_code: int
    text: str


def resolve(daemon: DaemonProcess, target: str, keeper: Keeper | None = None) -> Said:
    match daemon.client.ask_once(commands.Resolve(target=target, keeper=keeper)):
        case commands.Done(text=text):
            return Said(0, text)
        case commands.Finished(result=result):
            return Said(result.exit_code, result.error)
        case commands.Failed(error=error, exit_code=exit_code):
            return Said(exit_code, error)
        case reply:
            raise AssertionError(reply)


def condemned(pair: DaemonPair) -> tuple[GuestProcess, str]:
    """A guest whose paused RAM was written behind the log's back, found once it ran there; its migration."""
    guest = pair.guest(ram="8Mi", workload="churn")
    pair.source.hold(SourceState.VERIFYING)
    moving = pair.start_migration(guest.name, "--verify", "late")
    pair.source.wait_held(SourceState.VERIFYING)
    spoil(guest.pid)
    pair.source.release_all()
    output = finish(moving)
    assert output.exit_code == 5, output
    assert "the destination has paused its guest" in output.result.error
    return guest, output.result.migration


def marks(daemon: DaemonProcess, role: str, migration: str) -> list[Mark]:
    records = Journal(daemon.directory / "journal" / role).records(migration)
    return [record.mark for record in records]


def state(daemon: DaemonProcess, name: str) -> str:
    found = daemon.guest(name)
    return found.state if found is not None else ""


def moving(pids: list[int]) -> list[int]:
    """Which of these write to their RAM: by what is in it, not by what anybody says."""
    before = {pid: ram_digest(pid) for pid in pids}
    # One that runs writes all the time; nothing but another look can show that one does not.
    for _ in range(20):
        found = [pid for pid in pids if (now := ram_digest(pid)) and now != before[pid]]
        if found:
            return found
    return []


def runs_only_in(pair: DaemonPair, name: str, daemon: DaemonProcess) -> None:
    here = eventually(
        lambda: (found := daemon.guest(name)) and found.state == "running" and found.pid, f"{name} to run"
    )
    before = ram_digest(here)
    eventually(lambda: ram_digest(here) != before, f"{name} to write")
    assert set(moving(pair.copies(name))) <= {here}


def test_a_condemned_guest_stays_paused_through_every_restart_until_the_operator_decides(
    pair: DaemonPair,
) -> None:
    guest, migration = condemned(pair)
    assert marks(pair.source, "source", migration)[-1] is Mark.CONDEMNED
    assert marks(pair.destination, "destination", migration)[-1] is Mark.CONDEMNED
    for kill in ([pair.destination], [pair.source], [pair.source, pair.destination]):
        for daemon in kill:
            daemon.kill()
        for daemon in kill:
            daemon.restart()
        for daemon in (pair.source, pair.destination):
            eventually(lambda d=daemon: state(d, guest.name) == "paused", "the guest to come back")
            output = resolve(daemon, guest.name)
            assert output.exit_code == 5, output
            assert "--force-source" in output.text
            assert "--force-dest" in output.text
        assert len(pair.copies(guest.name)) == 2
        assert moving(pair.copies(guest.name)) == []
    output = migd("resolve", guest.name, "--force-source", "--json", "--runtime-dir", pair.source.directory)
    assert output.exit_code == 0, output
    assert "the guest runs on here" in json.loads(output.stdout)["text"]
    runs_only_in(pair, guest.name, pair.source)
    eventually(lambda: pair.copies(guest.name) == [guest.pid], "the other copy to end")
    assert marks(pair.destination, "destination", migration)[-1] is Mark.ABORTED
    assert resolve(pair.source, guest.name).exit_code == 1


def test_force_dest_at_the_source_has_the_condemned_guest_run_on_there(pair: DaemonPair) -> None:
    guest, migration = condemned(pair)
    assert resolve(pair.source, guest.name, Keeper.DESTINATION).exit_code == 0
    runs_only_in(pair, guest.name, pair.destination)
    assert guest.wait() == 0
    assert marks(pair.source, "source", migration)[-1] is Mark.RELEASED
    assert marks(pair.destination, "destination", migration)[-1] is Mark.VERIFIED
    pair.destination.kill()
    pair.destination.restart()
    runs_only_in(pair, guest.name, pair.destination)
    pair.discard(guest.name)


def test_the_operator_may_decide_at_the_destination_first(pair: DaemonPair) -> None:
    given_up, _ = condemned(pair)
    output = resolve(pair.destination, given_up.name, Keeper.SOURCE)
    assert output.exit_code == 0, output
    assert f"`migd resolve {given_up.name}` at its source" in output.text
    assert resolve(pair.source, given_up.name).exit_code == 0
    runs_only_in(pair, given_up.name, pair.source)
    kept, _ = condemned(pair)
    assert resolve(pair.destination, kept.name, Keeper.DESTINATION).exit_code == 0
    runs_only_in(pair, kept.name, pair.destination)
    refused = resolve(pair.source, kept.name, Keeper.SOURCE)
    assert refused.exit_code == 3, refused
    assert "runs on here, as was decided" in refused.text
    assert resolve(pair.source, kept.name, Keeper.DESTINATION).exit_code == 0
    assert kept.wait() == 0
    runs_only_in(pair, kept.name, pair.destination)
    pair.discard(kept.name)


def test_a_destination_that_never_comes_back_leaves_it_to_the_operator(pair: DaemonPair) -> None:
    """GO was sent, and nobody answers: also after a restart of the source."""
    guest = pair.guest(ram="8Mi", workload="churn")
    pair.source.hold(SourceState.GOING)
    moved = pair.start_migration(guest.name)
    pair.source.wait_held(SourceState.GOING)
    pair.destination.kill()
    pair.source.release_all()
    assert finish(moved).exit_code == 4
    assert resolve(pair.source, guest.name).exit_code == 4
    pair.source.kill()
    pair.source.restart()
    eventually(lambda: state(pair.source, guest.name) == "paused", "the guest to come back")
    assert resolve(pair.source, guest.name).exit_code == 4
    output = resolve(pair.source, guest.name, Keeper.SOURCE)
    assert output.exit_code == 0, output
    assert f"Make sure that it does not run at {pair.address}: there would be two" in output.text
    runs_only_in(pair, guest.name, pair.source)


def test_a_force_that_contradicts_the_destination_is_refused_and_the_truth_done(pair: DaemonPair) -> None:
    """The answer was lost: the session does not know that the guest runs there, nor does the operator."""
    guest = pair.guest(ram="8Mi", workload="churn")
    pair.destination.hold(DestinationState.STARTING)
    moved = pair.start_migration(guest.name)
    pair.destination.wait_held(DestinationState.STARTING)
    assert finish(moved).exit_code == 4
    pair.destination.release_all()
    refused = resolve(pair.source, guest.name, Keeper.SOURCE)
    assert refused.exit_code == 3, refused
    assert f"guest {guest.name} runs at {pair.address}" in refused.text
    assert guest.wait() == 0
    runs_only_in(pair, guest.name, pair.destination)
    pair.discard(guest.name)


def test_a_guest_that_was_lost_at_its_start_is_given_up_at_the_destination(pair: DaemonPair) -> None:
    guest = pair.guest(ram="8Mi", workload="churn")
    pair.destination.hold(DestinationState.STARTING)
    moved = pair.start_migration(guest.name)
    pair.destination.wait_held(DestinationState.STARTING)
    (copy,) = [pid for pid in pair.copies(guest.name) if pid != guest.pid]
    GuestProcess(guest.name, copy, pair.destination.directory / "none", None).kill()
    pair.destination.release_all()
    assert finish(moved).exit_code == 4
    lost = resolve(pair.source, guest.name, Keeper.DESTINATION)
    assert lost.exit_code == 3, lost
    assert "--force-dest would lose the guest" in lost.text
    explained = resolve(pair.destination, guest.name)
    assert explained.exit_code == 4, explained
    assert "its process is gone" in explained.text
    assert resolve(pair.destination, guest.name, Keeper.SOURCE).exit_code == 0
    assert resolve(pair.source, guest.name).exit_code == 1, "the migration's own result: it runs on here"
    runs_only_in(pair, guest.name, pair.source)


def test_the_two_options_exclude_each_other() -> None:
    output = migd("resolve", "vm1", "--force-source", "--force-dest")
    assert output.exit_code == 2
    assert "the guest can only run on one side" in output.stderr


def test_a_restarted_destination_still_waits_for_the_verdict() -> None:
    """The guest that was started before the restart does not move on before its verdict, or ``verdict_s``."""
    with daemon_pair(held=True, serve=True) as both:
        guest = both.guest(ram="8Mi", workload="churn")
        both.source.hold(SourceState.VERIFYING)
        first = both.start_migration(guest.name, "--verify", "late")
        both.source.wait_held(SourceState.VERIFYING)
        both.destination.kill()
        both.destination.restart()
        eventually(lambda: state(both.destination, guest.name) == "running", "the guest to come back")
        back = both.start_back(guest.name)
        eventually(
            lambda: any(found.direction == "out" for found in both.destination.migrations(guest.name)),
            "the second migration",
        )
        assert both.destination.migrations(guest.name)[-1].state == SourceState.WAITING
        spoil(guest.pid)
        both.source.release_all()
        assert finish(first).exit_code == 5
        output = finish(back)
        assert output.exit_code == 1
        assert "the verdict on its arrival was bad" in output.result.error
        assert state(both.destination, guest.name) == "paused"
