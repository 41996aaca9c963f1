"""kill -9 around a real guest: of its daemon, its companion, both, and its QEMU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from migd.control import commands
from migd.migration.state import DestinationState, SourceState
from migd.wire.protocol import Keeper
from tests.support.pair import eventually
from tests.support.vm import Journey, Leg, route
from tests.support.vm_site import WAIT_S, Lab, Site

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def journey(lab: Lab) -> Iterator[Journey]:
    with route(go_s=6.0) as road:
        yield road.journey("vm1", lab.recipe()).boot()


def _paused(journey: Journey) -> Leg:
    """A migration whose guest stands still at its source."""
    journey.litter()
    leg = journey.begin(SourceState.SWITCHOVER)
    leg.wait_held(SourceState.SWITCHOVER)
    assert not journey.here.runs("vm1")
    return leg


def _kill_companion(site: Site) -> None:
    """And the daemon has noticed, if there is one."""
    os.kill(site.companion("vm1"), signal.SIGKILL)
    eventually(lambda: site.daemon.guest("vm1") is None, "the guest to be missed", WAIT_S)


def _stand_beside_again(journey: Journey) -> None:
    site = journey.here
    site.stand_beside("vm1", "--qmp", str(site.directory("vm1") / "qmp"))
    journey.attached(site)


def _runs_on(journey: Journey) -> None:
    """At its source, right, with QEMU's own settings, and then it moves."""
    eventually(lambda: journey.here.runs("vm1"), "the guest to run", WAIT_S)
    assert not any(journey.settings()["capabilities"].values())
    journey.there.daemon.release_all()
    journey.check()
    eventually(lambda: journey.there.qemu("vm1") is None, "the end of QEMU at the destination", WAIT_S)
    journey.litter()
    journey.move()


def test_the_daemon_is_killed_while_its_guest_is_paused(journey: Journey) -> None:
    """G1: it stays paused until the daemon is back, and is resumed as the journal holds no GO."""
    _paused(journey)
    journey.here.daemon.kill()
    assert not journey.here.runs("vm1")
    journey.here.daemon.restart()
    _runs_on(journey)


def test_the_companion_is_killed_while_its_guest_is_paused(journey: Journey) -> None:
    leg = _paused(journey)
    _kill_companion(journey.here)
    assert not journey.here.runs("vm1")
    journey.here.daemon.release_all()
    assert leg.result().outcome == "failed"
    _stand_beside_again(journey)
    _runs_on(journey)


def test_both_are_killed_while_the_guest_is_paused(journey: Journey) -> None:
    _paused(journey)
    journey.here.daemon.kill()
    _kill_companion(journey.here)
    assert not journey.here.runs("vm1")
    journey.here.daemon.restart()
    _stand_beside_again(journey)
    _runs_on(journey)


def test_the_companion_is_killed_while_the_guest_runs(journey: Journey) -> None:
    _kill_companion(journey.here)
    assert journey.here.runs("vm1")
    journey.check()
    _stand_beside_again(journey)
    _runs_on(journey)


def test_the_companion_is_killed_while_memory_is_sent(journey: Journey) -> None:
    leg = journey.begin(SourceState.BULK)
    with leg.held(SourceState.BULK):
        _kill_companion(journey.here)
    assert leg.result().outcome == "failed"
    assert journey.here.runs("vm1")
    _stand_beside_again(journey)
    _runs_on(journey)


def test_the_daemon_of_the_destination_is_killed_after_the_guest_has_arrived(journey: Journey) -> None:
    journey.litter()
    journey.move()
    journey.here.daemon.kill()
    journey.check()
    journey.here.daemon.restart()
    journey.attached(journey.here)
    _runs_on(journey)


def test_an_operator_brings_a_guest_back_that_was_lost_while_it_was_started(journey: Journey) -> None:
    """G3: GO was sent, and what it was sent for is gone: nobody knows, until somebody decides."""
    site, there = journey.here, journey.there
    journey.litter()
    leg = journey.begin()
    leg.compare()
    there.daemon.hold(DestinationState.STARTING)
    leg.release()
    there.daemon.wait_held(DestinationState.STARTING)
    _kill_companion(there)
    there.daemon.release(DestinationState.STARTING)
    result = leg.result()
    assert (result.outcome, result.exit_code) == ("unknown", 4)
    assert not site.runs("vm1")
    assert there.qemu("vm1") is None
    resolve = commands.Resolve(target="vm1", keeper=Keeper.SOURCE)
    reply = site.daemon.client.ask_once(resolve)
    assert isinstance(reply, commands.Done), reply
    _runs_on(journey)


def test_a_qemu_that_is_killed_takes_its_guest_with_it_and_nothing_is_left(journey: Journey) -> None:
    leg = journey.begin(SourceState.BULK)
    pid = journey.here.qemu("vm1")
    assert pid is not None
    with leg.held(SourceState.BULK):
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: journey.here.daemon.guest("vm1") is None, "the guest to be missed", WAIT_S)
    result = leg.result()
    assert (result.outcome, result.exit_code) == ("failed", 1)
    journey.there.daemon.release_all()
    for site in (journey.here, journey.there):
        eventually(lambda site=site: site.qemu("vm1") is None, "the end of every QEMU", WAIT_S)
        eventually(lambda site=site: not list(site.ram.iterdir()), "the end of its RAM", WAIT_S)
