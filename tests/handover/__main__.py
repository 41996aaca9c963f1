"""`scripts/handover`, which is `python -m tests.handover`: the hand-over searched, and its wrong versions."""

from __future__ import annotations

from pathlib import Path

import click

from tests.handover.bounds import budgets
from tests.handover.exploration import Exploration
from tests.handover.model import HandOverModel
from tests.handover.mutants import MUTANTS
from tests.proof.mutant import Death, Mutant
from tests.support import program


@click.command(context_settings=program.CONTEXT)
@click.option(
    "--crashes", type=click.IntRange(0), default=2, show_default=True, help="Of each daemon, at any point."
)
@click.option(
    "--cuts",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Of the connection that the source has.",
)
@click.option(
    "--attempts",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Migrations of the same guest, one after another.",
)
@click.option(
    "--kills",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of guest processes, on either side.",
)
@click.option(
    "--words",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the operator: --force-source or --force-dest.",
)
@click.option(
    "--full", type=click.IntRange(0), default=0, show_default=True, help="Journal writes that fail."
)
@click.option(
    "--mutants/--no-mutants", default=True, show_default=True, help="Search the wrong versions, too."
)
@click.option("--traces", is_flag=True, help="Print how each wrong version was noticed.")
@program.json_option
@click.pass_context
def main(
    context: click.Context,
    crashes: int,
    cuts: int,
    attempts: int,
    kills: int,
    words: int,
    full: int,
    mutants: bool,
    traces: bool,
    json_path: Path | None,
) -> None:
    """Search every world that two daemons reach in a hand-over, with so many faults at any point.

    In none of them may two guests run, or one whose verdict was bad; from each of them it must be possible
    that the guest runs on one side for good. If not, the shortest way there is printed.

    \b
    scripts/handover                                        two crashes a side, two cuts
    scripts/handover --attempts 2                           much further: millions of states
    scripts/handover --crashes 1 --kills 1 --words 1        a killed guest, and an operator

    Exit codes: 0 nothing found; 1 a wrong world, or a wrong version that survives; 2 usage.
    """
    bounds = budgets(
        source_crash=crashes,
        destination_crash=crashes,
        cut=cuts,
        attempt=attempts,
        kill=kills,
        word=words,
        full=full,
    )
    exploration = Exploration(HandOverModel(), bounds)
    with program.counted("states") as moved:
        found = exploration.explore(progress=moved)
    click.echo(
        f"{len(exploration.visited()):,} worlds, {found.states:,} states with what is left of the faults, "
        f"{found.transitions:,} steps, {found.depth} deep, {found.ends:,} settled"
    )
    click.echo(
        f"WRONG: {Death(found.reason, tuple(found.trace))}" if found.trace else "never two, and never none"
    )
    survivors = _hunt(traces=traces) if mutants else []
    program.write_figures(
        json_path,
        {
            "crashes": crashes,
            "cuts": cuts,
            "attempts": attempts,
            "kills": kills,
            "words": words,
            "full": full,
            "worlds": len(exploration.visited()),
            "states": found.states,
            "transitions": found.transitions,
            "depth": found.depth,
            "settled": found.ends,
            "complete": found.complete,
            "wrong": found.reason,
            "mutants": len(MUTANTS) if mutants else 0,
            "mutants_killed": len(MUTANTS) - len(survivors) if mutants else 0,
        },
    )
    if found.trace or survivors:
        context.exit(program.FOUND)


def _hunt(*, traces: bool) -> list[Mutant]:
    """The wrong versions that nobody noticed."""
    survivors: list[Mutant] = []
    with program.counted("wrong versions") as moved:
        for number, mutant in enumerate(MUTANTS, 1):
            death = mutant.kill()
            moved(number, len(MUTANTS))
            if not death.trace:
                survivors.append(mutant)
            noticed = str(death) if traces else f"{death.reason}, after {len(death.trace)} steps"
            click.echo(f"{mutant.number:>3}  {mutant.bug}: {noticed if death.trace else 'SURVIVES'}")
    click.echo(f"{len(MUTANTS) - len(survivors)} of {len(MUTANTS)} wrong versions noticed")
    return survivors


if __name__ == "__main__":
    program.run(main, "handover")
