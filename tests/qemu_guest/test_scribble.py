"""The hints alone: a guest lives on if all it calls free is overwritten, and dies if the rule is broken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migd.lab.workbench import Booted, LabError, boot
from tests.qemu_guest.scribble import GRAB_BYTES, GRAB_PAGES, ask, live_through, scribbling, tracked
from tests.support.vm_site import WAIT_S, Lab

pytestmark = pytest.mark.timeout(300)

_DEAD_S = 5.0
"""A guest that has not answered in this time will not."""


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Booted]:
    with boot(tracked(lab.recipe())) as booted:
        booted.await_ready(WAIT_S)
        yield booted


async def test_what_is_free_and_not_written_since_may_hold_anything(guest: Booted) -> None:
    await live_through(guest, 6, zeros=False)


async def test_where_free_memory_is_cleared_it_may_hold_zeros(lab: Lab) -> None:
    """The guest relies on them, and migd leaves nothing else behind at the destination (R11)."""
    with boot(tracked(lab.recipe(append=("init_on_free=1",)))) as booted:
        booted.await_ready(WAIT_S)
        await live_through(booted, 2, zeros=True)


async def test_without_the_rule_the_guest_does_not_live(guest: Booted) -> None:
    """So the tests above can fail: what was free a moment ago is in use by now."""
    async with scribbling(guest.qmp) as scribbler:
        await scribbler.contract()
        await scribbler.listen()
        await ask(guest, "grab", bytes=GRAB_BYTES)
        done = await scribbler.strike(obey=False)
        assert done.scribbled == done.hinted
        assert done.written > GRAB_PAGES // 2, "it is overwritten all the same"
        assert await _is_broken(guest)


async def _is_broken(guest: Booted) -> bool:
    """It does not even answer, or finds its memory wrong."""
    try:
        return bool((await ask(guest, "release", _DEAD_S))["wrong"])
    except LabError:
        return True
