"""The shared bandwidth as tasks wait for it: turns come, and changes reach those who wait."""

from __future__ import annotations

import asyncio

import pytest

from migd.sizes import UNLIMITED
from migd.transport.bandwidth import MigrationBandwidth, SharedBandwidth
from migd.wire import messages
from migd.wire.protocol import FrameType
from tests.transport.lines import ID, Clock, connected

MB = 10**6
HOURS = 100 * 1000 * MB
"""Of bytes: at any limit used here nobody lives to see their turn, unless something changes."""


def shared(limit_bytes_s: int) -> SharedBandwidth:
    return SharedBandwidth(limit_bytes_s, Clock())


async def soon(waiting: asyncio.Task[None]) -> None:
    """It returns, and long before its turn would have come."""
    await asyncio.wait_for(waiting, 10)


async def still(waiting: asyncio.Task[None]) -> None:
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done


async def test_what_is_within_the_limit_goes_at_once_and_the_rest_when_its_time_has_come() -> None:
    clock, line = Clock(), shared(10 * MB)
    flow, began_s = line.open(), Clock().now()
    for _ in range(30):
        await flow.take(100_000)
    assert 10 * MB * (clock.now() - began_s + 0.06) >= 3 * MB


async def test_without_a_limit_nobody_waits() -> None:
    flow = shared(UNLIMITED).open(UNLIMITED)
    for _ in range(1000):
        await flow.take(HOURS)


@pytest.mark.parametrize("whose", ["daemon", "migration"])
async def test_a_limit_that_is_raised_reaches_a_stream_that_waits(whose: str) -> None:
    line = shared(MB if whose == "daemon" else UNLIMITED)
    flow = line.open(UNLIMITED if whose == "daemon" else MB)
    waiting = asyncio.create_task(flow.take(HOURS))
    await still(waiting)
    (line if whose == "daemon" else flow).change(UNLIMITED)
    await soon(waiting)
    assert (line.limit_bytes_s, flow.limit_bytes_s) == (UNLIMITED, UNLIMITED)


async def test_a_limit_that_is_lowered_counts_for_what_comes() -> None:
    line = shared(UNLIMITED)
    flow = line.open()
    await flow.take(HOURS)
    assert flow.rate_bytes_s == flow.frame_bytes == float("inf")
    line.change(MB)
    assert (flow.rate_bytes_s, flow.frame_bytes) == (MB, MB / 10)
    waiting = asyncio.create_task(flow.take(HOURS))
    await still(waiting)
    waiting.cancel()
    await asyncio.wait({waiting})


async def test_who_is_cancelled_holds_nobody_up() -> None:
    line = shared(MB)
    flow = line.open()
    first, second = asyncio.create_task(flow.take(HOURS)), asyncio.create_task(flow.take(100))
    await still(second)
    first.cancel()
    await soon(second)
    await asyncio.wait({first})
    flow.close()


async def test_migrations_take_turns() -> None:
    """Eight streams of one get no more than the single stream of another."""
    line = shared(2 * MB)
    taken = {"many": 0, "one": 0}

    enough = asyncio.Event()

    async def stream(flow: MigrationBandwidth, name: str) -> None:
        while True:
            await flow.take(20_000)
            taken[name] += 1
            if sum(taken.values()) == 100:
                enough.set()

    many, one = line.open(), line.open()
    streams = [asyncio.create_task(stream(many, "many")) for _ in range(8)]
    streams.append(asyncio.create_task(stream(one, "one")))
    await asyncio.wait_for(enough.wait(), 30)
    for task in streams:
        task.cancel()
    await asyncio.wait(streams)
    assert taken["one"] >= 35, taken


async def test_frames_get_smaller_the_more_migrations_there_are() -> None:
    line = shared(8 * MB)
    flows = [line.open() for _ in range(4)]
    assert flows[0].frame_bytes == 200_000
    for flow in flows[1:]:
        flow.close()
    assert flows[0].frame_bytes == 800_000


# -- a link ---------------------------------------------------------------------------------------------


async def test_a_link_waits_for_what_it_has_sent_but_messages_never_do() -> None:
    line = shared(MB)
    flow = line.open()
    async with connected(flow) as (link, peer):
        await link.send(messages.Ready(migration=ID))
        state = memoryview(bytes(500_000))
        await link.send_state(state)
        assert (await peer.hear()).type is FrameType.READY
        assert len((await peer.hear()).metadata) == len(state)
        waiting = asyncio.create_task(link.send_runs(FrameType.ZERO, [(0, 1)]))
        await still(waiting)
        await link.send(messages.Ready(migration=ID))
        assert (await peer.hear()).type is FrameType.READY
        flow.change(UNLIMITED)
        await soon(waiting)
        assert (await peer.hear()).type is FrameType.ZERO


async def test_what_a_limit_allowed_before_it_was_lowered_is_not_held_against_a_link() -> None:
    """5 MB at 100 KB/s would be 50 s, in which the migration looks stalled."""
    flow = shared(UNLIMITED).open()
    async with connected(flow) as (link, peer):
        for _ in range(10):
            await link.send_state(memoryview(bytes(500_000)))
            await peer.hear()
        flow.change(100_000)
        await asyncio.wait_for(link.turn(), 20)
