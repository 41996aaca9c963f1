"""The bench: each contender in turn, again and again, every time with fresh processes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from migd import __version__, api
from migd.bench.cases import Contender
from migd.bench.figures import BenchReport, ContenderReport, Measured, Run, failures_of
from migd.bench.machine_limits import measure
from migd.bench.progress import RunNarrator, run_line
from migd.bench.touch import touch_in_child
from migd.bench.usage import Watch
from migd.errors import MigdError, ResourceError

GUEST = "bench"

_SLOWEST_FILL_BYTES_S = 20_000_000
_MARGIN_BYTES = 512 << 20
"""Beside the RAM of a guest and of its copy: the processes, and content to fill RAM with."""
_AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")


class MigrationOptions(TypedDict, total=False):
    """What is passed on to each migration; without a key it is the default."""

    streams: int
    verify: Literal["auto", "strict", "late", "off"]
    compression: Literal["auto", "lz4", "none"]


def run_bench(
    contenders: Sequence[Contender],
    ram_bytes: int,
    runs: int,
    options: MigrationOptions,
    narrator: RunNarrator,
) -> BenchReport:
    """Measure the machine, then ``runs`` times each contender. A run that fails is part of the report.

    ResourceError if there is not enough memory for guest and copy. Whatever ends it ends all it has started.
    """
    _check_memory(ram_bytes)
    limits = measure(ram_bytes)
    found: list[list[Run]] = [[] for _ in contenders]
    for number in range(1, runs + 1):
        for contender, before in zip(contenders, found, strict=True):
            narrator.begins(contender.label)
            run = _run(number, contender, ram_bytes, options)
            before.append(run)
            narrator.ended(run_line(contender, run))
    return BenchReport(
        version=__version__,
        kernel=os.uname().release,
        cores=len(os.sched_getaffinity(0)),
        ram_bytes=ram_bytes,
        options={name: value for name, value in options.items() if isinstance(value, str | int)},
        limits=limits,
        contenders=[
            ContenderReport.of(contender, of_it) for contender, of_it in zip(contenders, found, strict=True)
        ],
    )


def _run(number: int, contender: Contender, ram_bytes: int, options: MigrationOptions) -> Run:
    try:
        measured = _measure(contender, ram_bytes, options)
    except MigdError as error:
        return Run(number=number, failures=[str(error)])
    return Run(
        number=number,
        measured=measured,
        failures=list(failures_of(measured.result, hints=contender.hints)),
    )


def _measure(contender: Contender, ram_bytes: int, options: MigrationOptions) -> Measured:
    """One migration of such a guest. The memory that its copy will need is touched right before."""
    with api.start_daemon("source") as here, api.start_daemon("destination") as there:
        guest = here.start_guest(GUEST, ram=ram_bytes, **contender.guest)
        guest.ready(api.guest.READY_S + ram_bytes / _SLOWEST_FILL_BYTES_S)
        address = there.address
        touch_in_child(ram_bytes)
        with Watch(here.pid) as source, Watch(there.pid) as destination:
            result = here.migrate(GUEST, address, hints=contender.hints, **options).wait()
        return Measured(result=result, source=source.usage, destination=destination.usage)


def _check_memory(ram_bytes: int) -> None:
    found = _AVAILABLE.search(Path("/proc/meminfo").read_text())
    available_bytes = int(found[1]) * 1024 if found else 0
    needed_bytes = 2 * ram_bytes + _MARGIN_BYTES
    if available_bytes < needed_bytes:
        raise ResourceError(
            f"--ram: {needed_bytes >> 20} MiB of memory are needed, for the guest and its copy, and "
            f"{available_bytes >> 20} MiB are available: choose a smaller guest"
        )
