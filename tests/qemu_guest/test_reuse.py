"""Memory that changes hands while it is moved: free when it was asked for, used later; and the other way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.lab.workbench import MIB, LabError, Workload
from migd.migration.state import SourceState
from tests.qemu_guest.travel import BUSY_BYTES_S, HOG_BYTES
from tests.support.vm import Journey, route
from tests.support.vm_site import Lab

pytestmark = pytest.mark.timeout(300)

_GRAB_BYTES = 64 * MIB
_GRAB_PAGES = _GRAB_BYTES // 4096
_ITERATES = {"downtime_limit_ms": 13.0, "max_iterations": 4}
"""A guest that always writes is not paused before it has been iterated for."""
_BULK_BYTES_S = 60_000_000
_SLOW_BYTES_S = 4_000_000
"""So much is written meanwhile that asking again pays, and sending it takes longer than an answer."""
_TRIES = 2
_HOG_S = 2.0


@pytest.fixture(scope="module", params=["init_on_free=0", "init_on_free=1"])
def journey(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Journey]:
    with route(hint_first_s=0.05) as road:
        found = road.journey("vm1", lab.recipe(ram_bytes=320 * MIB, append=(request.param,))).boot()
        found.ask("rate", bytes_s=BUSY_BYTES_S)
        yield found


@pytest.fixture(autouse=True)
def littered(journey: Journey) -> None:
    journey.litter()


def test_pages_that_were_free_and_are_used_again_are_moved(journey: Journey) -> None:
    leg = journey.begin(SourceState.ITERATING, **_ITERATES)
    with leg.held(SourceState.ITERATING):
        journey.ask("grab", bytes=_GRAB_BYTES)
    result = leg.arrive()
    assert result.hints_applied > 0
    assert result.iterations[1].dirty_pages > _GRAB_PAGES // 2, "what had been called free was written"
    assert journey.ask("release") == {"wrong": False}
    journey.litter()
    journey.check()


def test_pages_that_were_sent_and_are_free_later_are_zero_at_the_destination(journey: Journey) -> None:
    journey.litter(HOG_BYTES)  # or most of what is free was never touched here: hints would be of no use
    journey.ask("grab", bytes=_GRAB_BYTES)
    options = _ITERATES | {"max_iterations": 2, "max_bandwidth_bytes_s": _BULK_BYTES_S}
    leg = journey.begin(SourceState.ITERATING, SourceState.PAUSING, **options)
    with leg.held(SourceState.ITERATING):
        assert journey.ask("release") == {"wrong": False}
        leg.limit(_SLOW_BYTES_S)
    with leg.held(SourceState.PAUSING):
        journey.ask("status")  # who goes first in the guest is the agent: its answer has come
        leg.limit(0)
    result = leg.arrive()
    assert result.free_records > 0, result.iterations
    if journey.recipe.append == ("init_on_free=0",):  # else they are written when they are freed
        assert result.free_records > _GRAB_PAGES // 2, result.iterations
    journey.litter()
    journey.check()


def test_a_hog_may_come_and_go_at_any_moment(journey: Journey) -> None:
    for _ in range(_TRIES):
        journey.hang_up()
        hog = threading.Thread(target=_hog, args=(journey.here.directory(journey.name) / "lab",))
        hog.start()
        journey.move(hints=None, **_ITERATES)
        hog.join()
        journey.litter()
        journey.check()


def _hog(port: Path) -> None:
    """Its answer may be lost: the guest is moving."""
    with contextlib.suppress(LabError), Workload(port) as workload:
        workload.ask("hog", _HOG_S, bytes=_GRAB_BYTES)
