"""What people see while the bench runs: a line per run on stderr, below it a bar where that is a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from migd.bench.cases import Contender
from migd.bench.figures import FIGURES, Run


class RunNarrator:
    """Follows ``runs`` runs. Nothing is printed while one is being timed."""

    def __init__(self, runs: int) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,  # a thread that draws would take its share of a run that is being timed
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("measuring the machine", total=runs)

    def __enter__(self) -> RunNarrator:
        self._progress.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begins(self, what: str) -> None:
        """The next run is of this."""
        self._progress.update(self._task, description=what, refresh=True)

    def noted(self, line: str) -> None:
        """Something beside the runs."""
        self._console.print(line)

    def ended(self, line: str) -> None:
        """That run is over."""
        self._console.print(line)
        self._progress.advance(self._task)


def run_line(contender: Contender, run: Run) -> str:
    """What is said of a run that is over."""
    return f"run {run.number}: {contender.label}: {_summary(run)}"


def _summary(run: Run) -> str:
    if run.failures or run.measured is None:
        return f"FAILED: {'; '.join(run.failures)}"
    total_s, downtime_s, wire_bytes = (
        FIGURES[name](run.measured) for name in ("total_s", "downtime_s", "wire_bytes")
    )
    return f"{total_s * 1e3:.0f} ms, downtime {downtime_s * 1e3:.1f} ms, {wire_bytes / 1e6:.1f} MB"
