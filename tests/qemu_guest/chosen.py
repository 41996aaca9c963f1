"""The chosen cells as a test: each boot once, there and back as often as it has cells."""

from __future__ import annotations

from tests.qemu_guest.cells import Boot, Qemu, chosen_cells
from tests.qemu_guest.travel import booted, travel
from tests.support.vm import route
from tests.support.vm_site import Lab

BOOTS = list(dict.fromkeys(cell.boot for cell in chosen_cells()))


def boots(qemu: Qemu) -> list[Boot]:
    """What is booted of this QEMU."""
    return [boot for boot in BOOTS if boot.qemu is qemu]


def travel_all(lab: Lab, boot: Boot) -> None:
    """There, and back, and so on, as its cells say."""
    with route() as road:
        journey = booted(lab, boot, road)
        for cell in chosen_cells():
            if cell.boot == boot:
                travel(journey, cell)
