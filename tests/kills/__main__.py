"""`scripts/kills`, which is `python -m tests.kills`: kill -9 in every phase and at random moments."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import click
from rich.progress import Progress

from tests.kills.cells import KILLS, Blow
from tests.kills.moments import AT_ONCE, batches
from tests.kills.play import play
from tests.kills.report import Report
from tests.support import program
from tests.support.scene import PHASES


@click.command(context_settings=program.CONTEXT)
@click.option(
    "--rounds", type=click.IntRange(0), default=1, show_default=True, help="Times the whole matrix."
)
@click.option(
    "--random",
    "migrations",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help=f"Migrations to hit at random moments, {AT_ONCE} at once.",
)
@click.option("--seed", type=int, help="Of the random moments and victims; default: a new one, printed.")
@program.json_option
def kills(rounds: int, migrations: int, seed: int | None, json_path: Path | None) -> None:
    """Kill daemons and guests of real migrations, and look whether each guest runs exactly once, whole.

    The matrix holds a guest in every phase of both roles and kills -9 the source daemon, the destination
    daemon, both (either one back first), or the guest's process on either side; or interrupts either daemon
    (SIGSTOP, SIGCONT) or the network (reset, silent). Then it brings everything back, and compares with the
    table in tests/kills/cells.py. With --random, the same are killed while nothing stands still.

    A guest runs if its memory changes, whatever anybody says of it. After each kill: never in two processes;
    where it has to be, or unknown with the next step named; no wrong page by its own journal, also after a
    second migration of those that had stayed; no process or descriptor left.

    A seed repeats victims and delays, not what the operating system does with them.

    Exit codes: 0 all were survived; 1 one was not, and the report says which; 2 usage; 130 interrupted.
    """
    report = Report(seed if seed is not None else secrets.randbits(32))
    with program.bar() as progress:
        matrix = progress.add_task("matrix", total=rounds * len(Blow))
        for _ in range(rounds):
            report.rounds += 1
            for blow in Blow:
                _add_scene(report, blow)
                progress.advance(matrix)
        if migrations:
            _add_moments(report, migrations, progress)
    click.echo(report.text())
    program.write_figures(json_path, report.figures())
    sys.exit(program.FOUND if report.faults else 0)


def _add_scene(report: Report, blow: Blow) -> None:
    try:
        played = play(blow, PHASES)
    except AssertionError as error:  # it could not even be brought to its end
        report.faults.append(f"{blow}: {error}")
        return
    if blow in KILLS:
        report.kills += len(played.outcomes)
    else:
        report.interruptions += len(played.outcomes)
    report.faults += [f"{blow}: {fault}" for fault in played.faults]
    for name, outcome in played.outcomes.items():
        report.add(f"{blow}, {name}", outcome)


def _add_moments(report: Report, migrations: int, progress: Progress) -> None:
    random = progress.add_task("random moments", total=-(-migrations // AT_ONCE))
    for batch in batches(migrations, report.seed):
        report.random_kills += 1
        report.random_migrations += len(batch.outcomes)
        report.moments += batch.states
        report.faults += [f"{batch.blow} at a random moment: {fault}" for fault in batch.faults]
        for name, outcome in batch.outcomes.items():
            report.add(f"{batch.blow} at a random moment, {name}", outcome)
        progress.advance(random)


if __name__ == "__main__":
    program.run(kills, "kills")
