"""Ways that are not the usual one: paused, unhinted, verified otherwise, compared, awaited by a QEMU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.vm import Journey, Route, route
from tests.support.vm_site import Lab

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def road() -> Iterator[Route]:
    with route() as made:
        yield made


@pytest.fixture(scope="module")
def journey(lab: Lab, road: Route) -> Journey:
    return road.journey("vm1", lab.recipe()).boot()


@pytest.fixture(autouse=True)
def littered(request: pytest.FixtureRequest) -> None:
    if "journey" in request.fixturenames:
        request.getfixturevalue("journey").litter()


def test_a_byte_that_changed_on_the_way_is_found(journey: Journey) -> None:
    """Not by migd, which has verified what it sent: by the comparison that all these tests rest on."""
    leg = journey.begin()
    leg.compare()
    ram = next(leg.destination.ram.iterdir())
    page = _first_page_with_content(ram.read_bytes())
    with (
        _another_byte(ram, page * 4096 + 17),
        pytest.raises(AssertionError, match=rf"1 wrong pages: \[{page}\]"),
    ):
        leg.compare()
    leg.arrive()


def _first_page_with_content(ram: bytes) -> int:
    """Above the first MiB."""
    return next(at for at in range(1 << 20, len(ram), 4096) if any(ram[at : at + 4096])) // 4096


@contextmanager
def _another_byte(ram: Path, at: int) -> Iterator[None]:
    with ram.open("r+b", buffering=0) as image:
        right = os.pread(image.fileno(), 1, at)
        os.pwrite(image.fileno(), bytes([right[0] ^ 1]), at)
        yield
        os.pwrite(image.fileno(), right, at)


@pytest.mark.parametrize("verify", ["strict", "late", "off"])
def test_it_is_verified_when_that_was_asked_for(journey: Journey, verify: str) -> None:
    result = journey.move(verify=verify)
    assert result.verification == ("off" if verify == "off" else f"{verify}: ok")
    assert result.skipped_free_pages > 0


def test_paused_all_the_time_it_needs_no_log_and_no_hints(journey: Journey) -> None:
    result = journey.move(live=False, hints=None)
    assert (result.live, result.dirty_log, len(result.iterations)) == (False, "none (paused)", 1)
    assert result.skipped_free_pages == 0


def test_nothing_is_left_behind_if_nobody_asks(journey: Journey) -> None:
    leg = journey.begin(hints=False)
    result = leg.arrive(hints="off")
    assert leg.compared is not None
    assert (result.skipped_free_pages, leg.compared.left) == (0, 0)


def test_a_qemu_in_readiness_takes_the_guest_in(journey: Journey) -> None:
    site = journey.there
    monitor = site.start_qemu(journey.name, journey.recipe, "-incoming", "defer", "-S")
    companion = site.stand_beside(journey.name, "--qmp", str(monitor))
    assert journey.attached(site).state == "incoming"
    journey.move()
    assert companion.poll() is None, "it is the one that the guest has arrived at"
    journey.litter()
    journey.move()
    assert companion.wait() == 0, "QEMU has ended, and it with it"


def test_a_qemu_without_the_preload_is_compared_and_says_what_it_lacks(lab: Lab, road: Route) -> None:
    journey = road.journey("vm2", lab.recipe()).found_by_companion(tracked=False)
    journey.litter()
    leg = journey.begin()
    result = leg.arrive(hints=None)
    assert leg.compared is not None
    assert (result.dirty_log, result.skipped_free_pages, leg.compared.left) == ("compare", 0, 0)
    assert "LD_PRELOAD" in result.hints, result.hints
    journey.litter()
    assert journey.move().dirty_log == "userfaultfd", "this QEMU was started by migd"
