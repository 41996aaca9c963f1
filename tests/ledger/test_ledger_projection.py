"""A ledger of many pages is as many ledgers of one page: so what the search finds for one holds for all.

A call for several pages, looked at through one of them, is that page's own call; only which pages a pick
takes is no page's own choice. Held here for every ledger of two pages that a search meets, and in
tests/ledger/test_ledger_machine.py for up to 64 pages in random histories.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.ledger.searches import MUCH
from tests.support.compare_model import CompareModel
from tests.support.int_pages import IntPages
from tests.support.ledger_model import Model
from tests.support.ledger_values import Call, Frozen
from tests.support.search import search

STATES = 40_000
BOTH = 0b11
PICKS = {"pick", "pick_free"}

WORLDS: list[tuple[str, type[Model], dict[str, Any]]] = [
    ("zero when free", Model, {"contract": FreeContract.ZERO}),
    ("much", Model, MUCH),
    ("a liar", Model, {"liar": True, "cancels": 1}),
    ("a log that compares", CompareModel, MUCH),
]


@cache
def explored(name: str) -> Model:
    """A model of two pages after a search that met ledgers of many kinds."""
    ((model, bounds),) = (world[1:] for world in WORLDS if world[0] == name)
    two = model(Ledger, pages=2, **{"epochs": 1, **bounds})
    assert not search(two, max_states=STATES).trace
    return two


def calls(model: Model) -> Iterator[tuple[Frozen, Call]]:
    """Those that the search made; and, of every ledger that it met, those for both pages at once."""
    met = {frozen for frozen, _ in model.calls} | {after[0] for after in model.calls.values() if after}
    yield from list(model.calls)
    for frozen in met:
        epoch = model.thaw(frozen).open_epoch
        for call in (
            ("pick", 2), ("pick_free", 2), ("hint", epoch, BOTH), ("sent_pages", BOTH), ("zeroed", BOTH),
            ("freed", BOTH), ("zero_records", BOTH),
        ):  # fmt: skip
            yield frozen, call


def through(model: Model, frozen: Frozen, p: int) -> Ledger[IntPages]:
    """The ledger as it would be if it had page ``p`` only, and had looked at nothing in this iteration.

    Where a pick begins to look is a matter of all pages: ``test_a_pick_overlooks_no_page``.
    """
    ledger = model.thaw(frozen, p)
    ledger._cursor = ledger._free_cursor = 0
    return ledger


def values(ledger: Ledger[IntPages]) -> dict[str, Any]:
    skip = {"_cursor", "_free_cursor", "_sets", "tally"}
    return {name: value for name, value in vars(ledger).items() if name not in skip}


@pytest.mark.parametrize("name", [name for name, *_ in WORLDS])
def test_a_call_of_a_ledger_of_two_pages_is_a_call_for_each_of_them(name: str) -> None:
    two = explored(name)
    accepted = 0
    for frozen, call in calls(two):
        outcome = two.call(frozen, *call)
        if outcome is None:
            continue
        accepted += 1
        after, result = outcome
        for p in (0, 1):
            one = through(two, frozen, p)
            if call[0] not in PICKS:
                two.apply(one, call, p)  # not refused: so no history of two pages is too bold for one
            elif result >> p & 1:
                assert getattr(one, call[0])(1), f"{call} takes page {p}, which it would not alone"
            assert values(one) == values(through(two, after, p)), f"page {p} in {call}"
    assert accepted >= 1_000


@pytest.mark.parametrize("name", [name for name, *_ in WORLDS])
def test_a_pick_overlooks_no_page(name: str) -> None:
    """What one page alone would have a pick take, a pick of both does take."""
    two = explored(name)
    alone = 0
    for frozen in {frozen for frozen, _ in two.calls}:
        for method in PICKS:
            outcome = two.call(frozen, method, 2)
            assert outcome is not None
            wanted = sum(1 << p for p in (0, 1) if getattr(through(two, frozen, p), method)(1))
            assert outcome[1] == wanted
            alone += wanted in (1, 2)
    assert alone >= 40
