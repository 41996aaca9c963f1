"""The state invariant of docs/safety.md over the real Ledger, by exhaustive search; and every mutant dies.

The model (tests/support/ledger_model.py) knows nothing of the ledger's reasons: it calls its methods in
every order that they accept, and compares what the destination may hold with what the guest holds.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.int_pages import IntPages
from tests.support.ledger_model import Model, Search, search

ANYTHING, ZERO = FreeContract.ANYTHING, FreeContract.ZERO
Pages = IntPages

COMPLETE: list[tuple[str, dict[str, Any], int]] = [
    (
        "two epochs, a cancelled attempt and a second",
        {"epochs": 2, "cancels": 1, "contract": ANYTHING},
        60_000,
    ),
    ("two attempts with init_on_free", {"epochs": 1, "cancels": 1, "contract": ZERO}, 12_000),
    ("holes, looked for at any time", {"epochs": 1, "holes": True, "contract": ANYTHING}, 20_000),
    ("holes and init_on_free", {"epochs": 1, "holes": True, "contract": ZERO}, 15_000),
    ("a guest that lies until it is caught", {"epochs": 1, "liar": True, "contract": ANYTHING}, 12_000),
    ("time to pass in every harvest", {"epochs": 1, "awaits": True, "contract": ANYTHING}, 12_000),
]


@cache  # the real ledger is the control of every mutant
def run(model: type[Model] = Model, ledger: type[Ledger[Pages]] = Ledger, **bounds: Any) -> Search:
    max_states = bounds.pop("max_states", 100_000)
    return search(model(ledger, **bounds), max_states=max_states)


@pytest.mark.parametrize(("name", "bounds", "at_least"), COMPLETE, ids=[name for name, *_ in COMPLETE])
def test_every_state_of_one_page_is_right(
    name: str, bounds: dict[str, Any], at_least: int, capsys: Any
) -> None:
    found = run(pages=1, **bounds)
    with capsys.disabled():
        print(f"\n  one page, {name}: {found}")  # noqa: T201  # the figures are what the test is read for
    assert not found.trace, str(found)
    assert found.complete
    assert found.states >= at_least
    assert found.ends >= 100  # the search is not right for want of migrations that end


@pytest.mark.parametrize("contract", [ANYTHING, ZERO])
def test_the_first_states_of_two_pages_are_right(contract: FreeContract, capsys: Any) -> None:
    """Two pages have many millions of states: these are all the histories up to the depth that is printed."""
    found = run(pages=2, epochs=1, contract=contract, max_states=40_000)
    with capsys.disabled():
        print(f"\n  two pages, {contract.name}: {found}")  # noqa: T201
    assert not found.trace, str(found)
    assert found.states >= 40_000


def test_the_search_takes_every_kind_of_step() -> None:
    searches = [run(pages=1, **bounds) for _, bounds, _ in COMPLETE]
    assert {action for found in searches for action in found.actions} == {
        "arm", "cancel", "pause", "look for holes", "mark holes", "look for dirty pages", "harvest",
        "barrier", "settle", "END",
        "request epoch #", "guest answers epoch #", "hint # of epoch # arrives", "distrust the hints",
        "guest writes #", "guest writes zeros to #", "guest frees #", "guest allocates and writes #",
        "guest allocates # and counts on zeros", "pick #", "pick_free #", "read #",
        "record: zeros of # on a stream", "record: a copy of # on a stream",
        "record: an old copy of # on a stream", "no record for zero page #",
    }  # fmt: skip
    # R9: never two records of a page between two barriers, so "another stream than the last" does not occur.


# -- mutants of the ledger: the bug is one method, all else is the real class ---------------------------


class RequestsBeforeArming(Ledger[Pages]):  # W01
    def issue(self) -> int:
        self.armed, self.contract = True, ANYTHING
        return super().issue()

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        epoch = self.open_epoch
        super().arm(contract, sees_writes=sees_writes)
        self.open_epoch = epoch


class AppliesLateHints(Ledger[Pages]):  # W02, W03
    def hint(self, epoch: int, free: Pages) -> int:
        self._dirty_since_issue = Pages(self.pages)
        return super().hint(epoch, free)


class ReusesEpochs(Ledger[Pages]):  # W04
    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        super().arm(contract, sees_writes=sees_writes)
        self._next_epoch = 1


class NeverSendsZeroRecords(Ledger[Pages]):  # W09
    def zero_records(self, zero: Pages) -> Pages:
        return Pages(self.pages)


class PicksAPageTwiceInAnIteration(Ledger[Pages]):  # W10
    def harvest(self, dirty: Pages) -> int:
        if not self.in_flight:
            self._picked = Pages(self.pages)
        return super().harvest(dirty)


class FreesAheadOfTheBarrier(Ledger[Pages]):  # W12
    def pick_free(self, limit: int) -> Pages:
        picked, self._picked, self._free_cursor = self._picked, self.in_flight, 0
        freeing = super().pick_free(limit)
        self._picked |= picked
        return freeing


class OwesNoFreeRecords(Ledger[Pages]):  # W14
    def hint(self, epoch: int, free: Pages) -> int:
        applied = super().hint(epoch, free)
        self.free_pending = Pages(self.pages)
        return applied


class RetriesWithWhatWasSent(Ledger[Pages]):  # W20
    def _begin(self) -> None:
        sent = getattr(self, "sent", Pages(self.pages))
        super()._begin()
        self.sent |= sent
        self.to_send -= sent


class KeepsTheEpochOverARetry(Ledger[Pages]):  # W21
    def _begin(self) -> None:
        epoch = getattr(self, "open_epoch", None)
        super()._begin()
        self.open_epoch = epoch


class SkipsWhatIsBeingRead(Ledger[Pages]):  # W22
    def _apply_free(self, free: Pages) -> int:
        flying = free & self.in_flight
        self.in_flight -= flying
        self.skipped |= flying
        return super()._apply_free(free - flying)

    def sent_pages(self, data: Pages) -> None:
        super().sent_pages(data & self.in_flight)


class ForgetsFreeRecordsOfALiar(Ledger[Pages]):  # R7: the bug this suite found in the first version
    def distrust_hints(self) -> None:
        super().distrust_hints()
        self._doubted = Pages(self.pages)


class TakesAnOldLookForHoles(Ledger[Pages]):  # R20: the same
    def mark_holes(self, holes: Pages) -> None:
        self._dirty_since_arming = Pages(self.pages)
        super().mark_holes(holes)


class ForgetsAFreeRecordOnceDirty(Ledger[Pages]):
    """A dirty page is content, not FREE: taking the content for granted loses it."""

    def harvest(self, dirty: Pages) -> int:
        owed = dirty & self.free_pending
        count = super().harvest(dirty - owed)
        self._dirty_since_issue |= owed
        return count


# -- mutants of the world around it ---------------------------------------------------------------------


class ReadsTheMarksThenClearsThem(Model):  # W06: soft-dirty
    def look(self, state: Any) -> tuple[int, Any]:
        return state.kernel, state

    def told(self, state: Any) -> Any:
        return state._replace(found=0, kernel=0)


class ClearsTheMarkAfterTheRead(Model):  # W07
    def after_record(self, kernel: int, page: int) -> int:
        return kernel & ~page


class HintClearsTheDirtyLog(Model):  # W08
    def after_hint(self, kernel: int, page: int) -> int:
        return kernel & ~page


class DoesNotWaitAtTheBarrier(Model):  # W11
    def drained(self, before: int, streams: tuple[int, int]) -> int:
        return before | streams[0] | streams[1]


class WritesBesideTheLog(Model):  # W13
    def log(self, kernel: int, page: int) -> int:
        return kernel


class DestinationIsNotZero(Model):  # W15
    def fresh(self) -> int:
        return 2


class GuestRunsOnAfterThePause(Model):  # W17
    def guest_runs(self, phase: int) -> bool:
        return phase < 4


class GuestAnswersFromAnOldList(Model):  # W23
    def answer(self, state: Any) -> int:
        return int(state.old_list)


LEDGER_MUTANTS: list[tuple[str, type[Ledger[Pages]], dict[str, Any]]] = [
    ("W01", RequestsBeforeArming, {"epochs": 1}),
    ("W02 W03", AppliesLateHints, {"epochs": 1}),
    ("W04", ReusesEpochs, {"epochs": 1, "cancels": 1}),
    ("W09", NeverSendsZeroRecords, {"epochs": 1}),
    ("W10", PicksAPageTwiceInAnIteration, {"epochs": 1}),
    ("W12", FreesAheadOfTheBarrier, {"epochs": 1}),
    ("W14", OwesNoFreeRecords, {"epochs": 1, "contract": ZERO}),
    ("W20", RetriesWithWhatWasSent, {"epochs": 1, "cancels": 1}),
    ("W21", KeepsTheEpochOverARetry, {"epochs": 1, "cancels": 1}),
    ("W22", SkipsWhatIsBeingRead, {"epochs": 1}),
    ("R7", ForgetsFreeRecordsOfALiar, {"epochs": 1, "liar": True}),
    ("R20", TakesAnOldLookForHoles, {"epochs": 1, "holes": True}),
    ("R11", ForgetsAFreeRecordOnceDirty, {"epochs": 1}),
]
WORLD_MUTANTS: list[tuple[str, type[Model], dict[str, Any]]] = [
    ("W06", ReadsTheMarksThenClearsThem, {"epochs": 0, "awaits": True}),
    ("W07", ClearsTheMarkAfterTheRead, {"epochs": 0}),
    ("W08", HintClearsTheDirtyLog, {"epochs": 1}),
    ("W11", DoesNotWaitAtTheBarrier, {"epochs": 0}),
    ("W13", WritesBesideTheLog, {"epochs": 0}),
    ("W15", DestinationIsNotZero, {"epochs": 1}),
    ("W17", GuestRunsOnAfterThePause, {"epochs": 0}),
    ("W23", GuestAnswersFromAnOldList, {"epochs": 1}),
]


def names(mutants: list[Any]) -> list[str]:
    return [f"{rule} {mutant.__name__}" for rule, mutant, _ in mutants]


@pytest.mark.parametrize(("rule", "mutant", "bounds"), LEDGER_MUTANTS, ids=names(LEDGER_MUTANTS))
def test_a_ledger_that_breaks_a_rule_loses_a_page(rule: str, mutant: Any, bounds: dict[str, Any]) -> None:
    bounds = {"contract": ANYTHING, **bounds}
    assert not run(pages=1, **bounds).trace
    found = run(ledger=mutant, pages=1, **bounds)
    assert found.trace, f"{rule} survives: {found}"
    assert not found.reason.startswith("R17"), f"killed for its figures only: {found}"


@pytest.mark.parametrize(("rule", "mutant", "bounds"), WORLD_MUTANTS, ids=names(WORLD_MUTANTS))
def test_a_world_that_breaks_a_rule_loses_a_page(rule: str, mutant: Any, bounds: dict[str, Any]) -> None:
    found = run(model=mutant, pages=1, **bounds)
    assert found.trace, f"{rule} survives: {found}"


def test_the_trace_of_a_lost_page_can_be_read() -> None:
    """The race that shipped implementations argue about, as the search tells it."""
    found = run(ledger=AppliesLateHints, pages=1, epochs=1)
    assert found.trace == [
        "arm",
        "request epoch 1",
        "guest answers epoch 1",
        "guest allocates and writes 0",
        "harvest",
        "hint 0 of epoch 1 arrives",
    ]
    assert str(found).endswith("page 0 is forgotten, after 6 steps:\n" + "\n".join(
        f"  {number:2}. {step}" for number, step in enumerate(found.trace, 1)
    ))  # fmt: skip
