"""G6: every wait is bounded, and the configured bounds are sane."""

from __future__ import annotations

import math

import msgspec
import pytest

from migd.limits import Limits


def test_the_starting_values() -> None:
    assert msgspec.structs.asdict(Limits()) == {
        "connect_s": 10.0, "hello_s": 5.0, "begin_s": 10.0, "ping_s": 2.0, "dead_s": 10.0, "progress_s": 15.0,
        "hint_first_s": 0.05, "hint_window_s": 2.0, "guest_s": 2.0, "ready_s": 30.0, "go_s": 10.0,
        "verdict_s": 60.0, "check_s": 60.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", Limits.__struct_fields__)
@pytest.mark.parametrize("value", [-1, math.inf, math.nan, 86_401, "2", True])
def test_every_limit_is_a_number_of_seconds_that_bounds(name: str, value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.convert({name: value}, Limits)


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_no_limit_but_the_first_hint_wait_can_be_zero(name: str) -> None:
    if name == "hint_first_s":
        assert msgspec.convert({name: 0}, Limits).hint_first_s == 0
        return
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.convert({name: 0}, Limits)


def test_a_peer_must_be_able_to_answer_a_ping_before_it_is_dead() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"dead_s \(2\) must be more than ping_s \(2\)"):
        msgspec.convert({"dead_s": 2}, Limits)
    assert msgspec.convert({"dead_s": 2, "ping_s": 0.5}, Limits).dead_s == 2


def test_limits_travel_to_the_status_page_and_back() -> None:
    assert msgspec.json.decode(msgspec.json.encode(Limits()), type=Limits) == Limits()
