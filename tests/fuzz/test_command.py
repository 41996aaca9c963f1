"""``scripts/fuzz``: its options, its processes and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.fuzz import __main__ as command
from tests.fuzz import crew, seeds
from tests.fuzz.__main__ import fuzz, main, planned
from tests.fuzz.campaign import Chunk, Tally
from tests.fuzz.crew import Worker
from tests.fuzz.targets import TARGETS
from tests.support.pair import ROOT, eventually

NAMES = ["hint-frames", "free-bitmap"]


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


@pytest.mark.parametrize("inputs", [1, 16, 999, 24_001, 1_000_000])
def test_a_plan_has_exactly_so_many_inputs(inputs: int) -> None:
    chunks = planned(list(TARGETS), inputs, seed=3)
    assert sum(chunk.inputs for chunk in chunks) == inputs
    assert all(chunk.inputs > 0 and chunk.seed == 3 for chunk in chunks)
    if inputs > 10_000:
        assert {chunk.target for chunk in chunks} == set(TARGETS)


def test_the_same_seed_makes_the_same_inputs_however_many_processes_there_are() -> None:
    one, two, other = (fuzz(NAMES, 2000, seed, processes) for seed, processes in ((5, 1), (5, 2), (6, 1)))
    verdicts = [
        [(tally.refused, tally.depths, tally.changed) for tally in report.tallies.values()]
        for report in (one, two, other)
    ]
    assert verdicts[0] == verdicts[1] != verdicts[2]
    assert one.total.inputs == two.total.inputs == 2000
    assert one.total.findings == []


def test_what_it_prints_and_writes(tmp_path: Path) -> None:
    found = run("--inputs", 500, "--target", NAMES[0], "--target", NAMES[1], "--json", tmp_path / "figures")
    assert found.exit_code == 0, found.output
    assert "500 inputs in" in found.output
    figures = json.loads((tmp_path / "figures").read_text())
    assert (figures["inputs"], figures["findings"], figures["seed"]) == (500, 0, 1)
    assert figures["hint_frames_inputs"] + figures["free_bitmap_inputs"] == 500
    accepted = figures["accepted_unchanged"] + figures["accepted_changed"]
    assert accepted + figures["refused"] == 500
    assert all(isinstance(figure, int | float) for figure in figures.values())


def test_an_input_is_run_again() -> None:
    name, path = seeds.regressions()[0]
    found = run("--replay", path, "--target", name)
    assert (found.exit_code, found.output) == (0, f"{name}: nothing is wrong with it\n")


@pytest.mark.parametrize(
    "words",
    [
        ("--inputs", 0),
        ("--target", "nothing"),
        ("--json", "/nowhere/figures"),
        ("--replay", __file__),
        ("--atheris", "--json", "figures"),
        ("--replay", __file__, "--target", "frames", "--target", "placing"),
        ("--replay", "/nowhere/input", "--target", "frames"),
    ],
)
def test_wrong_usage(words: tuple[object, ...]) -> None:
    assert run(*words).exit_code == 2


def test_what_is_found_is_saved_and_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allowance of no memory at all everything is a finding."""
    monkeypatch.setattr(command, "FINDINGS", tmp_path / "found")
    monkeypatch.setattr("tests.fuzz.campaign._ALLOCATION_FLOOR_BYTES", -1 << 20)
    path = seeds.SEEDS / "free-bitmap" / "churn"
    found = run("--replay", path, "--target", "free-bitmap")
    assert found.exit_code == 1
    assert "bytes were allocated for 32" in found.output
    said = command.saved(command.Finding("free-bitmap", path.read_bytes(), "it is too good"))
    (kept,) = (tmp_path / "found").iterdir()
    assert kept.read_bytes() == path.read_bytes()
    assert said == f"free-bitmap: it is too good\n  scripts/fuzz --replay {kept} --target free-bitmap"


def test_a_process_that_dies_leaves_the_input_that_it_was_at(tmp_path: Path) -> None:
    worker, told = Worker(tmp_path, 0), list[Tally]()
    chunk = Chunk("hint-frames", 1, 0, 10_000_000)
    try:
        worker.give(chunk)
        eventually(lambda: any((tmp_path / "input-0").read_bytes()[:8]), "the first input")
        assert worker.process.pid is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        assert not crew._finished(worker, chunk, lambda _chunk, tally: told.append(tally), blocked=False)
    finally:
        worker.process.kill()
    (finding,) = told[0].findings
    assert finding.target == "hint-frames"
    assert finding.what == "the process ended with -9"
    assert finding.data


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_chunk: Chunk, _tally: Tally) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crew, "_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        crew.run_all(planned(NAMES, 2000, 1), 2, interrupted)
    assert list(tmp_path.iterdir()) == []
    assert crew._context.active_children() == []


# -- atheris ----------------------------------------------------------------------------------------

_HAS_ATHERIS = importlib.util.find_spec("atheris") is not None


@pytest.mark.skipif(_HAS_ATHERIS, reason="atheris is installed here")
def test_without_atheris_it_says_how_to_install_it() -> None:
    found = run("--atheris", "--target", "free-bitmap")
    assert found.exit_code == 2
    assert "pip install --editable '.[fuzz]'" in found.output


@pytest.mark.skipif(not _HAS_ATHERIS, reason="atheris is not installed here")
def test_atheris_runs_a_target_and_ends(tmp_path: Path) -> None:
    words = ["--atheris", "--target", "free-bitmap", "--inputs", "300"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "number_of_executed_units: 300" in done.stderr
    assert list(tmp_path.iterdir()) == []
