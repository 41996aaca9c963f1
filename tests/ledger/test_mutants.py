"""Every wrong version of tests/ledger/mutants.py loses a page in the search that the right one survives."""

from __future__ import annotations

from functools import cache

import pytest

from tests.ledger.mutants import TRIALS, Trial
from tests.proof.mutant import Death

LEDGERS = [trial for trial in TRIALS if trial.is_ledger]
WORLDS = [trial for trial in TRIALS if not trial.is_ledger]


def names(trials: list[Trial]) -> list[str]:
    return [trial.name for trial in trials]


@cache
def death(name: str) -> Death:
    """How the wrong version of that name dies; the right one, with the same bounds, does not."""
    (trial,) = (trial for trial in TRIALS if trial.name == name)
    control = trial.control()
    assert not control.trace, f"the right version is called wrong: {control}"
    return trial.kill()


def assert_dies(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    found = death(trial.name)
    with capsys.disabled():
        print(f"\n  {trial.name}: {trial.bug}. {found}")  # noqa: T201  # the trace is what it is read for
    assert found.trace, f"{trial.name} survives"
    assert not found.reason.startswith("R17"), f"killed for its figures only: {found}"


@pytest.mark.parametrize("trial", LEDGERS, ids=names(LEDGERS))
def test_a_ledger_that_breaks_a_rule_loses_a_page(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    assert_dies(trial, capsys)


@pytest.mark.parametrize("trial", WORLDS, ids=names(WORLDS))
def test_a_world_that_breaks_a_rule_loses_a_page(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    assert_dies(trial, capsys)


def test_the_trace_of_a_lost_page_can_be_read() -> None:
    """The race that shipped implementations argue about, as the search tells it."""
    found = death("W02 AppliesLateHints")
    assert str(found) == "\n".join([
        "page 0 is forgotten, after 6 steps:",
        "   1. arm",
        "   2. request epoch 1",
        "   3. guest answers epoch 1",
        "   4. guest allocates and writes 0",
        "   5. harvest",
        "   6. hint 0 of epoch 1 arrives",
    ])  # fmt: skip


def test_w03_the_final_harvest_counts_like_any_other() -> None:
    trace = death("W03 FinalHarvestDoesNotCount").trace
    assert trace[-3:] == ("pause", "harvest", "hint 0 of epoch 1 arrives")


def test_w05_half_a_page_is_no_page() -> None:
    """Its neighbour in the same page is in use; what the guest says of the bytes is right."""
    assert death("W05 HintsAreRoundedOutwards").trace == (
        "arm",
        "request epoch 1",
        "guest answers epoch 1",
        "hint 0 of epoch 1 arrives",
    )


def test_w16_a_guest_finds_its_own_page_discarded() -> None:
    """The dirty log has the page, so that it would be sent: as zeros."""
    found = death("W16 DiscardsSourceMemory")
    assert found.reason == "R6: page 0 of the guest is damaged at the source"
    assert found.trace == (
        "arm",
        "request epoch 1",
        "guest answers epoch 1",
        "guest allocates and writes 0",
        "hint 0 of epoch 1 arrives",
    )


def test_w24_a_page_rewritten_with_the_same_bytes_looks_clean() -> None:
    """Hinted and never sent, so zeros are at the destination: any other bytes would have been noticed."""
    found = death("W24 TrustsTheLogForWhatWasNeverSent")
    assert found.reason == "page 0 is lost"
    assert found.trace == (
        "arm",
        "request epoch 1",
        "guest answers epoch 1",
        "guest allocates and writes A to 0",
        "pause",
        "hint 0 of epoch 1 arrives",
        "harvest",
        "END",
    )


def test_w25_what_was_sent_is_not_what_was_harvested() -> None:
    """A at the last harvest, B sent, A again."""
    found = death("W25 ComparesWithTheLastHarvest")
    assert found.reason == "page 0 is forgotten"
    assert found.trace == (
        "arm",
        "guest allocates and writes B to 0",
        "pick 0",
        "read 0",
        "guest writes A to 0",
        "record: B of 0 on a stream",
    )
