"""What the tests of QEMU share: the emulators there are, and places whose paths a socket can have."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.errors import ResourceError
from migd.lab.emulators import Emulator
from migd.qemu import preload
from migd.ram import linux
from tests.support import absence
from tests.support.qemu import Hatchery, available, hatchery


@pytest.fixture(scope="session", params=["oldest", "newest"])
def emulator(request: pytest.FixtureRequest) -> Emulator:
    """Each QEMU there is: the installed one, and the newest that Debian has."""
    found = available()
    if not found:
        absence.skip("no QEMU is to be had here")
    if request.param == "newest" and len(found) == 1:
        pytest.skip("there is one QEMU only")
    return found[0 if request.param == "oldest" else -1]


@pytest.fixture(scope="session")
def newest() -> Emulator:
    """For what has nothing to do with a version."""
    if not (found := available()):
        absence.skip("no QEMU is to be had here")
    return found[-1]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in memory, with a short path."""
    with tempfile.TemporaryDirectory(prefix="mq-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def qemus(emulator: Emulator, place: Path) -> Iterator[Hatchery]:
    with hatchery(emulator, place) as made:
        yield made


@pytest.fixture
def new_qemus(newest: Emulator, place: Path) -> Iterator[Hatchery]:
    with hatchery(newest, place) as made:
        yield made


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a QEMU whose writes the kernel tracks."""
    try:
        os.close(linux.userfaultfd())
        library = preload.library(tmp_path_factory.mktemp("preload"))
    except (OSError, ResourceError) as error:
        absence.skip(f"no kernel, or no compiler, for it: {error}")
    return preload.environment({}, (), preload=library)
