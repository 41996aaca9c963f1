"""What QEMU says unasked."""

from __future__ import annotations

import asyncio
import time

import pytest

from migd.qemu.monitor import Monitor
from tests.support.qemu import Hatchery

_NOW_S = 10.0
"""The tolerance between QEMU's clock and ours is that of a busy machine."""


async def test_an_event_that_is_expected_comes_with_its_moment(new_qemus: Hatchery) -> None:
    async with new_qemus.start().monitor() as monitor:
        with monitor.expecting("STOP") as stopped, monitor.expecting("RESUME") as resumed:
            await monitor.ask("stop")
            event = await asyncio.wait_for(stopped, _NOW_S)
            assert (event.name, event.status) == ("STOP", "")
            assert event.at_ns / 1e9 == pytest.approx(time.time(), abs=_NOW_S)
            assert not resumed.done()
            await monitor.ask("cont")
            assert (await asyncio.wait_for(resumed, _NOW_S)).at_ns > event.at_ns


async def test_what_came_before_is_not_what_is_expected(new_qemus: Hatchery) -> None:
    async with new_qemus.start().monitor() as monitor:
        await _events_on(monitor)
        with monitor.expecting("MIGRATION") as begun, monitor.expecting("MIGRATION", "failed") as failed:
            await monitor.ask("migrate", {"uri": "exec:false"})
            assert (await asyncio.wait_for(begun, _NOW_S)).status == "setup"
            assert (await asyncio.wait_for(failed, _NOW_S)).status == "failed"
        with monitor.expecting("MIGRATION") as again:
            await asyncio.sleep(0.05)
            assert not again.done()
        assert again.cancelled(), "nobody waits for it any more"


async def _events_on(monitor: Monitor) -> None:
    await monitor.ask("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
