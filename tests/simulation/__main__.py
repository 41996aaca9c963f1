"""`scripts/simulate`, which is `python -m tests.simulation`: many seeds, or one of them with its trace."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from tests.simulation.many import Figures, run_many
from tests.simulation.runner import Report, quick_collections, run_seed
from tests.support import program

_LAST_EVENTS = 25


@click.command(context_settings=program.CONTEXT)
@click.option("--seeds", default=2000, show_default=True, type=click.IntRange(1), help="How many to run.")
@click.option(
    "--from", "first", default=0, show_default=True, type=click.IntRange(0), help="The first of them."
)
@click.option("--seed", type=click.IntRange(0), help="Run just this one, and print all that happens in it.")
@click.option("--faults/--no-faults", default=True, show_default=True, help="Whether anything goes wrong.")
@program.json_option
@click.option(
    "--most-failures", default=10, show_default=True, type=click.IntRange(1), help="Stop after so many."
)
def main(
    seeds: int, first: int, seed: int | None, faults: bool, json_path: Path | None, most_failures: int
) -> None:
    """Both daemons, their guests and the network between them, in one process and in virtual time.

    A seed decides everything: the guests, what they write, when they are sent to the other host, what goes
    wrong (connections, daemons, guests, journals, an operator who cancels), and in which order things happen.
    The same seed gives the same trace on any machine. After each start of a guest every page is compared with
    what the guest itself had stored; in the end it must run on exactly one side.

    \b
    scripts/simulate --seeds 20000              all cores, a few minutes
    scripts/simulate --seed 1234                the trace of one, with virtual times
    scripts/simulate --seeds 500 --no-faults    migrations that nothing disturbs

    Exit code 0 if every promise held, 1 if one was broken, 2 for wrong usage.
    """
    if seed is not None:
        sys.exit(_replay(seed, faults=faults))
    sys.exit(_run(first, seeds, faults=faults, most_failures=most_failures, json_path=json_path))


def _replay(seed: int, *, faults: bool) -> int:
    with quick_collections():
        report = run_seed(seed, faults=faults)
    click.echo(f"seed {seed}: {report.plan}")
    for line in report.trace:
        click.echo(line)
    click.echo(f"trace {report.digest}, {report.virtual_s:.1f} s of virtual time")
    for wrong in report.wrongs:
        click.echo(f"WRONG: {wrong}")
    return program.FOUND if report.wrongs else 0


def _run(first: int, seeds: int, *, faults: bool, most_failures: int, json_path: Path | None) -> int:
    figures, code = Figures(), 0
    began = time.monotonic()
    with program.bar() as progress:
        bar = progress.add_task("seeds", total=seeds)

        def told() -> None:
            text = f"{figures.migrations} migrations, {len(figures.failures)} failed"
            progress.update(bar, completed=figures.seeds, description=text)

        try:
            run_many(figures, first, seeds, faults=faults, most_failures=most_failures, told=told)
        except KeyboardInterrupt:
            code = program.INTERRUPTED
    seconds = time.monotonic() - began
    for failure in figures.failures:
        _show(failure, faults=faults)
    _summarise(figures, first, seconds)
    program.write_figures(json_path, _flat(figures, first, seconds))
    return code or (program.FOUND if figures.failures else 0)


def _show(report: Report, *, faults: bool) -> None:
    click.echo(f"seed {report.seed} FAILED: {report.plan}")
    for line in report.trace[-_LAST_EVENTS:]:
        click.echo(f"  {line}")
    for wrong in report.wrongs:
        click.echo(f"  WRONG: {wrong}")
    click.echo(f"  again: scripts/simulate --seed {report.seed}{'' if faults else ' --no-faults'}\n")


def _summarise(figures: Figures, first: int, seconds: float) -> None:
    click.echo(
        f"{figures.seeds} seeds from {first} in {seconds:.0f} s "
        f"({figures.seeds / seconds * 60:.0f} a minute): "
        f"{figures.migrations} migrations in {figures.virtual_s / 3600:.0f} h of virtual time, "
        f"{figures.starts} guests started, {figures.compared_pages} pages compared, "
        f"{len(figures.failures)} seeds failed"
    )
    for title, counts in (("outcomes", figures.outcomes), ("faults", figures.faults)):
        found = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()))
        click.echo(f"{title}: {found or 'none'}")


def _flat(figures: Figures, first: int, seconds: float) -> dict[str, object]:
    """One flat object, from which documents are written."""
    return {
        "first_seed": first,
        "seeds": figures.seeds,
        "seconds": round(seconds, 1),
        "seeds_a_minute": round(figures.seeds / seconds * 60),
        "migrations": figures.migrations,
        "virtual_s": round(figures.virtual_s),
        "starts": figures.starts,
        "compared_pages": figures.compared_pages,
        "wrong_pages": sum("WRONG PAGE" in wrong for report in figures.failures for wrong in report.wrongs),
        "two_guests": sum("TWO GUESTS" in wrong for report in figures.failures for wrong in report.wrongs),
        "condemned": figures.condemned,
        "failed_seeds": [report.seed for report in figures.failures],
        **{f"outcome_{name.replace(' ', '_')}": count for name, count in sorted(figures.outcomes.items())},
        **{f"fault_{name}": count for name, count in sorted(figures.faults.items())},
    }


if __name__ == "__main__":
    program.run(main, "simulate")
