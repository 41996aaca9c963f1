"""A short soak: real daemons, real guests, every byte compared; and that it finds what is planted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from migd.ram.contract import FreeContract
from tests.soak.hinting import MANNERS, Manner
from tests.soak.plan import Plant, Trouble, changed, life_of, run_of, untroubled
from tests.soak.soak import Soak
from tests.soak.voyage import Voyage
from tests.soak.words import Behaviour
from tests.support.pair import ROOT, WAIT_S, eventually, processes_naming

SEED = 185
RUNS = 30
"""Two lives, with one of each contract that takes hints; every manner and every trouble is dealt in them."""


def test_thirty_moves_through_every_trouble_and_not_one_wrong_page(tmp_path: Path) -> None:
    soak = Soak(SEED, tmp_path, jobs=2)
    figures = soak.run(range(RUNS))
    assert soak.failures == []
    assert (figures.runs, figures.completed, figures.comparisons) == (RUNS, RUNS, RUNS)
    assert (figures.wrong_pages, figures.problems, figures.rescued_pages) == (0, 0, 0)
    assert figures.owned_pages > RUNS * 500
    assert figures.bytes == (figures.owned_pages + figures.free_pages) * 4096
    assert figures.skipped_pages
    assert figures.free_records
    assert figures.hints_stale
    assert figures.hints_rejected
    assert figures.failed_on_purpose
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_seed_has_everything_in_it_and_is_always_the_same() -> None:
    runs = [run_of(SEED, number) for number in range(RUNS)]
    lives = [life_of(SEED, number) for number in range(2)]
    assert {run.behaviour.manner for run in runs} == set(MANNERS)
    assert {run.trouble for run in runs} == set(Trouble)
    assert {run.request.dirty_log for run in runs} == {"userfaultfd", "compare"}
    assert {run.request.streams for run in runs} == {1, 2, 3, 4}
    assert {life.making.contract for life in lives} == {FreeContract.ANYTHING, FreeContract.ZERO}
    assert runs == [run_of(SEED, number) for number in range(RUNS)]
    assert runs != [run_of(SEED + 1, number) for number in range(RUNS)]


@pytest.mark.parametrize("plant", Plant)
def test_a_planted_fault_is_found_and_its_evidence_kept(plant: Plant, tmp_path: Path) -> None:
    soak = Soak(SEED, tmp_path, plant=plant)
    figures = soak.run(range(1))
    assert figures.wrong_pages > 0
    assert figures.failed_runs == 1
    (failure,) = soak.failures
    story = json.loads((failure.place / "run.json").read_text())
    assert (story["seed"], story["run"]) == (SEED, 0)
    finding = story["findings"][0]
    assert re.match("(stale: sequence|zero instead of sequence) [0-9]+", finding["problem"])
    assert finding["headers"]["source"] != finding["headers"]["destination"]
    assert (failure.place / f"page-{finding['page']}-destination.bin").stat().st_size == 4096


def test_a_guest_that_lies_in_its_hints_alone_is_saved_by_what_it_says_at_the_pause() -> None:
    """R14: the pages that it calls free, and is not seen to write, are sent after all."""
    run = untroubled(run_of(SEED, 0))
    request = changed(run.request, hints=True, dirty_log="userfaultfd", verify="strict")
    voyage = Voyage(life_of(SEED, 0, Plant.LIE))
    try:
        (attempt,) = voyage.travel(replace(run, behaviour=Behaviour(manner=Manner.LIE), request=request))
        (found,) = voyage.witness.take()
        halted = voyage.halt()
    finally:
        voyage.close()
    assert attempt.result.rescued_pages > 0
    assert (found.wrong_pages, halted.wrong_pages) == (0, 0)


def test_the_command_says_what_it_found_and_how_sure_that_is(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.soak", "--seed", "3", "--run", "2", "--json", str(figures)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "1 runs of seed 3" in ended.stdout
    said = json.loads(figures.read_text())
    assert (said["seed"], said["runs"], said["wrong_pages"], said["failure_bound_95"]) == (3, 1, 0, 1.0)
    assert all(isinstance(value, int | float) for value in said.values())


def test_ctrl_c_leaves_nothing_behind() -> None:
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    command = [sys.executable, "-m", "tests.soak", "--jobs", "2"]
    soak = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(directory)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        eventually(lambda: processes_naming(str(directory), "incoming.py"), "a guest to be moved")
        os.killpg(soak.pid, signal.SIGINT)
        _, said = soak.communicate(timeout=WAIT_S)
    finally:
        soak.kill()
    assert soak.returncode == 130, said
    assert said.strip() == "scripts/soak: interrupted; everything it had started was ended"
    eventually(lambda: not processes_naming(str(directory)), "its processes to end")
    directory.rmdir()  # OSError if anything is left in it
