"""The suite's share of the simulation: many seeds, that they repeat, and that they find what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from migd.migration.state import DestinationState, SourceState
from tests.simulation.faults import KINDS
from tests.simulation.many import run_some
from tests.simulation.mutants import WRONG_VERSIONS, WrongVersion
from tests.simulation.runner import Report, quick_collections, run_seed

_SEEDS = 250
_RARE = {"out waiting", "out unknown", "in failed"}
"""One seed in fifty or so has these states."""
_REPEATED = (3, 17, 41)
_MUTANT_SEEDS = 300
_REPOSITORY = Path(__file__).parents[2]


def _told(report: Report) -> str:
    lines = "\n".join([f"seed {report.seed}: {report.plan}", *report.trace[-30:], *report.wrongs])
    return f"{lines}\nagain: scripts/simulate --seed {report.seed}"


@pytest.mark.timeout(300)
def test_every_promise_holds_whatever_goes_wrong() -> None:
    figures = run_some(0, _SEEDS, faults=True)
    assert not figures.failures, _told(figures.failures[0])
    # So that a simulation in which nothing happens is noticed.
    assert figures.starts > _SEEDS
    assert figures.compared_pages > 32 * figures.starts
    assert set(figures.faults) == set(KINDS)
    assert {"out completed", "out failed", "out cancelled", "in aborted"} <= set(figures.outcomes)
    every = {f"out {state}" for state in SourceState} | {f"in {state}" for state in DestinationState}
    assert every - set(figures.states) <= _RARE


@pytest.mark.timeout(300)
def test_migrations_that_nothing_disturbs() -> None:
    figures = run_some(10_000, 50, faults=False)
    assert not figures.failures, _told(figures.failures[0])
    assert figures.outcomes["out completed"] > 100
    assert not figures.faults


@pytest.mark.parametrize("seed", _REPEATED)
def test_a_seed_repeats_exactly(seed: int) -> None:
    once, again = run_seed(seed), run_seed(seed)
    assert once.trace == again.trace
    assert once.digest == again.digest
    assert once.digest != run_seed(seed + 1).digest


def test_a_seed_repeats_in_another_process() -> None:
    """Whatever its hash seed is."""
    code = f"from tests.simulation.runner import run_seed\nfor s in {_REPEATED}: print(run_seed(s).digest)"
    for hash_seed in ("1", "4711"):
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        assert told.stdout.split() == [run_seed(seed).digest for seed in _REPEATED]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", WRONG_VERSIONS, ids=lambda version: version.number)
def test_a_wrong_version_is_noticed(version: WrongVersion, capsys: pytest.CaptureFixture[str]) -> None:
    with quick_collections():
        report = version.found(_MUTANT_SEEDS)
    assert report is not None, f"{version.number} survived {_MUTANT_SEEDS} seeds: {version.bug}"
    with capsys.disabled():
        print(f"\n{version.number} ({version.bug}): seed {report.seed}: {report.wrongs[0]}")  # noqa: T201  # the trace of its death
