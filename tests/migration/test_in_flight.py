"""Room for frames in flight as a pure policy: everybody's turn comes, and no peer has all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.migration.in_flight import IN_FLIGHT_BYTES, FrameRoom, Request, Tenant, frames_in_flight
from migd.wire.protocol import MAX_PAYLOAD_BYTES


def test_both_directions_together_are_64_mib() -> None:
    assert IN_FLIGHT_BYTES == 64 << 20
    assert frames_in_flight(1) * MAX_PAYLOAD_BYTES == 64 << 20
    assert 2 * frames_in_flight(2) * MAX_PAYLOAD_BYTES == 64 << 20


def granted(room: FrameRoom, *requests: Request) -> list[bool]:
    room.grant()
    return [request.granted for request in requests]


@pytest.mark.parametrize(
    ("frames", "parts"), [(16, [8, 4, 2, 1, 1, 0]), (32, [16, 8, 4, 2, 1, 1, 0]), (1, [1, 0])]
)
def test_whoever_comes_next_gets_half_of_what_is_free(frames: int, parts: list[int]) -> None:
    """Each as greedy as can be, and none gives anything back: stalled peers with 64 streams each."""
    room = FrameRoom(frames)
    for part in parts:
        assert sum(granted(room, *[room.ask(tenant) for tenant in [Tenant()] * 64])) == part


def test_one_that_gives_back_is_followed_by_the_first_that_may() -> None:
    room, greedy, modest = FrameRoom(2), Tenant(), Tenant()
    held, more = room.ask(greedy), room.ask(greedy)
    assert granted(room, held, more) == [True, False]
    first = room.ask(modest)
    assert granted(room, first, more) == [True, False]
    room.give_back(first)
    assert granted(room, more) == [False], "it holds as much as is free"
    room.give_back(held)
    assert granted(room, more) == [True]


def test_a_request_that_is_withdrawn_or_given_back_twice() -> None:
    room, tenant = FrameRoom(1), Tenant()
    held, gone, next_ = room.ask(tenant), room.ask(Tenant()), room.ask(Tenant())
    room.grant()
    room.give_back(gone)
    room.give_back(held)
    room.give_back(held)
    assert granted(room, gone, next_) == [False, True]
    assert (room.free_frames, tenant.frames, room.waiting) == (0, 0, False)


_STEP = st.tuples(st.sampled_from(["ask", "give back"]), st.integers(0, 5), st.integers(0, 99))


@given(frames=st.integers(1, 8), steps=st.lists(_STEP, max_size=120))
def test_in_any_order_of_events_nothing_is_lost_and_everybody_gets_room(
    frames: int, steps: list[tuple[str, int, int]]
) -> None:
    room, tenants = FrameRoom(frames), [Tenant() for _ in range(6)]
    asked: list[Request] = []
    for what, number, which in steps:
        if what == "ask":
            asked.append(room.ask(tenants[number]))
        elif asked:
            room.give_back(asked.pop(which % len(asked)))
        room.grant()
        held = [request for request in asked if request.granted]
        assert len(held) + room.free_frames == frames
        for tenant in tenants:
            assert tenant.frames == sum(request.tenant is tenant for request in held)
    while asked:  # all who hold room give it back some time, and then nobody is left waiting
        done = [request for request in asked if request.granted]
        assert done, "all wait, and nobody holds anything"
        for request in done:
            asked.remove(request)
            room.give_back(request)
        room.grant()
    assert (room.free_frames, room.waiting) == (frames, False)
