"""Every parser under a small, fixed part of what ``scripts/fuzz`` runs; and all that was ever found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.fuzz.campaign import Chunk, replayed, run_chunk
from tests.fuzz.target import ACCEPTED, Target
from tests.fuzz.targets import TARGETS

INPUTS = 24_000
SEED = 20_260


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = TARGETS[request.param]()
    yield made
    made.close()


def part(name: str) -> int:
    """Of all inputs."""
    return INPUTS * TARGETS[name].shared // sum(each.shared for each in TARGETS.values())


def test_every_recording_is_accepted_to_its_end(target: Target) -> None:
    """Else its mutations would be refused for nothing that was done to them."""
    for data in target.seeds:
        assert target.run(data).verdict == ACCEPTED


def test_nothing_is_found(target: Target) -> None:
    tally = run_chunk(target, Chunk(target.name, SEED, 0, part(target.name)), remember=len)
    assert [finding.what for finding in tally.findings] == []
    assert tally.inputs == part(target.name)
    assert tally.refused.total() > tally.inputs // 10, "hardly anything that was refused"
    assert tally.changed > tally.inputs // 40, "hardly anything that came through to the end and was new"
    assert tally.behind > tally.inputs // 20, "hardly anything that came behind the first check"


@pytest.mark.parametrize(
    ("name", "path"), seeds.regressions(), ids=lambda found: getattr(found, "name", found)
)
def test_what_was_found_once_is_not_found_again(name: str, path: Path) -> None:
    target = TARGETS[name]()
    try:
        assert replayed(target, path.read_bytes()) == ""
    finally:
        target.close()
