"""Whatever fails before GO: a real guest runs on, QEMU is as before, and a second migration succeeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from migd.control import commands
from migd.migration.state import SourceState
from tests.support.pair import eventually
from tests.support.vm import Journey, Leg, route
from tests.support.vm_site import Lab, Site

pytestmark = pytest.mark.timeout(300)

_OWN = {"auto-converge": True, "events": False, "multifd": True, "x-ignore-shared": False}
_OWN_BANDWIDTH = 12_345_678


@pytest.fixture(scope="module")
def moved(lab: Lab) -> Iterator[Journey]:
    with route() as road:
        yield road.journey("vm1", lab.recipe()).boot()


@pytest.fixture
def journey(moved: Journey) -> Iterator[Journey]:
    """With migration settings of its QEMU's own. In the end it leaves for the other site after all."""
    _choose(moved.here)
    own = moved.settings()
    assert own["capabilities"] | _OWN == own["capabilities"]
    moved.litter()
    yield moved
    assert moved.settings() == own, "they are as they were"
    moved.move()
    assert not any(moved.settings()["capabilities"].values()), "this QEMU was started with none of them"


def _choose(site: Site) -> None:
    chosen = [{"capability": name, "state": state} for name, state in _OWN.items()]
    site.ask_qemu("vm1", "migrate-set-capabilities", capabilities=chosen)
    site.ask_qemu("vm1", "migrate-set-parameters", **{"max-bandwidth": _OWN_BANDWIDTH})


def _cancel(leg: Leg) -> None:
    reply = leg.source.daemon.client.ask_once(commands.Cancel(target=leg.migration))
    assert isinstance(reply, commands.Done), reply


def _kill_daemon(leg: Leg) -> None:
    """That of the destination, which comes back."""
    leg.destination.daemon.kill()
    leg.destination.daemon.restart()


def _kill_qemu(leg: Leg) -> None:
    """That of the destination."""
    os.kill(eventually(lambda: leg.destination.qemu("vm1"), "QEMU at the destination"), signal.SIGKILL)


def _kill_companion(leg: Leg) -> None:
    """That of the destination."""
    eventually(lambda: leg.destination.qemu("vm1"), "QEMU at the destination")
    os.kill(leg.destination.companion("vm1"), signal.SIGKILL)


@pytest.mark.parametrize("blow", [_cancel, _kill_daemon, _kill_qemu, _kill_companion])
@pytest.mark.parametrize("state", [SourceState.BULK, SourceState.SWITCHOVER])
def test_the_guest_runs_on_where_it_is(
    journey: Journey, state: SourceState, blow: Callable[[Leg], None]
) -> None:
    leg = journey.begin(state)
    with leg.held(state):
        blow(leg)
    result = leg.fail()
    assert result.error
    assert result.outcome == ("cancelled" if blow is _cancel else "failed")


@pytest.mark.parametrize("blow", [_cancel, _kill_daemon, _kill_qemu, _kill_companion])
def test_even_when_it_is_loaded_at_the_destination(journey: Journey, blow: Callable[[Leg], None]) -> None:
    leg = journey.begin()
    leg.compare()
    blow(leg)
    leg.fail()


def test_a_destination_with_another_machine_type_says_which_one_it_has_to_be(journey: Journey) -> None:
    there = journey.there
    there.prepare("vm1", replace(journey.recipe, machine="q35"))
    assert "start QEMU with -machine pc-i440fx" in journey.begin().fail().error
    there.prepare("vm1", journey.recipe)
