"""`scripts/qemu-matrix`, or `python -m tests.qemu_guest.matrix`: every cell, and scribbling at length."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import click

from migd.errors import MigdError
from migd.lab.debian import LabUnavailable
from migd.lab.emulators import Emulator
from migd.lab.workbench import boot
from migd.ram.soft_dirty import supported
from tests.qemu_guest.cells import CELLS, Boot, Cell, Log, chosen_cells
from tests.qemu_guest.outcomes import Outcomes
from tests.qemu_guest.scribble import live_through, tracked
from tests.qemu_guest.travel import booted, travel
from tests.support import program
from tests.support.vm import Journey, Route, route
from tests.support.vm_site import WAIT_S, Lab

_NO_MARKS = "this kernel has no soft-dirty marks"
_LEFT_OUT = "soft-dirty marks are for a QEMU without the preload: not tried here"
_MESSAGE_LINES = 12


@click.command(context_settings=program.CONTEXT)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help='Cells whose name fits, like "newest q35 *", "*: busy, compare*"; may be given several times.',
)
@click.option("--pairs", is_flag=True, help="Only the cells of every test run, in which each pair occurs.")
@click.option(
    "--scribble",
    "rounds",
    type=click.IntRange(0),
    default=28,
    show_default=True,
    help="Rounds of overwriting what each kind of guest calls free.",
)
@program.json_option
def matrix(only: Sequence[str], pairs: bool, rounds: int, json_path: Path | None) -> None:
    """Move real Linux guests under stock QEMU, in every combination of how they are run and moved.

    A cell is one migration: by QEMU, machine type, size of RAM, init_on_free, load, dirty log, streams and
    compression. In each the guest is held before it is started at its destination, and both RAM images are
    compared byte by byte; afterwards it has to find itself right. A guest is booted once and goes there and
    back for as many cells as are its own.

    Exit codes: 0 all were right; 1 one was not, and the table says which; 2 usage; 3 no real guest can run
    here; 130 interrupted.
    """
    try:
        lab = Lab.found()
    except LabUnavailable as error:
        click.echo(f"scripts/qemu-matrix: {error}", err=True)
        sys.exit(error.exit_code)
    cells = [cell for cell in (chosen_cells() if pairs else CELLS) if _fits(cell, only)]
    outcomes = Outcomes(f"Installed {lab.oldest}, newest {lab.newest}", len(cells))
    for kind, group in groupby(cells, key=lambda cell: cell.boot):
        _travel(lab, kind, list(group), outcomes)
    for emulator in lab.emulators if rounds else ():
        for init_on_free in (False, True):
            _scribble(lab, emulator, rounds, init_on_free, outcomes)
    click.echo(outcomes.text())
    program.write_figures(json_path, outcomes.figures())
    sys.exit(program.FOUND if outcomes.faults else 0)


def _fits(cell: Cell, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(str(cell), pattern) for pattern in only)


def _travel(lab: Lab, kind: Boot, cells: list[Cell], outcomes: Outcomes) -> None:
    """All cells of one boot; after one that failed with a new guest."""
    left = list(cells)
    while left:
        try:
            with route() as road:
                _go_on(lab, kind, road, left, outcomes)
        except (AssertionError, MigdError) as error:
            outcomes.ended(kind, _beginning(error))


def _go_on(lab: Lab, kind: Boot, road: Route, left: list[Cell], outcomes: Outcomes) -> None:
    """With one guest, as far as it gets: what it has done, or failed in, is taken off the list."""
    journey: Journey | None = None
    while left:
        cell = left.pop(0)
        if cell.move.log is Log.SOFT_DIRTY:
            outcomes.skipped(cell, _LEFT_OUT if supported() else _NO_MARKS)
            continue
        began_s = time.monotonic()
        try:
            journey = journey or booted(lab, kind, road)
            travelled = travel(journey, cell)
        except (AssertionError, MigdError) as error:
            outcomes.failed(cell, _beginning(error))
            return
        outcomes.arrived(cell, travelled, time.monotonic() - began_s)


def _scribble(lab: Lab, emulator: Emulator, rounds: int, init_on_free: bool, outcomes: Outcomes) -> None:
    label = f"{emulator}, init_on_free={int(init_on_free)}, {'zeros' if init_on_free else 'noise'}"
    recipe = tracked(lab.recipe(emulator, append=(f"init_on_free={int(init_on_free)}",)))
    try:
        with boot(recipe) as guest:
            guest.await_ready(WAIT_S)
            done = asyncio.run(live_through(guest, rounds, zeros=init_on_free))
    except (AssertionError, MigdError) as error:
        outcomes.died(label, _beginning(error))
    else:
        outcomes.lived(label, done)


def _beginning(error: Exception) -> str:
    return "\n".join(str(error).splitlines()[:_MESSAGE_LINES])


if __name__ == "__main__":
    program.run(matrix, "qemu-matrix")
