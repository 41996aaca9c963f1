"""What the tests of real guests share; where there can be none they skip, and with MIGD_NO_SKIP they fail."""

from __future__ import annotations

import pytest

from migd.lab.debian import LabUnavailable
from tests.support import absence
from tests.support.vm_site import Lab


@pytest.fixture(scope="session")
def lab() -> Lab:
    try:
        return Lab.found()
    except LabUnavailable as error:
        absence.skip(str(error))
