"""`scripts/bench` as its user runs it: what it reports makes sense, and nothing of it is left behind."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from migd.bench.cases import CASES
from migd.bench.figures import FIGURES, BenchReport, Measured
from tests.support.pair import eventually
from tests.support.script import command_lines, left_behind, module_process

RAM_PAGES = 65_000_000 // 4096
"""Of --ram 65M, which is not a whole number of pages."""


@pytest.fixture
def private() -> Iterator[Path]:
    """Where the daemons' own directories are made: short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        yield Path(directory)


def bench(private: Path, words: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return module_process(private, "migd.bench", *words.split())


def test_what_it_measures_makes_sense_and_every_page_is_right(private: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    words = "--ram 65M --runs 1 --case idle freed --case full-random live-writer --write-rate 100M"
    with bench(private, f"{words} --json {path}") as process:
        out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    found = msgspec.json.decode(path.read_bytes(), type=BenchReport)
    runs: dict[str, Measured] = {}
    for contender in found.contenders:
        assert set(contender.figures) == set(FIGURES)
        (run,) = contender.runs
        assert run.measured is not None
        runs[contender.label] = run.measured
        result = run.measured.result
        assert (result.outcome, result.wrong_pages, result.ram_pages) == ("completed", 0, RAM_PAGES)
        assert result.checked_pages == pytest.approx(
            RAM_PAGES * {"full-random": 1, "live-writer": 0.2}.get(contender.case, 0.05), rel=0.1
        )
        assert run.measured.source.cpu_s > 0
        assert run.measured.destination.peak_anon_bytes >= run.measured.destination.end_anon_bytes > 0
        assert f"run 1: {contender.label}: " in err
        assert out.count(f"{contender.label} ") >= 3
    live = RAM_PAGES // 20
    idle, unhinted = runs["idle"].result, runs["idle, no hints"].result
    # Whatever is skipped, the rest is found never to have been touched.
    assert idle.skipped_free_pages + idle.hole_pages == RAM_PAGES - live
    assert (unhinted.skipped_free_pages, unhinted.hole_pages) == (0, RAM_PAGES - live)
    for result in (idle, unhinted, runs["freed"].result):
        assert result.sent_pages + result.zero_pages == live
    assert runs["freed"].result.skipped_free_pages == RAM_PAGES - live
    assert runs["freed, no hints"].result.sent_pages > RAM_PAGES * 0.95
    random = runs["full-random"].result
    assert random.sent_pages == RAM_PAGES
    assert random.wire_bytes > RAM_PAGES * 4096
    writer = runs["live-writer, 100 MB/s"].result
    assert writer.skipped_free_pages > RAM_PAGES * 0.7
    assert len(writer.iterations) >= 2
    assert min(msgspec.structs.astuple(found.limits)) > 0
    assert "loopback TCP, one connection" in out
    assert left_behind(private) == []


def test_runs_that_fail_are_named_and_the_exit_code_is_1(private: Path) -> None:
    # More streams than a destination allows by default: each attempt is refused.
    with bench(private, "--ram 16M --runs 1 --case full-random --streams 17") as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.count("failed") == 3  # in each of the three tables, instead of figures
    failures = [line for line in err.splitlines() if line.startswith("scripts/bench: FAILED: ")]
    assert [line.split(": ")[2] for line in failures] == ["full-random, run 1"]
    assert "17" in failures[0]
    assert left_behind(private) == []


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "--workload"), (signal.SIGTERM, "migd.guest.incoming")]
)
def test_an_interrupted_bench_ends_all_it_started(private: Path, number: signal.Signals, moment: str) -> None:
    """While the guest fills its memory, and while a process for one that arrives is there, too."""
    with bench(private, "--ram 256M --case freed --runs 9") as process:
        eventually(lambda: any(moment in line for line in command_lines(private)), moment, 60)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "scripts/bench: interrupted; everything it had started was ended"
    assert left_behind(private) == []


@pytest.mark.parametrize(
    ("words", "exit_code", "says"),
    [
        ("--ram 1M", 2, "--ram: 1000000 bytes are too few"),
        ("--ram much", 2, "argument --ram: 'much' is no size"),
        ("--ram 9999T", 3, "--ram: "),
        ("--case idle nope", 2, "--case: 'nope' is none of idle, "),
        ("--runs 0", 2, "argument --runs: '0' is no number above 0"),
        ("--write-rate 0", 2, "--write-rate: 0 is"),
        ("--streams 65", 2, "--streams: 65 is not between 1 and 64"),
        ("--json /nowhere/b.json", 2, "--json: /nowhere is no directory"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(
    private: Path, words: str, exit_code: int, says: str
) -> None:
    with bench(private, words) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (exit_code, "")
    assert says in err.splitlines()[-1]
    assert left_behind(private) == []


def test_the_help_tells_every_case(private: Path) -> None:
    with bench(private, "--help") as process:
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert all(f"\n  {case} " in out for case in CASES)
    assert max(map(len, out.splitlines())) <= 112
