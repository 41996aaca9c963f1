"""The searches over the right ledger: which worlds, how far, and how many states each has.

A search is complete: it goes on until no step leads to a state that it has not seen. So the number of its
states is a property of the model, and a model that shrinks is noticed by ``at_least``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.compare_model import CompareModel
from tests.support.ledger_model import Model
from tests.support.search import Search, search

ANYTHING, ZERO, NONE = FreeContract.ANYTHING, FreeContract.ZERO, FreeContract.NONE

MOST_STATES = 10_000_000
"""Several times what any of these searches has: more would need a gigabyte."""


@dataclass(frozen=True)
class World:
    """One search: a model with its bounds."""

    name: str
    model: type[Model]
    at_least: int
    """States."""
    bounds: Mapping[str, Any]

    def build(self) -> Model:
        return self.model(Ledger, **self.bounds)

    def search(
        self, max_states: int = MOST_STATES, progress: Callable[[int, int], None] | None = None
    ) -> Search:
        return search(self.build(), max_states=max_states, progress=progress)


def _world(name: str, model: type[Model], at_least: int, **bounds: Any) -> World:
    return World(name, model, at_least, {"pages": 1, "epochs": 1, "contract": ANYTHING, **bounds})


MUCH = {"epochs": 2, "cancels": 1, "holes": True, "awaits": True}
"""Two hint epochs, two attempts, holes looked for at any time, time to pass within every harvest."""
LIES = {"liar": True, "cancels": 1, "holes": True, "awaits": True}
"""The guest hints what it likes until it is caught."""

LOGGED = [
    _world("one page, anything free", Model, 185_000, **MUCH),
    _world("one page, zero when free", Model, 135_000, **MUCH, contract=ZERO),
    _world("one page, no contract, three attempts", Model, 10_000, **{**MUCH, "cancels": 2}, contract=NONE),
    _world("one page of a liar", Model, 80_000, **LIES),
    _world("two pages, anything free", Model, 1_680_000, pages=2),
    _world("two pages, zero when free, no hints", Model, 43_000, pages=2, epochs=0, contract=ZERO),
    _world("two pages, no contract", Model, 83_000, pages=2, contract=NONE),
]
"""A dirty log that sees writes."""

COMPARED = [
    _world("one page compared, anything free", CompareModel, 310_000, **MUCH),
    _world("one page compared, zero when free", CompareModel, 55_000, **{**MUCH, "epochs": 1}, contract=ZERO),
    _world("one page compared, no contract", CompareModel, 9_000, **MUCH, contract=NONE),
    _world("one page compared of a liar", CompareModel, 43_000, **{**LIES, "holes": False}),
    _world("two pages compared, no contract", CompareModel, 195_000, pages=2, contract=NONE),
]
"""A log that compares content (R19)."""

DEEPER = [
    _world("one page, three epochs, three attempts", Model, 970_000, **{**MUCH, "epochs": 3, "cancels": 2}),
    _world("two pages, zero when free", Model, 850_000, pages=2, contract=ZERO),
    _world("two pages, no contract, holes", Model, 420_000, pages=2, contract=NONE, holes=True),
    _world("two pages compared, zero when free", CompareModel, 2_400_000, pages=2, contract=ZERO),
]
"""What would take a test suite too long: ``scripts/model --deeper``."""


@cache
def found_in(name: str) -> Search:
    """The search of that name, once for each process."""
    (world,) = (world for world in (*LOGGED, *COMPARED) if world.name == name)
    return world.search()
