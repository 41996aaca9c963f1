"""`scripts/model`, which is `python -m tests.ledger`: the ledger searched for a state that loses a page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from migd.ram.contract import FreeContract
from tests.ledger.mutants import TRIALS
from tests.ledger.searches import COMPARED, DEEPER, LOGGED, MOST_STATES, World
from tests.support import program
from tests.support.compare_model import CompareModel
from tests.support.ledger_model import Model
from tests.support.search import Search

CONTRACTS = {contract.name.lower(): contract for contract in FreeContract}


@click.command(context_settings=program.CONTEXT)
@click.option("--deeper", is_flag=True, help="Also the worlds that take a test suite too long.")
@click.option("--pages", type=click.IntRange(1, 4), help="Search one world of your own, with so many pages.")
@click.option("--epochs", type=click.IntRange(0, 9), help="Requests for hints in it.  [default: 1]")
@click.option("--cancels", type=click.IntRange(0, 9), help="Attempts that are cancelled.  [default: 0]")
@click.option("--contract", type=click.Choice(list(CONTRACTS)), help="Of free pages.  [default: anything]")
@click.option("--holes", is_flag=True, help="Untouched pages, looked for at any time.")
@click.option("--awaits", is_flag=True, help="Time to pass between the two halves of a harvest.")
@click.option("--liar", is_flag=True, help="The guest hints what it likes, until it is caught.")
@click.option("--compare", is_flag=True, help="The log compares content instead of seeing writes.")
@click.option(
    "--max-states", default=MOST_STATES, show_default=True, help="Of each world; about 100 bytes each."
)
@program.json_option
@click.pass_context
def main(
    context: click.Context,
    deeper: bool,
    pages: int | None,
    max_states: int,
    json_path: Path | None,
    **own: Any,
) -> None:
    """Take every step in every order, around the ledger that production uses; no state may forget a page.

    Without a world of your own: those of the test suite. If a state does forget a page, the shortest way
    there is printed.

    \b
    scripts/model                                       2.8 million states, half a minute
    scripts/model --deeper                              7.5 million, two minutes
    scripts/model --pages 2 --epochs 1 --cancels 1      a world of your own
    scripts/model --pages 3 --epochs 0 --max-states 3000000

    Exit codes: 0 nothing found; 1 a page is lost, or a wrong version of the ledger survives; 2 usage.
    """
    mine = {name: value for name, value in own.items() if value is not None and value is not False}
    if mine and pages is None:
        raise click.UsageError(f"--{next(iter(mine))} is of a world of your own: give it --pages")
    if pages is not None and deeper:
        raise click.UsageError("--deeper is of the worlds that are there: not with --pages")
    worlds = [_own(pages, mine)] if pages is not None else [*LOGGED, *COMPARED, *(DEEPER if deeper else [])]
    began = time.monotonic()
    found = [_search(world, max_states) for world in worlds]
    survivors = _survivors() if pages is None else []
    total = _total(worlds, found)
    seconds = time.monotonic() - began
    click.echo(f"{total['states']:,} states, {total['transitions']:,} transitions in {seconds:.0f} s")
    if pages is None:
        total |= {"mutants": len(TRIALS), "mutants_killed": len(TRIALS) - len(survivors)}
    program.write_figures(json_path, total)
    if survivors or any(search.trace for search in found):
        context.exit(program.FOUND)


def _own(pages: int, mine: dict[str, Any]) -> World:
    model = CompareModel if mine.pop("compare", False) else Model
    contract = CONTRACTS[mine.pop("contract", "anything")]
    bounds = {"pages": pages, "epochs": 1, "contract": contract, **mine}
    name = ", ".join(f"{name} {value}" for name, value in {**bounds, "contract": contract.name}.items())
    return World(name, model, 0, bounds)


def _search(world: World, max_states: int) -> Search:
    with program.counted(world.name) as moved:
        found = world.search(max_states, moved)
    click.echo(f"{world.name}: {found}")
    return found


def _survivors() -> list[str]:
    """The wrong versions that lose nothing."""
    survivors = [trial.name for trial in TRIALS if not trial.kill().trace]
    click.echo(f"{len(TRIALS) - len(survivors)} of {len(TRIALS)} wrong versions lose a page")
    for name in survivors:
        click.echo(f"SURVIVES: {name}")
    return survivors


def _total(worlds: list[World], found: list[Search]) -> dict[str, Any]:
    return {
        **{f"states, {world.name}": search.states for world, search in zip(worlds, found, strict=True)},
        "searches": len(found),
        "complete": sum(search.complete for search in found),
        "states": sum(search.states for search in found),
        "transitions": sum(search.transitions for search in found),
        "ends": sum(search.ends for search in found),
        "depth": max(search.depth for search in found),
        "wrong": "; ".join(search.reason for search in found if search.trace),
    }


if __name__ == "__main__":
    program.run(main, "model")
