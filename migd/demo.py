"""The demo: two daemons and a guest as processes of their own; one migration without hints, one with."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from migd.api import Guest, OwnedDaemon
from migd.control import commands
from migd.errors import ConfigError, LiveUnsupported, MigdError
from migd.guest.workload import HOG_FRACTION
from migd.migration.convergence import SWITCHOVER_OVERHEAD_S
from migd.migration.stats import SCHEMA, Result
from migd.report import Narrator, comparison_text

DOWNTIME_LIMIT_MS = SWITCHOVER_OVERHEAD_S * 1e3 + 0.5
"""Tight on purpose: half a millisecond for the rest of memory. What 50 MB/s dirty during a bulk stage
of 50 MB takes longer to send at up to 2.3 GB/s, so that the guest has to be caught up with in iterations."""

MIN_ITERATIONS = 3

_POLL_S = 0.02
_STALL_S = 30.0
"""A guest that fills no page for this long is stuck."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as much the migration without hints took; 0 if the other took nothing.

    ``total`` and ``downtime`` of time, ``wire_bytes`` of bytes.
    """

    total: float
    downtime: float
    wire_bytes: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`migd demo`: two runs; ``without_hints`` and ``with_hints`` are their results."""

    schema: int = SCHEMA
    without_hints: Result
    with_hints: Result
    ratios: Ratios
    failures: list[str]
    """Which of the demo's conditions did not hold."""


def run_demo(ram_bytes: int, rate_bytes_s: int, *, as_json: bool) -> int:
    """Run it and print the comparison: the exit code, 1 with a line for each condition that did not hold.

    MigdError if it cannot be run at all: LiveUnsupported where the kernel tracks no writes.
    """
    if ram_bytes <= 0 or ram_bytes % 4096:
        raise ConfigError(f"--ram: {ram_bytes} bytes is not a positive multiple of 4096")
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        with Stage(quiet=as_json) as stage:
            stage.start_daemons()
            without = stage.migrate("without-hints", ram_bytes, rate_bytes_s, hints=False)
            hinted = stage.migrate("with-hints", ram_bytes, rate_bytes_s, hints=True)
    except KeyboardInterrupt:
        click.echo("migd demo: interrupted; everything it had started was ended", err=True)
        return 130
    found = compare(without, hinted)
    click.echo(_json(found) if as_json else _text(found))
    for failure in found.failures:
        click.echo(f"migd demo: FAILED: {failure}", err=True)
    return 1 if found.failures else 0


def compare(without: Result, hinted: Result) -> Comparison:
    """Both results with what follows from them."""
    return Comparison(
        without_hints=without,
        with_hints=hinted,
        ratios=Ratios(
            total=_ratio(without.total_s, hinted.total_s),
            downtime=_ratio(without.downtime.guest_s, hinted.downtime.guest_s),
            wire_bytes=_ratio(without.wire_bytes, hinted.wire_bytes),
        ),
        failures=[*_broken("without hints", without), *_broken("with hints", hinted), *_idle(hinted)],
    )


def _ratio(without: float, hinted: float) -> float:
    return round(without / hinted, 2) if hinted else 0.0


def _broken(name: str, result: Result) -> Iterator[str]:
    """Why a run is no proof that memory arrived right."""
    if result.outcome != "completed":
        yield f"{name}: the migration {result.outcome}: {result.error}"
    elif not result.checked_pages:
        yield f"{name}: the guest did not report its own check at the destination"
    elif result.wrong_pages:
        yield f"{name}: the guest found {result.wrong_pages} of {result.checked_pages} pages wrong"


def _idle(result: Result) -> Iterator[str]:
    """What the run with hints left undone, so that it shows nothing."""
    if result.outcome != "completed":
        return
    if len(result.iterations) < MIN_ITERATIONS:
        yield f"with hints: {len(result.iterations)} iterations, not {MIN_ITERATIONS}: nothing was caught up"
    for count, what in (
        (result.resent_pages, "no page was sent again: the guest did not write meanwhile"),
        (result.free_records, "no FREE record was sent: nothing that had been sent was freed meanwhile"),
        (result.skipped_free_pages, f"no page was skipped as free (hints: {result.hints})"),
    ):
        if not count:
            yield f"with hints: {what}"


def _text(found: Comparison) -> str:
    table = comparison_text([("without hints", found.without_hints), ("with hints", found.with_hints)])
    ratios = found.ratios
    return (
        f"{table}\n\nWithout hints it took {ratios.total:g} times the total, {ratios.downtime:g} times the "
        f"downtime and {ratios.wire_bytes:g} times the bytes."
    )


def _json(found: Comparison) -> str:
    return msgspec.json.format(msgspec.json.encode(found)).decode()


class Stage:
    """The two daemons of a demo, and the guests it shows; all of it is gone when the context is left."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._owned = ExitStack()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owned.__exit__(kind, error, trace)

    def start_daemons(self) -> None:
        """Both, on a free port. LiveUnsupported if the kernel does not track writes."""
        self._say("starting a destination and a source daemon")
        self._destination = self._owned.enter_context(OwnedDaemon("destination"))
        self._source = self._owned.enter_context(OwnedDaemon("source"))
        self._address = self._destination.ready().address
        tracking = self._source.ready().status().write_tracking
        if tracking != "userfaultfd":
            raise LiveUnsupported(f"the demo is about the kernel's write tracking, and here it is {tracking}")

    def migrate(self, name: str, ram_bytes: int, rate_bytes_s: int, *, hints: bool) -> Result:
        """The result of one migration of a new guest, which is ended wherever it is afterwards."""
        guest = self._source.start_guest(name, ram_bytes, workload="hog", rate=rate_bytes_s)
        self._fill(guest, ram_bytes)
        self._say(f"migrating it to {self._address}, {'with' if hints else 'without'} hints")
        migration = self._source.migrate(
            name, self._address, hints=hints, downtime_limit_ms=DOWNTIME_LIMIT_MS
        )
        with Narrator(quiet=self._quiet) as narrator:
            for event in migration.follow():
                match event:
                    case commands.Moving():
                        narrator.moving(event)
                    case commands.Iterated(iteration=iteration):
                        narrator.iterated(iteration)
        guest.end()
        if any(arrived.name == name for arrived in self._destination.status().guests):
            self._destination.guest(name).end()
        return migration.wait()

    def _fill(self, guest: Guest, ram_bytes: int) -> None:
        """Returns when the guest has filled and freed its RAM and goes on writing."""
        size = f"{ram_bytes / 2**20:.0f} MiB of guest {guest.name}"
        self._say(f"filling {size} from real files, then freeing most of it")
        with self._bar("filling", int(ram_bytes * HOG_FRACTION)) as show:
            best, since = -1, time.monotonic()
            while not guest.filled:
                show(filled := _mapped_bytes(guest.pid))
                if filled > best:
                    best, since = filled, time.monotonic()
                elif time.monotonic() - since > _STALL_S:
                    raise MigdError(f"guest {guest.name} filled nothing for {_STALL_S:g} s")
                time.sleep(_POLL_S)

    # -- what people see ----------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line)

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function that shows how far it is; off a terminal it does nothing."""
        if self._quiet or not self._console.is_terminal:
            yield lambda _done: None
            return
        columns = (TextColumn(f"{name:<15}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.update(task, completed=min(done, total))


def _mapped_bytes(pid: int) -> int:
    """Shared memory that a process has touched: the RAM of a guest."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
