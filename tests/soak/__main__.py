"""`scripts/soak`, which is `python -m tests.soak`: real migrations of real guests, every byte compared.

Exit code 0 if all was right, 1 if a page was wrong, a guest ran twice or did not arrive, 130 if interrupted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click

from migd.errors import MigdError
from tests.soak import report
from tests.soak.figures import Figures
from tests.soak.plan import Plant
from tests.soak.soak import Soak
from tests.support import program


@click.command(context_settings=program.CONTEXT)
@click.option("--runs", type=click.IntRange(1), default=100, show_default=True, help="How often the guest is "
              "moved, with all that goes wrong before it arrives.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of the plan: sizes, contracts, hints, faults and "
              "when they come. Processes are never twice the same, their plan is.")  # fmt: skip
@click.option(
    "--run", "only", type=click.IntRange(0), help="This run alone, as it is planned under the seed."
)
@click.option("--jobs", type=click.IntRange(1, 64), default=os.cpu_count() or 1, show_default=True,
              help="Pairs of daemons at a time.")  # fmt: skip
@click.option("--plant", type=click.Choice([plant.value for plant in Plant]), help="A fault in the guest, to "
              "be found. smuggle: it writes behind the dirty log; lie: all its memory is free.")  # fmt: skip
@program.json_option
@click.option("--evidence", type=click.Path(path_type=Path, file_okay=False), help="Directory for what "
              "is kept of a run that goes wrong.  [default: a new one]")  # fmt: skip
def main(
    runs: int,
    seed: int,
    only: int | None,
    jobs: int,
    plant: str | None,
    json_path: Path | None,
    evidence: Path | None,
) -> None:
    """Move guests between two migd daemons, again and again, while they write.

    Each guest writes pages that say what they are, and keeps a journal of them in another memory. They answer
    requests for free pages late, wrongly, or not at all; connections are cut, spoilt and lost, migrations
    cancelled at any moment, and then the guest has to arrive all the same. Before its first instruction there
    every byte of its RAM is compared with the journal, and with the RAM that it left.

    \b
      scripts/soak --runs 1000 --seed 7        the same plan every time
      scripts/soak --seed 7 --run 123          one run of it
      scripts/soak --runs 3 --plant smuggle    exits with 1: the oracle has teeth
    """
    numbers = range(runs) if only is None else range(only, only + 1)
    place = evidence or Path(tempfile.gettempdir()) / f"migd-soak-{os.getpid()}"
    with _Narrator(len(numbers)) as narrator:
        soak = Soak(seed, place, min(jobs, len(numbers)), Plant(plant) if plant else None, narrator.ran)
        try:
            soak.run(numbers)
        except (AssertionError, MigdError, OSError) as error:
            click.echo(f"scripts/soak: it could not begin: {error}", err=True)
            sys.exit(program.FOUND)
    click.echo(report.text(soak))
    program.write_figures(json_path, report.flat(soak))
    for line in soak.unplanned:
        click.echo(f"scripts/soak: failed without planned trouble, and arrived later: {line}", err=True)
    for failure in soak.failures:
        click.echo(f"scripts/soak: FAILED: {failure}", err=True)
    sys.exit(program.FOUND if soak.failures else 0)


class _Narrator:
    """A bar on a terminal; elsewhere a line now and then."""

    _EVERY = 50

    def __init__(self, runs: int) -> None:
        self._progress = program.bar()
        self._task = self._progress.add_task("starting daemons", total=runs)

    def __enter__(self) -> _Narrator:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def ran(self, figures: Figures) -> None:
        """One more run is over."""
        words = f"{figures.wrong_pages} wrong of {figures.owned_pages / 1e6:.1f} M pages"
        self._progress.update(self._task, completed=figures.runs, description=words)
        if self._progress.disable and figures.runs % self._EVERY == 0:
            click.echo(f"{figures.runs} runs: {words}, {figures.failed_runs} failed runs", err=True)


if __name__ == "__main__":
    program.run(main, "soak")
