"""What an operator changes while a session runs: its next decision knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from migd.migration.convergence import Exhausted, Policy
from migd.migration.state import ADJUSTABLE, SourceState
from migd.source.attempt import SourceOptions
from tests.support.scripted_guest import Joined, ScriptedGuest, joined

MB = 10**6
S = SourceState


def limit(sides: Joined, bytes_s: int) -> None:
    assert sides.bandwidth is not None
    sides.bandwidth.change(bytes_s)


@pytest.mark.parametrize(("bytes_s", "live"), [(0, False), (1 * MB, True)])
async def test_the_estimate_of_the_pause_knows_the_limit(tmp_path: Path, bytes_s: int, live: bool) -> None:
    """400 KB left, and a link that was fast so far: at 1 MB/s they go while the guest runs."""
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:

        def write() -> None:
            guest.write(*range(100))
            limit(sides, bytes_s)

        guest.at_harvest = {1: write}
        result = await sides.migrate(SourceOptions(hints=False, policy=Policy(downtime_limit_s=0.3)))
        assert (result.outcome, result.wrong_pages) == ("completed", 0)
        assert [iteration.live for iteration in result.iterations] == [True, live]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"downtime_limit_s": 60.0}, "completed"),
        ({"max_iterations": 2}, "completed"),
        ({"max_total_s": 1e-9}, "completed"),
        ({"max_iterations": 2, "on_exhausted": Exhausted.CANCEL}, "failed"),
    ],
)
async def test_a_policy_that_is_changed_on_the_way(
    tmp_path: Path, change: dict[str, object], outcome: str
) -> None:
    """The guest writes without end; the change comes after the second iteration and ends it there."""
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:

        def write_and_change() -> None:
            guest.write(1, 2, 3)
            assert sides.session is not None
            assert sides.session.change_policy(replace(sides.session.policy, **change))  # type: ignore[arg-type]

        guest.at_harvest = {number: lambda: guest.write(1) for number in range(1, 1000)}
        guest.at_harvest[2] = write_and_change
        endless = Policy(downtime_limit_s=1e-9, max_iterations=10**6, max_total_s=10**6)
        result = await sides.migrate(SourceOptions(policy=endless))
        assert (result.outcome, result.wrong_pages or 0) == (outcome, 0)
        assert sum(iteration.live for iteration in result.iterations) == 2


async def test_a_policy_can_change_until_the_guest_is_paused(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    could: dict[str, bool] = {}
    async with joined(guest, tmp_path) as sides:

        def note(state: SourceState) -> None:
            assert sides.session is not None
            could[state] = sides.session.change_policy(Policy())

        for state in S:
            sides.at_source.at[state] = lambda state=state: note(state)
        result = await sides.migrate()
        assert result.outcome == "completed"
        assert {state for state, could_be in could.items() if could_be} == ADJUSTABLE & set(could)
        assert {S.CONNECTING, S.ARMING, S.BULK} <= ADJUSTABLE
        assert not could[S.PAUSING]
        assert not could[S.COMPLETED]
