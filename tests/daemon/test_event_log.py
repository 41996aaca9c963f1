"""EventLog: numbers without a gap, a bound, and readers of any speed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from migd.control.events import Event, GuestDetached, Missed
from migd.daemon.event_log import EventLog


def filled(events: int, remembered: int = 5) -> EventLog:
    log = EventLog("serve", remembered)
    for pid in range(1, events + 1):
        log.add(GuestDetached(guest="vm1", pid=pid))
    return log


def told(events: list[Event]) -> list[int]:
    """The numbers; negative, how many were missed."""
    return [-event.events if isinstance(event, Missed) else event.seq for event in events]


def test_events_are_numbered_and_dated() -> None:
    (event,) = filled(1).since(0)
    assert isinstance(event, GuestDetached)
    assert (event.schema, event.seq, event.daemon, event.guest, event.pid) == (1, 1, "serve", "vm1", 1)
    assert event.time.endswith("Z")
    age = datetime.now(UTC) - datetime.fromisoformat(event.time)
    assert 0 <= age.total_seconds() < 60


def test_what_came_after_a_number() -> None:
    log = filled(5)
    assert told(log.since(0)) == [1, 2, 3, 4, 5]
    assert told(log.since(3)) == [4, 5]
    assert told(log.since(5)) == []


def test_what_is_forgotten_is_counted() -> None:
    log = filled(12)
    assert told(log.since(0)) == [-7, 8, 9, 10, 11, 12]
    assert told(log.since(6)) == [-1, 8, 9, 10, 11, 12]
    assert told(log.since(7)) == [8, 9, 10, 11, 12]
    assert log.since(0)[0].seq == 7, "a reader goes on behind the gap"


def test_a_number_from_before_a_restart_tells_everything() -> None:
    assert told(filled(2).since(900)) == [1, 2]


async def test_a_follower_hears_what_comes_and_that_nothing_does() -> None:
    log = filled(2)
    reader = log.follow(1, silence_s=0.01)
    assert told(await anext(reader)) == [2]
    assert await anext(reader) == []
    waiting = asyncio.ensure_future(anext(log.follow(2, silence_s=60)))
    await asyncio.sleep(0)
    log.add(GuestDetached(guest="vm1", pid=3))
    assert told(await waiting) == [3]
    assert told(await anext(reader)) == [3]


async def test_a_slow_follower_is_told_how_many_it_missed_and_others_miss_nothing() -> None:
    log = filled(0)
    slow, fast = log.follow(0, silence_s=60), log.follow(0, silence_s=60)
    heard: list[int] = []
    for pid in range(1, 21):
        log.add(GuestDetached(guest="vm1", pid=pid))
        heard += told(await anext(fast))
    assert heard == list(range(1, 21))
    assert told(await anext(slow)) == [-15, 16, 17, 18, 19, 20]
