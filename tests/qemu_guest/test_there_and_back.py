"""A busy guest goes there and back three times; between two versions of QEMU, if there are two."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migd.lab.workbench import MIB
from tests.qemu_guest.travel import BUSY_BYTES_S
from tests.support.vm import Journey, route
from tests.support.vm_site import Lab

pytestmark = pytest.mark.timeout(300)

_TIMES = 3


def test_a_busy_guest_goes_there_and_back_three_times(lab: Lab) -> None:
    """As its command lines name the machine type of the older QEMU, the two can take it from each other.

    With RAM as migd makes it by default. Its agent drops the page cache, before the first migration: the
    others come so soon that it takes them for the same.
    """
    old, new = lab.oldest, lab.newest
    here = lab.recipe(
        old,
        machine=f"pc-i440fx-{old.version[0]}.{old.version[1]}",
        ram_bytes=384 * MIB,
        append=("migd.agent_args=--drop-caches,--verbose",),
    )
    with route(memfd=True) as road:
        journey = road.journey("vm1", here, replace(here, emulator=new)).boot()
        journey.ask("rate", bytes_s=BUSY_BYTES_S)
        console = journey.here.console(journey.name)
        _busy_leg(journey)
        assert "page cache dropped: MemFree" in console.read_text(errors="replace")
        assert _version(journey) == new.version
        for _ in range(2 * _TIMES - 1):
            _busy_leg(journey)
        assert _version(journey) == old.version


def _version(journey: Journey) -> tuple[int, ...]:
    found = journey.here.ask_qemu(journey.name, "query-version")["qemu"]
    return (found["major"], found["minor"], found["micro"])


def _busy_leg(journey: Journey) -> None:
    journey.litter()
    result = journey.move()
    assert result.skipped_free_pages > 0
    assert result.resent_pages > 0, "it writes all the time"
