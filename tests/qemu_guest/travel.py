"""One cell in practice: the guest is brought under its load, moved, compared and checked."""

from __future__ import annotations

from typing import NamedTuple

from migd.lab.workbench import MIB
from migd.migration.state import SourceState
from migd.migration.stats import Result
from tests.qemu_guest.cells import Boot, Cell, Load, Log, Qemu, Size
from tests.support.ram_comparison import Comparison
from tests.support.vm import Journey, Route
from tests.support.vm_site import Lab

GIB = 1 << 30
BUSY_BYTES_S = 20_000_000
USUAL_BYTES_S = 2_000_000
HOG_BYTES = 96 * MIB
"""Freed and full of old data, it is most of what is free in the smallest guest."""
SOME_BYTES = 24 * MIB

_UNHINTED = "not used: the compare log needs the guest's free pages at the pause"


def booted(lab: Lab, boot: Boot, road: Route) -> Journey:
    """A guest of that kind, ready to be moved."""
    emulator = lab.oldest if boot.qemu is Qemu.OLDEST else lab.newest
    recipe = lab.recipe(
        emulator,
        machine=str(boot.machine),
        ram_bytes=boot.ram_bytes,
        append=(f"init_on_free={int(boot.init_on_free)}",),
    )
    journey = road.journey(f"vm{boot.ram_bytes // MIB}", recipe).boot()
    mtree = journey.here.ask_qemu(journey.name, "human-monitor-command", **{"command-line": "info mtree -f"})
    is_split = f"{4 * GIB:016x}-" in mtree
    assert is_split == (boot.size is Size.ABOVE), mtree
    return journey


class Travelled(NamedTuple):
    """What one migration did, by its own account and by the comparison."""

    result: Result
    compared: Comparison


def travel(journey: Journey, cell: Cell) -> Travelled:
    """There. AssertionError for whatever is not as it has to be."""
    boot, move = cell.boot, cell.move
    littered = _bring_under(journey, move.load)
    hinted = move.log is Log.USERFAULTFD
    leg = journey.begin(
        *([SourceState.PAUSING] if hinted else []),
        dirty_log=str(move.log),
        streams=move.streams,
        compression=str(move.compression),
    )
    if hinted:
        # Memory of a large guest is read faster than its agent tells of it. The agent goes before the
        # workload: when that has answered, all of the agent's answer has come.
        with leg.held(SourceState.PAUSING):
            journey.ask("check")
    result = leg.arrive(hints="used" if hinted else _UNHINTED)
    compared = leg.compared
    assert compared is not None
    assert (result.dirty_log, result.streams) == (move.log, move.streams)
    assert (result.skipped_free_pages > 0) == hinted, result
    if hinted and not boot.init_on_free:
        assert compared.left > littered // 4, "old data stays behind"
    return Travelled(result, compared)


def _bring_under(journey: Journey, load: Load) -> int:
    """What it does from now on; returns how many free pages hold old data, unless it clears them.

    Some do in any case: at a destination all of them are zero, and nothing could be left behind.
    """
    rates = {Load.IDLE: 0, Load.BUSY: BUSY_BYTES_S, Load.HOG: USUAL_BYTES_S}
    journey.ask("rate", bytes_s=rates[load])
    size_bytes = HOG_BYTES if load is Load.HOG else SOME_BYTES
    journey.litter(size_bytes)
    return size_bytes // 4096
