"""The cases: which guests the bench migrates, and what their memory holds before it does.

idle               5 % live, the rest never touched; with hints and without
zeroed             5 % live, the rest touched but zero; without hints, which would skip it unseen
freed              5 % live, the rest old data; with hints and without
full-compressible  all of RAM live, from programs and shared libraries
full-random        all of RAM live, incompressible
fragmented         30 % live in runs of 1 to 4 pages, the rest old data
live-writer        20 % live, the rest old data, and the guest goes on allocating, writing and freeing
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from migd.errors import ConfigError
from migd.guest.content import MAX_POOL_BYTES, RANDOM_DEVICE

CASES = (
    "idle",
    "zeroed",
    "freed",
    "full-compressible",
    "full-random",
    "fragmented",
    "live-writer",
)
DEFAULT_WRITE_RATES = (50_000_000, 200_000_000)
"""Bytes a second of the live-writer: a busy server, and four of them."""

_ELF_MAGIC = b"\x7fELF"


GuestOptions: TypeAlias = dict[str, str | int | float | list[str]]
"""Of ``migd guest``, with ``_`` for ``-``."""


@dataclass(frozen=True)
class Contender:
    """A row of the table: a guest, and whether its hints are used."""

    case: str
    label: str
    guest: GuestOptions
    """Beside name and RAM."""
    hints: bool = True


def contenders(cases: Sequence[str], write_rates: Sequence[int]) -> list[Contender]:
    """Those of the named cases, in the order of CASES. ConfigError for an unknown name, or a rate of 0."""
    for case in cases:
        if case not in CASES:
            raise ConfigError(f"--case: {case!r} is none of {', '.join(CASES)}")
    for rate in write_rates:
        if rate <= 0:
            raise ConfigError("--write-rate: 0 is as fast as it goes, which no migration catches up with")
    return [contender for contender in _all(write_rates) if contender.case in cases]


def _all(write_rates: Sequence[int]) -> Iterator[Contender]:
    idle: GuestOptions = {"workload": "idle", "live": 0.05}
    full: GuestOptions = {"workload": "idle", "live": 1}
    yield Contender("idle", "idle", idle)
    yield Contender("idle", "idle, no hints", idle, hints=False)
    yield Contender("zeroed", "zeroed, no hints", {**idle, "rest": "zeroed"}, hints=False)
    yield Contender("freed", "freed", {**idle, "rest": "freed"})
    yield Contender("freed", "freed, no hints", {**idle, "rest": "freed"}, hints=False)
    programs = [str(path) for path in binaries()]
    yield Contender("full-compressible", "full-compressible", {**full, "fill": programs})
    yield Contender("full-random", "full-random", {**full, "fill": [RANDOM_DEVICE]})
    fragmented: GuestOptions = {"workload": "idle", "live": 0.3, "run_pages": 4, "rest": "freed"}
    yield Contender("fragmented", "fragmented", fragmented)
    for rate in write_rates:
        writer: GuestOptions = {"workload": "churn", "rate": rate, "live": 0.2, "rest": "freed"}
        yield Contender("live-writer", f"live-writer, {rate / 1e6:g} MB/s", writer)


def binaries(enough_bytes: int = MAX_POOL_BYTES) -> list[Path]:
    """ELF files of this machine, the interpreter and then the largest shared libraries, of ``enough_bytes``.

    They are what lies in a guest's memory as code and constants; text compresses twice as well.
    """
    found = [Path(os.path.realpath(sys.executable))]
    missing_bytes = enough_bytes - found[0].stat().st_size
    for path in sorted(_libraries(), key=lambda path: (-path.stat().st_size, path)):
        if missing_bytes > 0 and _is_elf(path):
            found.append(path)
            missing_bytes -= path.stat().st_size
    return found


def _libraries() -> set[Path]:
    """Files beside the shared libraries that this process has mapped."""
    mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    beside = {Path(name).parent for name in mapped if ".so" in name}
    return {path.resolve() for directory in beside for path in directory.glob("*.so*") if path.is_file()}


def _is_elf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_ELF_MAGIC)) == _ELF_MAGIC
    except OSError:
        return False
