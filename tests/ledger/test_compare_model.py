"""The compare log's rules (R19) over the real Ledger, by exhaustive search; W24, W25 and their kin die.

See tests/ledger/test_ledger_model.py; the model is tests/support/compare_model.py. What each mutant does
wrong is a method or two, so that the trace of the page it loses is the reason for the rule.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.compare_model import CompareModel
from tests.support.int_pages import IntPages
from tests.support.ledger_model import HARVESTED, Search, State, search

ANYTHING, ZERO = FreeContract.ANYTHING, FreeContract.ZERO
Pages = IntPages

COMPLETE: list[tuple[str, dict[str, Any], int]] = [
    ("a cancelled attempt and a second", {"epochs": 1, "cancels": 1, "contract": ANYTHING}, 35_000),
    ("two epochs, and time to pass in every harvest", {"epochs": 2, "awaits": True}, 75_000),
    ("init_on_free, and time to pass in every harvest", {"awaits": True, "contract": ZERO}, 12_000),
    ("holes, looked for at any time", {"holes": True, "contract": ANYTHING}, 45_000),
    ("holes and init_on_free", {"holes": True, "contract": ZERO}, 30_000),
    ("a guest that lies until it is caught", {"liar": True, "contract": ANYTHING}, 28_000),
    ("no hints", {"epochs": 0, "awaits": True}, 1_000),
]


@cache  # the real ledger is the control of every mutant
def run(
    model: type[CompareModel] = CompareModel, ledger: type[Ledger[Pages]] = Ledger, **bounds: Any
) -> Search:
    max_states = bounds.pop("max_states", 150_000)
    return search(model(ledger, **{"pages": 1, "epochs": 1, **bounds}), max_states=max_states)


@pytest.mark.parametrize(("name", "bounds", "at_least"), COMPLETE, ids=[name for name, *_ in COMPLETE])
def test_every_state_of_one_page_under_a_comparing_log_is_right(
    name: str, bounds: dict[str, Any], at_least: int, capsys: Any
) -> None:
    found = run(**bounds)
    with capsys.disabled():
        print(f"\n  one page compared, {name}: {found}")  # noqa: T201  # the figures are what it is read for
    assert not found.trace, str(found)
    assert found.complete
    assert found.states >= at_least
    assert found.ends >= 100


@pytest.mark.parametrize("contract", [ANYTHING, ZERO])
def test_the_first_states_of_two_pages_under_a_comparing_log_are_right(contract: FreeContract) -> None:
    found = run(pages=2, contract=contract, max_states=40_000)
    assert not found.trace, str(found)
    assert found.states >= 40_000


def test_the_search_takes_every_kind_of_step() -> None:
    searches = [run(**bounds) for _, bounds, _ in COMPLETE]
    assert {action for found in searches for action in found.actions} == {
        "arm", "cancel", "pause", "look for holes", "mark holes", "look for dirty pages", "harvest",
        "barrier", "settle", "END", "request epoch #", "guest answers epoch #", "hint # of epoch # arrives",
        "distrust the hints", "guest writes A to #", "guest writes B to #", "guest writes zeros to #",
        "guest frees #", "guest allocates and writes A to #", "guest allocates and writes B to #",
        "guest allocates # and counts on zeros", "pick #", "pick_free #", "read #",
        "record: zeros of # on a stream", "record: A of # on a stream", "record: B of # on a stream",
        "no record for zero page #",
    }  # fmt: skip


# -- mutants of the log ---------------------------------------------------------------------------------


class TrustsTheLogForWhatWasNeverSent(CompareModel):  # W24
    """It remembers every page as it was at arming, so as to tell of skipped ones, too: no bitmap asked."""

    sees_writes = True

    def at_arming(self, state: State) -> tuple[int, ...]:
        return state.memory

    def compared(self, state: State) -> int:
        return super().compared(state) | self.view(state.ledger).skipped.bits

    def _harvest(self, state: State) -> State | None:
        after = super()._harvest(state)
        last = after is not None and after.phase == HARVESTED
        return self._with(after, "close_epoch") if after is not None and last else after

    def _settle(self, state: State) -> None:
        return None


class ComparesWithTheLastHarvest(CompareModel):  # W25
    def at_arming(self, state: State) -> tuple[int, ...]:
        return state.memory

    def at_look(self, state: State) -> tuple[int, ...]:
        return state.memory

    def at_record(self, state: State, p: int, copy: int) -> int:
        return state.digests[p]


class DigestsMemoryAndNotTheCopy(CompareModel):  # W25, its other half
    def at_record(self, state: State, p: int, copy: int) -> int:
        return state.memory[p]


class ForgetsHoles(CompareModel):
    """A page that was never touched has no digest; the guest touches it."""

    def differing(self, state: State) -> int:
        return super().differing(state) & ~self.view(state.ledger).hole.bits


class ForgetsZeroPages(CompareModel):
    def differing(self, state: State) -> int:
        return super().differing(state) & ~self.view(state.ledger).zero.bits


class LooksBeforeThePause(CompareModel):
    """The last look is not one at a paused guest."""

    def guest_runs(self, phase: int) -> bool:
        return phase < 4


# -- mutants of the ledger ------------------------------------------------------------------------------


class EndsWithoutTheBitmap(Ledger[Pages]):
    def finish(self) -> None:
        self._settled = True
        super().finish()


class TakesAnOldLookForHoles(Ledger[Pages]):
    """What the search found in the first version: nobody names a page that was written and not sent yet."""

    def mark_holes(self, holes: Pages) -> None:
        self._harvested = False
        super().mark_holes(holes)


LOG_MUTANTS: list[tuple[str, type[CompareModel], dict[str, Any]]] = [
    ("W24", TrustsTheLogForWhatWasNeverSent, {}),
    ("W25", ComparesWithTheLastHarvest, {"epochs": 0}),
    ("W25", DigestsMemoryAndNotTheCopy, {"epochs": 0}),
    ("R19", ForgetsHoles, {"epochs": 0, "holes": True}),
    ("R19", ForgetsZeroPages, {"epochs": 0}),
    ("R13", LooksBeforeThePause, {"epochs": 0}),
]
LEDGER_MUTANTS: list[tuple[str, type[Ledger[Pages]], dict[str, Any]]] = [
    ("R19", EndsWithoutTheBitmap, {}),
    ("R20", TakesAnOldLookForHoles, {"epochs": 0, "holes": True}),
]


def names(mutants: list[Any]) -> list[str]:
    return [f"{rule} {mutant.__name__}" for rule, mutant, _ in mutants]


@pytest.mark.parametrize(("rule", "mutant", "bounds"), LOG_MUTANTS, ids=names(LOG_MUTANTS))
def test_a_log_that_breaks_a_rule_loses_a_page(rule: str, mutant: Any, bounds: dict[str, Any]) -> None:
    assert not run(**bounds).trace
    found = run(model=mutant, **bounds)
    assert found.trace, f"{rule} survives: {found}"
    assert not found.reason.startswith("R17"), f"killed for its figures only: {found}"


@pytest.mark.parametrize(("rule", "mutant", "bounds"), LEDGER_MUTANTS, ids=names(LEDGER_MUTANTS))
def test_a_ledger_that_breaks_a_rule_of_the_compare_log_loses_a_page(
    rule: str, mutant: Any, bounds: dict[str, Any]
) -> None:
    assert not run(**bounds).trace
    found = run(ledger=mutant, **bounds)
    assert found.trace, f"{rule} survives: {found}"


def test_w24_a_page_rewritten_with_the_same_bytes_looks_clean() -> None:
    """Hinted and never sent, so zeros are at the destination: any other bytes would have been noticed."""
    found = run(model=TrustsTheLogForWhatWasNeverSent)
    assert found.reason == "page 0 is lost"
    assert found.trace == [
        "arm",
        "request epoch 1",
        "guest answers epoch 1",
        "guest allocates and writes A to 0",
        "pause",
        "hint 0 of epoch 1 arrives",
        "harvest",
        "END",
    ]


def test_w25_what_was_sent_is_not_what_was_harvested() -> None:
    """A at the last harvest, B sent, A again."""
    found = run(model=ComparesWithTheLastHarvest, epochs=0)
    assert found.reason == "page 0 is forgotten"
    assert found.trace == [
        "arm",
        "guest allocates and writes B to 0",
        "pick 0",
        "read 0",
        "guest writes A to 0",
        "record: B of 0 on a stream",
    ]
