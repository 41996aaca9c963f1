"""The shared bandwidth as a pure policy: limits hold, nobody starves, and nothing is left unused."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.migration.bandwidth import BURST_S, Bucket, Claim, FairShare, Flow, rate_of

MB = 10**6
NO_LIMIT = math.inf
FRAME = 100_000


@dataclass
class Line:
    """The streams of several migrations that send frame after frame, each as soon as its last was granted."""

    share: FairShare
    now_s: float = 0.0
    sent: dict[Flow, int] = field(default_factory=lambda: defaultdict(int))
    log: list[tuple[float, Flow, int]] = field(default_factory=list)
    _sizes: dict[Flow, Callable[[], int]] = field(default_factory=dict)

    def flow(
        self, streams: int, rate_bytes_s: float = NO_LIMIT, size: Callable[[], int] = lambda: FRAME
    ) -> Flow:
        """A migration whose streams always have something to send."""
        flow = self.share.open(rate_bytes_s, self.now_s)
        self._sizes[flow] = size
        for _ in range(streams):
            self.share.ask(flow, size(), self.now_s)
        return flow

    def stop(self, flow: Flow) -> None:
        """It has nothing to send any more."""
        for claim in list(flow.waiting):
            self.share.withdraw(claim)

    def run(self, seconds: float, late_s: float = 0.0) -> None:
        """Let time pass; ``late_s`` is how late every timer fires."""
        end = self.now_s + seconds
        while True:
            self._grant()
            wait_s = self.share.wait_s(self.now_s)
            assert wait_s > 0, "granted all that could go, and yet something can"
            if self.now_s + wait_s + late_s > end:
                self.now_s = end
                return
            self.now_s += wait_s + late_s

    def _grant(self) -> None:
        while granted := self.share.grant(self.now_s):
            for claim in granted:
                self.sent[claim.flow] += claim.size_bytes
                self.log.append((self.now_s, claim.flow, claim.size_bytes))
                self.share.ask(claim.flow, self._sizes[claim.flow](), self.now_s)


def line(rate_bytes_s: float) -> Line:
    return Line(FairShare(rate_bytes_s, 0.0))


# -- one limit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, 30_000, 2_000_000])
def test_a_limit_is_used_up_and_not_exceeded(size: int) -> None:
    lane = line(1 * MB)
    flow = lane.flow(3, size=lambda: size)
    lane.run(10)
    assert 10 * MB - size <= lane.sent[flow] <= (10 + BURST_S) * MB + 1


def test_timers_that_fire_late_cost_nothing() -> None:
    lane = line(1 * MB)
    flow = lane.flow(2, size=lambda: 10_000)
    lane.run(10, late_s=BURST_S / 2)
    assert 9.9 * MB <= lane.sent[flow] <= (10 + BURST_S) * MB


def test_a_pause_is_not_made_up_for() -> None:
    lane = line(1 * MB)
    flow = lane.flow(1, size=lambda: 1000)
    lane.run(1)
    lane.stop(flow)
    lane.run(100)
    before = lane.sent[flow]
    lane.share.ask(flow, 1000, lane.now_s)
    lane.run(1)
    assert lane.sent[flow] - before <= (1 + BURST_S) * MB


def test_a_frame_larger_than_the_burst_is_saved_up_for_and_goes_whole() -> None:
    share = FairShare(1 * MB, 0.0)
    flow = share.open(NO_LIMIT, 0.0)
    claim = share.ask(flow, 1 * MB, 0.0)
    assert share.grant(0.0) == []
    assert share.wait_s(0.0) == pytest.approx(1 - BURST_S)
    assert share.grant(0.9) == []
    assert share.grant(1 - BURST_S + 1e-9) == [claim]


def test_no_limit_holds_nobody_up() -> None:
    share = FairShare(NO_LIMIT, 0.0)
    flow = share.open(NO_LIMIT, 0.0)
    claims = [share.ask(flow, 1 << 40, 0.0) for _ in range(5)]
    assert share.grant(0.0) == claims
    assert share.wait_s(0.0) == math.inf


def test_0_is_no_limit() -> None:
    assert rate_of(0) == math.inf
    assert rate_of(5 * MB) == 5 * MB


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(1 * MB, 100.0)
    bucket.spend(1 * MB)
    before = bucket.wait_s(0)
    bucket.refill(50.0)
    assert bucket.wait_s(0) == before


# -- several migrations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [(1, 64), (2, 2), (1, 5, 16)])
def test_migrations_share_evenly_however_many_streams_they_have(streams: tuple[int, ...]) -> None:
    lane = line(1 * MB)
    flows = [lane.flow(count, size=lambda: 10_000) for count in streams]
    lane.run(20)
    fair = 20 * MB / len(flows)
    for flow in flows:
        assert lane.sent[flow] == pytest.approx(fair, rel=0.02)


def test_bytes_are_shared_and_not_frames() -> None:
    lane = line(1 * MB)
    small, large = lane.flow(4, size=lambda: 1000), lane.flow(1, size=lambda: 200_000)
    lane.run(20)
    assert lane.sent[large] == pytest.approx(lane.sent[small], rel=0.03)


def test_what_one_does_not_use_the_others_get() -> None:
    lane = line(1 * MB)
    slow, *others = (lane.flow(n, rate, lambda: 10_000) for n, rate in ((8, MB / 10), (1, NO_LIMIT), (4, MB)))
    lane.run(20)
    assert lane.sent[slow] == pytest.approx(2 * MB, rel=0.03)
    for flow in others:
        assert lane.sent[flow] == pytest.approx(9 * MB, rel=0.03)


def test_limits_of_their_own_that_add_up_to_the_shared_one_are_all_reached() -> None:
    lane = line(1 * MB)
    flows = [lane.flow(2, 0.25 * MB, lambda: 60_000) for _ in range(4)]
    lane.run(40)
    for flow in flows:
        assert lane.sent[flow] == pytest.approx(10 * MB, rel=0.05)


def test_a_limit_of_its_own_that_equals_the_shared_one_does_not_make_a_migration_wait_twice() -> None:
    lane = line(1 * MB)
    flow = lane.flow(1, 1 * MB, lambda: 250_000)
    lane.run(20)
    assert lane.sent[flow] == pytest.approx(20 * MB, rel=0.02)


def test_a_single_stream_that_asks_anew_a_moment_later_is_not_put_last() -> None:
    """It builds its next frame meanwhile; timers that are late grant several frames of others at once."""
    share, now_s = FairShare(1 * MB, 0.0), 0.0
    many, one = share.open(NO_LIMIT, 0.0), share.open(NO_LIMIT, 0.0)
    for _ in range(20):
        share.ask(many, 10_000, 0.0)
    share.ask(one, 10_000, 0.0)
    sent: dict[Flow, int] = defaultdict(int)
    for _ in range(500):
        now_s += 0.04
        granted = share.grant(now_s)
        for claim in granted:
            sent[claim.flow] += claim.size_bytes
        now_s += 0.004
        for claim in granted:
            share.ask(claim.flow, 10_000, now_s)
    assert len(granted) > 3
    assert sent[one] == 500 * 10_000, "each time it asked"


def test_one_that_was_idle_claims_nothing_back() -> None:
    lane = line(1 * MB)
    first, second = lane.flow(1), lane.flow(1)
    lane.run(1)
    lane.stop(second)
    lane.run(50)
    before = {first: lane.sent[first], second: lane.sent[second]}
    lane.share.ask(second, FRAME, lane.now_s)
    lane.run(10)
    for flow in (first, second):
        assert lane.sent[flow] - before[flow] == pytest.approx(5 * MB, rel=0.05)


def test_neither_does_one_that_its_own_limit_held_back() -> None:
    lane = line(1 * MB)
    first, second = lane.flow(1), lane.flow(1, 1000, lambda: 1000)
    lane.run(50)
    lane.share.change_flow(second, NO_LIMIT, lane.now_s)
    before = {first: lane.sent[first], second: lane.sent[second]}
    lane.run(10)
    for flow in (first, second):
        assert lane.sent[flow] - before[flow] == pytest.approx(5 * MB, rel=0.05)


def test_one_that_comes_later_shares_from_then_on() -> None:
    lane = line(1 * MB)
    first = lane.flow(16)
    lane.run(30)
    before = lane.sent[first]
    second = lane.flow(1)
    lane.run(10)
    assert lane.sent[first] - before == pytest.approx(5 * MB, rel=0.05)
    assert lane.sent[second] == pytest.approx(5 * MB, rel=0.05)


def test_within_a_migration_it_is_first_come_first_served() -> None:
    share = FairShare(1 * MB, 0.0)
    flow = share.open(NO_LIMIT, 0.0)
    claims = [share.ask(flow, FRAME, 0.0) for _ in range(4)]
    granted: list[Claim] = []
    for moment in range(100):
        granted += share.grant(moment / 10)
    assert granted == claims


def test_a_claim_that_is_withdrawn_takes_nothing() -> None:
    share = FairShare(1 * MB, 0.0)
    flow = share.open(NO_LIMIT, 0.0)
    gone, stays = share.ask(flow, 50 * MB, 0.0), share.ask(flow, 10_000, 0.0)
    assert share.grant(0.0) == []
    share.withdraw(gone)
    assert share.grant(0.0) == [stays]
    share.withdraw(stays)  # too late, and no harm
    share.close(flow)
    assert share.wait_s(0.0) == math.inf


# -- changes while they run -----------------------------------------------------------------------------


def test_a_higher_limit_counts_at_once_for_one_that_waits() -> None:
    share = FairShare(1000, 0.0)
    flow = share.open(NO_LIMIT, 0.0)
    claim = share.ask(flow, 1 * MB, 0.0)
    assert share.grant(1.0) == []
    assert share.wait_s(1.0) > 900
    share.change(10 * MB, 1.0)
    assert share.wait_s(1.0) < 0.1
    assert share.grant(1.1) == [claim]


def test_a_lower_limit_counts_at_once_and_takes_back_what_was_saved() -> None:
    lane = line(100 * MB)
    flow = lane.flow(1, size=lambda: 10_000)
    lane.run(1)
    lane.share.change(1 * MB, lane.now_s)
    before = lane.sent[flow]
    lane.run(10)
    assert lane.sent[flow] - before <= (10 + BURST_S) * MB


@pytest.mark.parametrize("shared", [True, False])
def test_a_limit_that_is_lifted_and_set_again(shared: bool) -> None:
    lane = line(1 * MB if shared else NO_LIMIT)
    flow = lane.flow(1, NO_LIMIT if shared else 1 * MB)

    def change(rate_bytes_s: float) -> None:
        if shared:
            lane.share.change(rate_bytes_s, lane.now_s)
        else:
            lane.share.change_flow(flow, rate_bytes_s, lane.now_s)

    lane.run(1)
    change(NO_LIMIT)
    assert lane.share.wait_s(lane.now_s) == 0
    assert lane.share.rate_of(flow) == NO_LIMIT
    change(2 * MB)
    assert lane.share.rate_of(flow) == 2 * MB
    before = lane.sent[flow]
    lane.run(10)
    assert lane.sent[flow] - before == pytest.approx(20 * MB, rel=0.02)


def test_what_a_migration_can_count_on() -> None:
    share = FairShare(12 * MB, 0.0)
    first, second, third = (share.open(rate, 0.0) for rate in (NO_LIMIT, 2 * MB, 50 * MB))
    assert [share.rate_of(flow) for flow in (first, second, third)] == [12 * MB, 2 * MB, 12 * MB]
    assert [share.part_of(flow) for flow in (first, second, third)] == [4 * MB, 2 * MB, 4 * MB]
    share.close(third)
    assert share.part_of(first) == 6 * MB


# -- whatever comes -------------------------------------------------------------------------------------

_RATES = st.sampled_from([1e5, 1e6, 7e6, NO_LIMIT])
_SIZES = st.integers(1, 2 << 20)
_STEP = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 3), _SIZES),
    st.tuples(st.just("pass"), st.integers(0, 3), st.integers(0, 2_000_000)),
    st.tuples(st.just("withdraw"), st.integers(0, 3), st.just(0)),
)


@given(shared=_RATES, own=st.lists(_RATES, min_size=1, max_size=4), steps=st.lists(_STEP, max_size=60))
def test_in_any_order_of_events_no_limit_is_exceeded_and_everybody_is_served(
    shared: float, own: list[float], steps: list[tuple[str, int, int]]
) -> None:
    share, now_s = FairShare(shared, 0.0), 0.0
    flows = [share.open(rate, 0.0) for rate in own]
    waiting: set[Claim] = set()
    sent: dict[Flow, int] = defaultdict(int)

    def grant() -> None:
        for claim in share.grant(now_s):
            waiting.remove(claim)
            sent[claim.flow] += claim.size_bytes
        assert sum(sent.values()) <= shared * (now_s + BURST_S) + 1
        for flow, rate in zip(flows, own, strict=True):
            assert sent[flow] <= rate * (now_s + BURST_S) + 1

    for what, number, amount in steps:
        flow = flows[number % len(flows)]
        if what == "ask":
            waiting.add(share.ask(flow, amount, now_s))
        elif what == "pass":
            now_s += amount / 1e6
        elif flow.waiting:
            claim = flow.waiting[-1]
            share.withdraw(claim)
            waiting.remove(claim)
        grant()
    for _ in range(1000):  # every wait is said to the end, and everybody's turn comes
        if not waiting:
            break
        wait_s = share.wait_s(now_s)
        assert 0 < wait_s < math.inf
        now_s += wait_s
        grant()
    assert not waiting
    assert share.wait_s(now_s) == math.inf
