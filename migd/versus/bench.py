"""Each contender in turn, case by case and again and again, every time with a freshly booted guest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from migd import __version__
from migd.bench.touch import touch_in_child
from migd.errors import MigdError
from migd.lab import emulators, image
from migd.lab.emulators import Emulator
from migd.lab.image import Image
from migd.lab.workbench import Recipe
from migd.versus import migd_itself, qemu_itself
from migd.versus.cases import Case, Contender, Measured
from migd.versus.figures import Report, Row, Run
from migd.versus.venue import Venue

Told = Callable[[str], None]


def run_versus(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    ram_bytes: int,
    runs: int,
    begins: Told,
    ended: Told,
    noted: Told,
) -> Report:
    """``begins`` and ``ended`` are told of every run, ``noted`` of what is prepared before.

    LabUnavailable where no guest can be had.

    A run that fails is part of the report. Whatever ends it ends all that it has started.
    """
    begins("preparing the guest")
    guest, emulator = image.image(progress=noted), emulators.newest(progress=noted)
    emulators.compiler(progress=noted)
    rows = {(case, contender): list[Run]() for case in cases for contender in contenders}
    for number in range(1, runs + 1):
        for (case, contender), before in rows.items():
            begins(f"{contender}, {case}")
            run = _run(number, case, contender, emulator, guest, ram_bytes)
            before.append(run)
            ended(f"run {number}: {case}: {contender}: {_summary(run)}")
    return Report(
        version=__version__,
        kernel=os.uname().release,
        cores=len(os.sched_getaffinity(0)),
        emulator=str(emulator),
        ram_bytes=ram_bytes,
        rows=[Row(case=case, contender=of, runs=found) for (case, of), found in rows.items()],
    )


def _run(
    number: int, case: Case, contender: Contender, emulator: Emulator, guest: Image, ram_bytes: int
) -> Run:
    balloon = contender is Contender.BALLOON
    recipe = Recipe(emulator, guest, ram_bytes=ram_bytes, balloon=balloon, append=("quiet",))
    try:
        return Run(number=number, measured=_measured(recipe, case, contender))
    except MigdError as error:
        return Run(number=number, failure=str(error))


def _measured(recipe: Recipe, case: Case, contender: Contender) -> Measured:
    with Venue(recipe) as venue:
        venue.boot(case)
        venue.await_guest()
        if contender.ours:
            with migd_itself.Pair(venue) as pair:
                touch_in_child(recipe.ram_bytes)
                measured = pair.move(hints=contender is Contender.MIGD)
        else:
            touch_in_child(recipe.ram_bytes)
            measured = qemu_itself.move(venue, contender)
        venue.check()
    return measured


def _summary(run: Run) -> str:
    found = run.measured
    if found is None:
        return f"FAILED: {run.failure}"
    return (
        f"{found.total_s * 1e3:.0f} ms, downtime {found.downtime_s * 1e3:.1f} ms, "
        f"{found.wire_bytes / 1e6:.1f} MB ({found.detail})"
    )
