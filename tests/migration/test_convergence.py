"""The convergence policy as tables: what is left, what was used up, and the decision."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.migration.convergence import (
    HINT_MIN_SHARE,
    RATE_MEMORY_BYTES,
    SWITCHOVER_OVERHEAD_S,
    Decision,
    Exhausted,
    Policy,
    RecentRate,
    Standing,
    decide,
    estimated_pause_s,
    hints_pay,
)

MB, GB = 10**6, 10**9
POLICY = Policy(downtime_limit_s=0.3, max_iterations=30, max_total_s=300.0, on_exhausted=Exhausted.FORCE)
CANCELLING = replace(POLICY, on_exhausted=Exhausted.CANCEL)
OVERHEAD = SWITCHOVER_OVERHEAD_S


@pytest.mark.parametrize(
    ("policy", "iterations", "elapsed_s", "left", "rate", "decision"),
    [
        # nothing is left, or it fits
        (POLICY, 1, 1.0, 0, 1.0 * GB, Decision.SWITCHOVER),
        (POLICY, 1, 1.0, 0, 0.0, Decision.SWITCHOVER),
        (POLICY, 1, 1.0, 290 * MB, 1.0 * GB, Decision.SWITCHOVER),
        (POLICY, 1, 1.0, 4096, 1.0 * GB, Decision.SWITCHOVER),
        # it does not fit, and there is time
        (POLICY, 1, 1.0, 300 * MB, 1.0 * GB, Decision.ITERATE),
        (POLICY, 1, 1.0, 4096, 0.0, Decision.ITERATE),
        (POLICY, 29, 299.9, 1 * GB, 1.0 * GB, Decision.ITERATE),
        # it fits, although everything is used up
        (POLICY, 30, 999.0, 290 * MB, 1.0 * GB, Decision.SWITCHOVER),
        (CANCELLING, 30, 999.0, 0, 1.0 * GB, Decision.SWITCHOVER),
        # iterations or time are used up
        (POLICY, 30, 1.0, 1 * GB, 1.0 * GB, Decision.FORCE),
        (POLICY, 31, 1.0, 1 * GB, 1.0 * GB, Decision.FORCE),
        (POLICY, 1, 300.0, 1 * GB, 1.0 * GB, Decision.FORCE),
        (CANCELLING, 30, 1.0, 1 * GB, 1.0 * GB, Decision.CANCEL),
        (CANCELLING, 1, 300.0, 1 * GB, 1.0 * GB, Decision.CANCEL),
        (CANCELLING, 30, 1.0, 4096, 0.0, Decision.CANCEL),
    ],
)
def test_decide(
    policy: Policy, iterations: int, elapsed_s: float, left: int, rate: float, decision: Decision
) -> None:
    assert decide(policy, Standing(iterations, elapsed_s, left, rate)) is decision


@pytest.mark.parametrize(
    ("policy", "iterations", "left", "fixed_s", "decision"),
    [
        # the harvest is part of the pause
        (POLICY, 1, 100 * MB, 0.19, Decision.SWITCHOVER),
        (POLICY, 1, 100 * MB, 0.2, Decision.ITERATE),
        (POLICY, 1, 0, 0.3, Decision.SWITCHOVER),
        # it is longer than the limit: iterate only while what is left is the larger part
        (POLICY, 1, 2 * GB, 1.0, Decision.ITERATE),
        (POLICY, 1, 1 * GB, 1.0, Decision.FORCE),
        (POLICY, 1, 0, 1.0, Decision.FORCE),
        (POLICY, 30, 2 * GB, 1.0, Decision.FORCE),
        (CANCELLING, 1, 2 * GB, 1.0, Decision.ITERATE),
        (CANCELLING, 1, 1 * GB, 1.0, Decision.CANCEL),
        (CANCELLING, 1, 0, 1.0, Decision.CANCEL),
    ],
)
def test_a_harvest_that_costs(
    policy: Policy, iterations: int, left: int, fixed_s: float, decision: Decision
) -> None:
    assert decide(policy, Standing(iterations, 1.0, left, 1.0 * GB, fixed_s)) is decision


def test_the_limit_itself_still_fits() -> None:
    left = int((POLICY.downtime_limit_s - OVERHEAD) * GB)
    assert decide(POLICY, Standing(1, 0.0, left, 1.0 * GB)) is Decision.SWITCHOVER
    assert decide(POLICY, Standing(1, 0.0, left + MB, 1.0 * GB)) is Decision.ITERATE


@pytest.mark.parametrize(
    ("left", "rate", "pause_s"),
    [
        (0, 0.0, OVERHEAD),
        (0, 1.0 * GB, OVERHEAD),
        (1 * GB, 1.0 * GB, 1 + OVERHEAD),
        (1, 0.0, float("inf")),
        (1, -1.0, float("inf")),
    ],
)
def test_estimated_pause(left: int, rate: float, pause_s: float) -> None:
    assert estimated_pause_s(Standing(1, 0.0, left, rate)) == pytest.approx(pause_s)
    assert estimated_pause_s(Standing(1, 0.0, left, rate, 2.0)) == pytest.approx(pause_s + 2)


@given(
    iterations=st.integers(0, 100),
    elapsed_s=st.floats(0, 1000),
    left=st.integers(0, 1 << 40),
    rate=st.floats(0, 1e11),
    fixed_s=st.floats(0, 1),
    policy=st.sampled_from([POLICY, CANCELLING]),
)
def test_every_run_comes_to_an_end_and_a_pause_is_long_only_by_force(
    iterations: int, elapsed_s: float, left: int, rate: float, fixed_s: float, policy: Policy
) -> None:
    decision = decide(policy, Standing(iterations, elapsed_s, left, rate, fixed_s))
    if decision is Decision.ITERATE:
        assert iterations < policy.max_iterations
        assert elapsed_s < policy.max_total_s
    if decision is Decision.SWITCHOVER:
        assert fixed_s <= policy.downtime_limit_s
    if decision is Decision.SWITCHOVER and left:
        assert left / rate + fixed_s <= policy.downtime_limit_s
    assert (decision is Decision.FORCE) <= (policy is POLICY)
    assert (decision is Decision.CANCEL) <= (policy is CANCELLING)


@pytest.mark.parametrize(
    ("applied", "asked", "left", "rate", "pays"),
    [
        (1000, 10_000, 1 * GB, 1.0 * GB, True),
        (200, 10_000, 1 * GB, 1.0 * GB, True),  # exactly the least share
        (199, 10_000, 1 * GB, 1.0 * GB, False),
        (0, 10_000, 1 * GB, 1.0 * GB, False),
        (1000, 10_000, 30 * MB, 1.0 * GB, False),  # a tenth of the limit: not worth asking about
        (1000, 10_000, 31 * MB, 1.0 * GB, True),
        (1000, 10_000, 0, 1.0 * GB, False),
        (1000, 10_000, 31 * MB, 0.0, True),  # nothing was sent yet: any rest is worth it
    ],
)
def test_hints_pay(applied: int, asked: int, left: int, rate: float, pays: bool) -> None:
    assert HINT_MIN_SHARE == 0.02
    assert hints_pay(applied, asked, left, POLICY, rate) is pays


@pytest.mark.parametrize(("left", "pays"), [(8 * 200 * 4096, True), (8 * 200 * 4096 - 4096, False)])
def test_a_guest_that_writes_in_order_to_answer_is_not_asked_about_a_few_pages(left: int, pays: bool) -> None:
    strict = replace(POLICY, downtime_limit_s=0.01)
    assert hints_pay(1000, 1000, left, strict, 0.5 * GB, answer_bytes=200 * 4096) is pays
    assert hints_pay(1000, 1000, left, strict, 0.5 * GB)


@pytest.mark.parametrize(
    ("applied", "left", "pays"),
    [
        (1000, 50 * MB, True),  # all was free: waiting takes as long as sending
        (1000, 49 * MB, False),
        (500, 99 * MB, False),  # half of it was
        (500, 100 * MB, True),
    ],
)
def test_an_answer_that_took_longer_than_sending_would_is_not_asked_for(
    applied: int, left: int, pays: bool
) -> None:
    assert hints_pay(applied, 1000, left, POLICY, 1.0 * GB, answer_s=0.05) is pays
    assert hints_pay(applied, 1000, left, POLICY, 1.0 * GB)


# -- the rate -------------------------------------------------------------------------------------------


def test_no_rate_is_known_before_anything_was_sent() -> None:
    assert RecentRate().bytes_s == 0


def test_the_rate_is_that_of_late() -> None:
    """A limit that was lifted is forgotten after as many bytes as are looked back on."""
    rate = RecentRate()
    rate.add(100 * MB, 100.0)
    assert rate.bytes_s == pytest.approx(1 * MB)
    for _ in range(3):
        rate.add(50 * MB, 0.05)
    assert rate.bytes_s > 10 * MB
    rate.add(RATE_MEMORY_BYTES, RATE_MEMORY_BYTES / GB)
    assert rate.bytes_s == pytest.approx(1 * GB)


def test_a_few_pages_that_a_socket_buffer_swallowed_do_not_make_a_link_fast() -> None:
    rate = RecentRate()
    rate.add(200 * MB, 20.0)
    for _ in range(10):
        rate.add(40_960, 1e-6)
    assert rate.bytes_s == pytest.approx(10 * MB, rel=0.02)
