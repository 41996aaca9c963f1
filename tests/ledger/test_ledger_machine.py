"""Random histories of up to 64 pages lose none; and with a wrong ledger, or a wrong world, they do.

Each seed has its own histories. ``MIGD_SEEDS=2000`` in the environment takes that many seeds; a failure names
the seed, and prints the steps, made as few as can be.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.ledger import mutants
from tests.ledger.machine import LedgerMachine, PageForgotten
from tests.support.world import World

SEEDS = int(os.environ.get("MIGD_SEEDS", "12"))
HISTORIES = settings(
    max_examples=10,  # of a seed: with more, Hypothesis varies those that it has
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ONE_LOSS = settings(HISTORIES, phases=[Phase.generate])


def run(number: int, how: settings, wrong: type[Any] | None = None) -> None:
    class Machine(LedgerMachine):
        ledger = wrong or LedgerMachine.ledger

    run_state_machine_as_test(seed(number)(Machine), settings=how)


@pytest.mark.parametrize("number", range(SEEDS))
def test_no_history_forgets_a_page(number: int) -> None:
    run(number, HISTORIES)


def found_out(wrong: type[Any] | None) -> bool:
    for number in range(20):
        try:
            run(number, ONE_LOSS, wrong)
        except PageForgotten:
            return True
    return False


LEDGERS = [
    mutants.AppliesLateHints,
    mutants.FreesAheadOfTheBarrier,
    mutants.NeverSendsZeroRecords,
    mutants.TakesAnOldLookForHoles,
]


@pytest.mark.parametrize("wrong", LEDGERS)
def test_a_history_finds_a_wrong_ledger_out(wrong: type[Any]) -> None:
    assert found_out(wrong)


def test_a_history_finds_a_log_out_that_does_not_see_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """W13: the last of several pages written at once is not logged."""
    write = World.write

    def write_beside_the_log(world: World, *pages: int, content: int | None = None) -> None:
        write(world, *pages, content=content)
        world.kernel -= set(pages[-1:])

    monkeypatch.setattr(World, "write", write_beside_the_log)
    assert found_out(None)
