"""Soak: lives one after the other, several at a time, and what came of all their runs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from migd.errors import MigdError
from migd.migration.stats import Result
from tests.soak import evidence
from tests.soak.figures import Figures
from tests.soak.oracle import Comparison
from tests.soak.plan import RUNS_A_LIFE, Plant, Run, Trouble, life_of, planted, run_of
from tests.soak.voyage import Attempt, Voyage

_INTERRUPT_S = 1.0
"""Ctrl-C at a terminal reaches the daemons at the same moment as us."""


@dataclass(frozen=True)
class Failure:
    """A run that went wrong: what, and where its evidence lies."""

    run: int
    problems: list[str]
    place: Path

    def __str__(self) -> str:
        return f"run {self.run}: {'; '.join(self.problems)} (see {self.place})"


@dataclass
class Soak:
    """Runs of one seed. ``run`` once; its figures are complete when it has returned."""

    seed: int
    evidence: Path
    """Directory for what is kept of runs that went wrong; made when there is one."""
    jobs: int = 1
    """Lives at a time."""
    plant: Plant | None = None
    progress: Callable[[Figures], None] = lambda _figures: None
    """Called after every run."""
    figures: Figures = field(default_factory=Figures)
    failures: list[Failure] = field(default_factory=list)
    unplanned: list[str] = field(default_factory=list)
    """Why attempts failed that no trouble was planned for."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _ended: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    _errors: list[BaseException] = field(default_factory=list)

    def run(self, numbers: Iterable[int]) -> Figures:
        """These runs, in order within each life. Raises what kept a life from beginning; Ctrl-C ends it."""
        began = time.monotonic()
        lives: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for _, group in groupby(sorted(numbers), key=lambda number: number // RUNS_A_LIFE):
            lives.put(list(group))
        workers = [threading.Thread(target=self._work, args=(lives,)) for _ in range(self.jobs)]
        for worker in workers:
            worker.start()
        try:
            for _ in workers:  # not by join: Ctrl-C within it would pass the thread off as ended
                self._ended.get()
        finally:
            self._stop.set()
            for worker in workers:
                worker.join()
        self.figures.seconds = time.monotonic() - began
        if self._errors:
            raise self._errors[0]
        return self.figures

    def _work(self, lives: queue.SimpleQueue[list[int]]) -> None:
        try:
            while not self._stop.is_set() and not lives.empty():
                self._live(lives.get_nowait())
        except queue.Empty:  # another one took the last
            return
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits for all workers
            self._errors.append(error)
            self._stop.set()
        finally:
            self._ended.put(None)

    def _live(self, numbers: list[int]) -> None:
        """The runs of one life. After one that went wrong the guest is of no use, and another is born."""
        left = numbers
        while left and not self._stop.is_set():
            voyage = Voyage(life_of(self.seed, left[0] // RUNS_A_LIFE, self.plant))
            with self._lock:
                self.figures.lives += 1
            try:
                left = self._sail(voyage, left)
            finally:
                voyage.close()

    def _sail(self, voyage: Voyage, numbers: list[int]) -> list[int]:
        """The runs that are left: none, unless one went wrong."""
        for at, number in enumerate(numbers):
            if self._stop.is_set():
                return []
            run = run_of(self.seed, number)
            last = at == len(numbers) - 1
            if not self._travel(voyage, planted(run, self.plant) if self.plant else run, last=last):
                return numbers[at + 1 :]
        return []

    def _travel(self, voyage: Voyage, run: Run, *, last: bool) -> bool:
        """One run, and in the end a look at the guest itself: whether all was right."""
        attempts: list[Attempt] = []
        problems = []
        halted = Comparison()
        try:
            attempts = voyage.travel(run)
            if last:
                halted = voyage.halt()
        except (AssertionError, MigdError) as error:
            if self._stop.wait(
                _INTERRUPT_S
            ):  # whoever ends the soak ends its daemons, perhaps before it knows
                return False
            problems.append(f"{type(error).__name__}: {str(error)[:300]}")
        comparisons = voyage.witness.take()
        problems += voyage.witness.problems
        if attempts and len(comparisons) != 1:
            problems.append(f"the guest was started {len(comparisons)} times")
        for attempt in attempts:
            problems += suspicions(attempt.result)
        with self._lock:
            self._account(run, attempts, comparisons)
            right = self._judge(run, voyage, [*comparisons, halted], problems)
            self.progress(self.figures)
        return right

    def _account(self, run: Run, attempts: list[Attempt], comparisons: list[Comparison]) -> None:
        figures = self.figures
        figures.plan(run)
        for number, attempt in enumerate(attempts):
            result = attempt.result
            figures.result(result)
            figures.resolved += attempt.resolved
            if attempt.troubled:
                figures.struck[f"{run.trouble}: {result.outcome}"] += 1
            elif run.trouble is not Trouble.NONE and not number:
                figures.struck[f"{run.trouble}: too late"] += 1
            if result.outcome == "failed" and attempt.troubled:
                figures.failed_on_purpose += 1
            elif result.outcome == "failed":
                figures.failed_otherwise += 1
                self.unplanned.append(f"run {run.number}: {result.error}")
        for found in comparisons:
            figures.compared(found)

    def _judge(self, run: Run, voyage: Voyage, comparisons: list[Comparison], problems: list[str]) -> bool:
        """Whether all was right; else what was not, with its evidence."""
        findings = [finding for found in comparisons for finding in found.findings]
        if findings:
            wrong_pages = sum(found.wrong_pages for found in comparisons)
            first = findings[0]
            problems.insert(
                0, f"{wrong_pages} wrong pages, {first.page} at the {first.side}: {first.problem}"
            )
        if problems:
            self.figures.failed_runs += 1
            self.figures.problems += len(problems)
            place = evidence.keep(self.evidence, self.seed, run, voyage, comparisons, problems)
            self.failures.append(Failure(run.number, problems, place))
        return not problems


def suspicions(result: Result) -> list[str]:
    """What migd itself found and made good, or stopped at: with a right guest there is none of it."""
    said = []
    if "differ" in result.verification:
        said.append(f"migd found a write that was not logged: {result.verification}")
    if result.rescued_pages:
        said.append(f"migd rescued {result.rescued_pages} pages that were skipped and in use")
    if result.late_dirty_pages:
        said.append(f"migd found {result.late_dirty_pages} pages written after the pause")
    return said
