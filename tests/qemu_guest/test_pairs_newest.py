"""Every pair of what can differ, as far as it is tried with the newest QEMU (``cells.py``)."""

from __future__ import annotations

import pytest

from tests.qemu_guest.cells import Boot, Qemu
from tests.qemu_guest.chosen import boots, travel_all
from tests.support.vm_site import Lab

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("boot", boots(Qemu.NEWEST), ids=str)
def test_a_guest_arrives_whole_however_it_is_run_and_moved(lab: Lab, boot: Boot) -> None:
    if len(lab.emulators) == 1:
        pytest.skip("there is one QEMU only")
    travel_all(lab, boot)
