"""Oracle: what must hold of the guests, by what they know themselves; migd's own accounts are not asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from migd.guest.control import GuestState
from migd.migration.stats import Arrival, Result
from tests.simulation.guest import GuestProcess
from tests.simulation.memory import Image

_OWN_BUG = 70


@dataclass
class Known:
    """One guest: every process that was ever meant to be it."""

    name: str
    copies: list[GuestProcess] = field(default_factory=list)
    home: GuestProcess | None = None
    """Where it ran last, or runs."""
    image: Image | None = None
    """How it was paused there, while it is."""
    wounded: bool = False
    """A fault killed one of its processes."""
    tainted_by: set[str] = field(default_factory=set)
    """Migrations that started it with a page that was written behind the log's back."""


class Oracle:
    """Collects what is wrong. ``starts`` and ``compared_pages`` say how much was looked at."""

    def __init__(self, complain: Callable[[str], object]) -> None:
        self._complain = complain
        self.guests: dict[str, Known] = {}
        self.starts = 0
        self.compared_pages = 0
        self.condemned = 0

    def of(self, process: GuestProcess) -> Known:
        known = self.guests.setdefault(process.name, Known(process.name))
        if process not in known.copies:
            known.copies.append(process)
        return known

    # -- while it goes on -----------------------------------------------------------------------------

    def runs(self, process: GuestProcess, image: Image | None) -> None:
        """A guest begins, resumes (no image), or is started where it has arrived."""
        known = self.of(process)
        others = [copy for copy in known.copies if copy is not process and copy.running]
        if others:
            self._complain(
                f"TWO GUESTS: {process.name} runs at {process.place.name} and at {others[0].place.name}"
            )
        if image is None:
            if known.home not in (None, process):
                self._complain(f"{process.name} is resumed at {process.place.name}, and ran elsewhere since")
        else:
            self._started(known, process, image)
        known.home, known.image = process, None

    def _started(self, known: Known, process: GuestProcess, image: Image) -> None:
        self.starts += 1
        if image is not known.image:
            self._complain(f"{process.name} is started at {process.place.name} from an old image")
        assert process.memory is not None
        self.compared_pages += process.memory.pages
        wrong = image.wrong_pages(process.memory.whole())
        home = known.home.memory if known.home is not None else None
        smuggled = home.smuggled if home is not None else set()
        if smuggled & set(wrong):
            known.tainted_by.add(process.arrived_by)
        for page, text in wrong.items():
            if page not in smuggled:
                self._complain(f"WRONG PAGE: {process.name} is started at {process.place.name}: {text}")

    def paused(self, process: GuestProcess, image: Image) -> None:
        self.of(process).image = image

    def finished(self, record: Result | Arrival) -> None:
        """What a session says of itself in the end."""
        if record.exit_code == _OWN_BUG or record.error.startswith("unexpected"):
            self._complain(f"a bug in migd: {record.error}")
        if not isinstance(record, Result):
            return
        known = self.guests[record.guest]
        relied = any(copy.memory is not None and copy.memory.took_unwritten for copy in known.copies)
        if record.rescued_pages and not relied:
            self._complain(f"{record.rescued_pages} pages of {record.guest} were rescued from a wrong skip")
        if record.wrong_pages and not known.tainted_by:
            self._complain(f"{record.guest} found {record.wrong_pages} of its pages wrong")
        tainted = record.migration in known.tainted_by
        if tainted and record.outcome == "completed" and record.verification != "off":
            self._complain(f"{record.guest} has a page that nobody logged, and: {record.verification}")

    # -- in the end -------------------------------------------------------------------------------------

    def judge(self) -> None:
        """All daemons are up, nothing is broken any more, and the operator has resolved what was unknown."""
        for known in self.guests.values():
            alive = [copy for copy in known.copies if copy.alive]
            running = [copy for copy in alive if copy.running]
            if len(running) > 1:
                self._complain(f"TWO GUESTS: {known.name}, in the end")
            if known.wounded:
                continue
            if known.tainted_by and not running:
                self.condemned += 1
                continue
            if not running:
                states = [f"{copy.state} at {copy.place.name}" for copy in alive]
                self._complain(f"{known.name} runs nowhere: {', '.join(states) or 'no process is left'}")
            elif len(alive) > len(running):
                left = next(copy for copy in alive if not copy.running)
                self._complain(f"{known.name} runs, and a copy is left, {left.state} at {left.place.name}")
            for copy in running:
                wrong = copy.memory.wrong_pages() if copy.memory is not None else []
                if wrong and not known.tainted_by:
                    self._complain(f"{known.name} has wrong pages in the end: {wrong}")

    @property
    def left_paused(self) -> list[GuestProcess]:
        """For the operator."""
        return [
            copy
            for known in self.guests.values()
            for copy in known.copies
            if copy.alive and copy.state is GuestState.PAUSED
        ]
