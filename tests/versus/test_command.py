"""`migd demo --qemu` with a real guest, and what `scripts/bench-qemu-guest` says of how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from migd.lab import emulators, image
from migd.lab.debian import LabUnavailable
from migd.versus.cases import Case, Contender
from migd.versus.figures import Report

SHARED_MEMORY = Path("/dev/shm")


def run(*words: str, timeout_s: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module", autouse=True)
def _lab() -> None:
    try:
        image.image()
        emulators.newest()
    except LabUnavailable as error:
        if "MIGD_NO_SKIP" in os.environ:
            raise
        pytest.skip(f"no guest can be had here: {error}")


@pytest.mark.timeout(120)
def test_the_demo_moves_a_real_guest_and_compares_it_with_qemu_itself() -> None:
    before = set(SHARED_MEMORY.glob("migd-vs-*"))
    done = run("migd", "demo", "--qemu", "--ram", "384Mi", "--json")
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout, type=Report)
    assert [row.contender for row in found.rows] == [
        Contender.MULTIFD,
        Contender.MIGD_UNHINTED,
        Contender.MIGD,
    ]
    multifd, unhinted, hinted = (row.measured[0] for row in found.rows)
    assert {row.case for row in found.rows} == {Case.HOG}
    assert hinted.skipped_pages > 10_000
    assert hinted.live
    assert not unhinted.skipped_pages
    assert hinted.wire_bytes < unhinted.wire_bytes * 0.8
    assert hinted.wire_bytes < multifd.wire_bytes * 0.8
    assert set(SHARED_MEMORY.glob("migd-vs-*")) <= before


def test_an_unknown_case_or_size_is_said_before_anything_starts() -> None:
    for words in (("--case", "BUSY"), ("--runs", "0"), ("--ram", "much")):
        done = run("migd.versus", *words, timeout_s=20)
        assert done.returncode == 2
        assert words[1] in done.stderr


def test_help_says_what_is_measured_and_what_the_exit_codes_mean() -> None:
    done = run("migd.versus", "--help", timeout_s=20)
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    for words in ("a memory hog has ended", "includes its late verification", "Exit codes: 0 done"):
        assert words in said
