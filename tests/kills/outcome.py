"""Outcome: what is looked at of one guest after a kill or another fault, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from migd.migration.state import SourceState
from tests.kills.settling import Where
from tests.support.pair import Output


@dataclass
class Outcome:
    """What became of one guest."""

    allowed: frozenset[Where]
    """Where it may be in the end."""
    where: Where | None = None
    """None while it is nowhere that the table knows of."""
    running: list[int] = field(default_factory=list)
    """In how many processes it ran, at each look."""
    resolved: list[Output] = field(default_factory=list)
    """`migd resolve`, where the outcome had stayed unknown."""
    decided: Where | None = None
    """Where a condemned guest ran after `migd resolve --force-dest`."""
    checked: tuple[int, int] | None = None
    """Pages checked and wrong, for a guest that moved, at once or in the second migration."""
    moved_again: str = ""
    """How a second migration of a guest that had stayed ended."""

    @property
    def split(self) -> bool:
        """It was seen to run twice at the same time."""
        return max(self.running, default=0) > 1

    @property
    def wrong_pages(self) -> int:
        return self.checked[1] if self.checked is not None else 0

    def faults(self) -> list[str]:
        """What is not as it has to be; empty for a cell that was survived."""
        return [*self._misplaced(), *self._undocumented(), *self._not_whole()]

    def _misplaced(self) -> list[str]:
        found = []
        if self.split:
            found.append(f"split brain: it ran in {self.running} processes")
        if self.where not in self.allowed:
            found.append(f"ends as {self.where}, not as {' or '.join(self.allowed)}")
        elif self.where in (Where.SOURCE, Where.DESTINATION) and self.running[-1] != 1:
            found.append(f"is said to run at the {self.where} and does not")
        elif self.where not in (Where.SOURCE, Where.DESTINATION) and self.running[-1] != 0:
            found.append(f"runs, and is said to be {self.where}")
        return found

    def _undocumented(self) -> list[str]:
        """An unknown outcome names the next step, with an exit code of its own."""
        codes = {Where.UNKNOWN: (4,), Where.CONDEMNED: (5,), Where.NOWHERE: (0, 1, 4)}.get(
            self.where or Where.SOURCE, (0, 1)
        )
        found = [f"migd resolve: {said}" for said in self.resolved[-1:] if said.exit_code not in codes]
        if self.where in (Where.UNKNOWN, Where.CONDEMNED) and not any(
            "migd resolve" in said.stdout + said.stderr for said in self.resolved
        ):
            found.append("nobody says that migd resolve is the next step")
        return found

    def _not_whole(self) -> list[str]:
        if self.where not in (Where.SOURCE, Where.DESTINATION, Where.CONDEMNED):
            return []
        if self.where is Where.CONDEMNED and self.decided is not Where.DESTINATION:
            return [f"migd resolve --force-dest: {self.decided}"]
        if self.where is Where.SOURCE and self.moved_again != SourceState.COMPLETED:
            return [f"the second migration: {self.moved_again or 'none'}"]
        if self.checked is None or not self.checked[0]:
            return ["no page of it was checked"]
        return [f"{self.wrong_pages} of {self.checked[0]} pages are wrong"] if self.wrong_pages else []
