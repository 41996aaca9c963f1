"""Breadth-first search through the states of a model, for the shortest way to a wrong one."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Explorable(Protocol[S]):
    """What a search needs of a model."""

    def initial(self) -> Iterable[S]: ...

    def steps(self, state: S) -> Sequence[tuple[str, S]]:
        """Every action that is possible in a state, with the state after it."""
        ...

    def wrong(self, state: S) -> str | None:
        """Why a state must never be, or None."""
        ...

    def ended(self, state: S) -> bool:
        """Whether this is an end that the search is to reach."""
        ...


@dataclass
class Search:
    """What a search found. ``trace``: the shortest way to the first wrong state, empty if there is none."""

    states: int = 0
    transitions: int = 0
    ends: int = 0
    complete: bool = True
    depth: int = 0
    """Every state that fewer steps reach was visited."""
    reason: str = ""
    trace: list[str] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)
    """How often an action, its digits aside, was the first to reach a state."""

    def __str__(self) -> str:
        extent = "all" if self.complete else "the first"
        lines = [
            f"{extent} {self.states:,} states to depth {self.depth}, "
            f"{self.transitions:,} transitions, {self.ends:,} at END"
        ]
        if self.trace:
            lines += [f"{self.reason}, after {len(self.trace)} steps:"]
            lines += [f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1)]
        return "\n".join(lines)


_REPORT_STATES = 1 << 14
"""How many states are visited between two words to whoever waits: about a third of a second."""


def search(
    model: Explorable[S], *, max_states: int, progress: Callable[[int, int], None] | None = None
) -> Search:
    """Breadth first from every initial state; stops at the first wrong one or at ``max_states``.

    ``progress`` is told now and then how many states were visited, and how many are known.
    """
    found = Search()
    order: list[S] = list(model.initial())
    origin = _Origin(array("q", [-1] * len(order)), [""] * len(order))
    seen = set(order)
    first = len(order)
    at = 0
    while at < len(order) < max_states and not found.trace:
        steps = model.steps(order[at])
        found.transitions += len(steps)
        for name, after in steps:
            if after in seen:
                continue
            seen.add(after)
            order.append(after)
            origin.at.append(at)
            origin.step.append(name)
            found.ends += model.ended(after)
            reason = model.wrong(after)
            if reason is not None:
                found.reason, found.trace = reason, origin.trace(len(order) - 1)
                break
        at += 1
        if progress is not None and not at % _REPORT_STATES:
            progress(at, len(order))
    for name, count in Counter(origin.step[first:]).items():
        found.actions[name.translate(_NO_DIGITS)] += count
    found.states = len(order)
    found.complete = at == len(order) and not found.trace
    found.depth = len(found.trace) or len(origin.trace(at - 1))
    return found


_NO_DIGITS = str.maketrans("0123456789", "#" * 10)


@dataclass
class _Origin:
    """Of each state: the index of the one it was first reached from, and by which step."""

    at: array[int]
    step: list[str]

    def trace(self, index: int) -> list[str]:
        """The shortest way to a state."""
        steps: list[str] = []
        while self.at[index] >= 0:
            steps.append(self.step[index])
            index = self.at[index]
        return steps[::-1]
