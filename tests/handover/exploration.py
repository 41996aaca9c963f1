"""Exploration: every world that a model reaches with so many faults, and whether it finds home from each.

What faults are left says which steps are possible, never what they do. So the steps of a world are computed
once, and a state of the search is a world's number together with what is left of each budget: one int.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tests.handover.model import HandOverModel
from tests.handover.world import Budget, World
from tests.support.search import Search, search


class _Move(NamedTuple):
    name: str
    to: int
    """Number of the world behind it."""
    digit: int
    """What one of its budget is worth in what is left; 0: it is free."""
    base: int


class Exploration:
    """All worlds of one model within bounds; ``explore`` once."""

    def __init__(self, model: HandOverModel, bounds: Mapping[Budget, int]) -> None:
        self._model = model
        self._digits: dict[Budget | None, tuple[int, int]] = {None: (0, 1)}
        size = 1
        for budget in Budget:
            base = bounds.get(budget, 0) + 1
            self._digits[budget] = (size, base)
            size *= base
        self._budgets = size
        self.worlds: list[World] = []
        self._numbers: dict[World, int] = {}
        self._moves: list[list[_Move] | None] = []
        self._reasons: list[str | None] = []
        self.kinds: Counter[str] = Counter()
        """How many worlds each kind of step is possible in."""

    # -- Explorable[int] --------------------------------------------------------------------------------

    def initial(self) -> list[int]:
        return [self._number(self._model.initial()) * self._budgets + self._budgets - 1]

    def steps(self, state: int) -> list[tuple[str, int]]:
        number, left = divmod(state, self._budgets)
        moves = self._moves[number]
        if moves is None:
            moves = self._moves[number] = self._moves_of(number)
        budgets = self._budgets
        return [
            (name, to * budgets + left - digit)
            for name, to, digit, base in moves
            if not digit or left // digit % base
        ]

    def wrong(self, state: int) -> str | None:
        return self._reasons[state // self._budgets]

    def ended(self, state: int) -> bool:
        return self._model.settled(self.worlds[state // self._budgets])

    def _number(self, world: World) -> int:
        number = self._numbers.get(world)
        if number is None:
            number = self._numbers[world] = len(self.worlds)
            self.worlds.append(world)
            self._moves.append(None)
            self._reasons.append(self._model.wrong(world))
        return number

    def _moves_of(self, number: int) -> list[_Move]:
        moves: list[_Move] = []
        for name, after, cost in self._model.steps(self.worlds[number]):
            digit, base = self._digits[cost]
            if base > 1 or cost is None:
                moves.append(_Move(name, self._number(after), digit, base))
                self.kinds[name] += 1
        return moves

    # -- the whole of it --------------------------------------------------------------------------------

    def explore(
        self, max_states: int = 1 << 24, progress: Callable[[int, int], None] | None = None
    ) -> Search:
        """What must never be, with the shortest way there; else a world from which there is no way home."""
        found = search(self, max_states=max_states, progress=progress)
        if found.trace or not found.complete:
            return found
        for number in self._astray():
            self._reasons[number] = (
                "however it goes on without another fault, it is never settled who runs the guest"
            )
        for number in self._undone():
            self._reasons[number] = (
                "it was settled who runs the guest, and without another fault that was undone"
            )
        return search(self, max_states=max_states, progress=progress) if any(self._reasons) else found

    def visited(self) -> list[World]:
        """Every world that was reached."""
        return [self.worlds[number] for number in self._visited()]

    def moves(self) -> Iterator[tuple[World, World]]:
        """Every step of an attempt, but faults: the worlds before and behind it."""
        for number in self._visited():
            for to in self._free_moves(number):
                yield self.worlds[number], self.worlds[to]

    def _visited(self) -> list[int]:
        return [number for number, moves in enumerate(self._moves) if moves is not None]

    def _free_moves(self, number: int) -> list[int]:
        return [move.to for move in self._moves[number] or () if not move.digit]

    def _astray(self) -> set[int]:
        """Worlds from which no steps but faults lead to a settled one."""
        visited = self._visited()
        origins: dict[int, list[int]] = {}
        for number in visited:
            for to in self._free_moves(number):
                origins.setdefault(to, []).append(number)
        home = [number for number in visited if self._model.settled(self.worlds[number])]
        reached = set(home)
        while home:
            for origin in origins.get(home.pop(), ()):
                if origin not in reached:
                    reached.add(origin)
                    home.append(origin)
        return set(visited) - reached

    def _undone(self) -> set[int]:
        """Worlds that steps but faults lead to from a settled one, and that are not settled themselves."""
        return {
            to
            for number in self._visited()
            if self._model.settled(self.worlds[number])
            for to in self._free_moves(number)
            if not self._model.settled(self.worlds[to])
        }
