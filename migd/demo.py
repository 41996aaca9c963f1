"""The demo: two daemons and a guest as processes of their own; one migration without hints, one with.

Everything it starts names its private directory on its command line, so that it can end all of it, an
incoming guest that has outlived its daemon included, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import StatusReport
from migd.errors import ConfigError, LiveUnsupported, MigdError
from migd.guest.workload import HOG_FRACTION
from migd.migration.convergence import SWITCHOVER_OVERHEAD_S
from migd.migration.stats import Result
from migd.report import Narrator, comparison_text

DOWNTIME_LIMIT_MS = SWITCHOVER_OVERHEAD_S * 1e3 + 0.5
"""Tight on purpose: half a millisecond for the rest of memory. What 50 MB/s dirty during a bulk stage
of 50 MB takes longer to send at up to 2.3 GB/s, so that the guest has to be caught up with in iterations."""

MIN_ITERATIONS = 3

_POLL_S = 0.02
_START_S = 20.0
"""For a daemon to listen, on a busy machine."""
_STALL_S = 30.0
"""A guest that fills no page for this long is stuck."""
_END_S = 3.0
"""Between SIGTERM and SIGKILL."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as much the migration without hints took."""

    total: float
    downtime: float
    wire_bytes: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What ``migd demo --json`` prints. ``failures`` says which of the demo's conditions did not hold."""

    without_hints: Result
    with_hints: Result
    ratios: Ratios
    failures: list[str]


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
    """The processes of a demo below one private directory; both are gone when the context is left."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Stage:
        self._directory = Path(tempfile.mkdtemp(prefix="migd-demo-"))
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number in _INTERRUPTS:  # a second Ctrl-C must not leave half of it behind
            signal.signal(number, signal.SIG_IGN)
        self._end_all()
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- the parts ----------------------------------------------------------------------------------

    def start_daemons(self) -> None:
        """Both, on a free port. LiveUnsupported if guests cannot be migrated live on this machine."""
        self._say("starting a destination and a source daemon")
        config = self._directory / "destination.toml"
        config.write_text('[destination]\nlisten = "127.0.0.1:0"\n')
        target = self._start("destination", "--runtime-dir", self._path("d"), "--config", str(config))
        source = self._start("source", "--runtime-dir", self._path("s"))
        self._destination = ControlClient(self._directory / "d")
        self._source = ControlClient(self._directory / "s")
        self._address = self._answer("the destination daemon", target, self._destination).listen
        tracking = self._answer("the source daemon", source, self._source).write_tracking
        if tracking != "userfaultfd":
            raise LiveUnsupported(f"no live migration on this machine: write tracking {tracking}")

    def migrate(self, name: str, ram_bytes: int, rate_bytes_s: int, *, hints: bool) -> Result:
        """The result of one migration of a new guest, which is ended wherever it is afterwards."""
        guest = self._start(
            "guest", "--name", name, "--ram", str(ram_bytes), "--workload", "hog", "--rate",
            str(rate_bytes_s), "--socket", self._path("s/guest.sock"),
        )  # fmt: skip
        self._fill(name, guest, ram_bytes)
        self._say(f"migrating it to {self._address}, {'with' if hints else 'without'} hints")
        request = commands.Migrate(
            guest=name, to=self._address, hints=hints, downtime_limit_ms=DOWNTIME_LIMIT_MS
        )
        result = self._follow(request)
        self._end([guest.pid, *self._pids_at_destination()])
        return result

    def _follow(self, request: commands.Migrate) -> Result:
        with Narrator(quiet=self._quiet) as narrator:
            for reply in self._source.ask(request):
                match reply:
                    case commands.Moving():
                        narrator.moving(reply)
                    case commands.Iterated(iteration=iteration):
                        narrator.iterated(iteration)
                    case commands.Finished(result=result):
                        return result
                    case commands.Failed(error=error):
                        raise MigdError(error)
                    case _:
                        pass
        last = self._last_line(self._processes[1])
        raise MigdError(f"the source daemon ended before the migration did: {last}")

    def _pids_at_destination(self) -> list[int]:
        status = self._destination.ask_once(commands.Status())
        assert isinstance(status, StatusReport)
        return [guest.pid for guest in status.guests if guest.pid]

    # -- starting and waiting -----------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return str(self._directory / name)

    def _log(self, process: subprocess.Popen[bytes]) -> Path:
        return self._directory / f"{self._processes.index(process)}.log"

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """``migd ARGUMENTS`` as a process of a session of its own: Ctrl-C is for the demo to handle."""
        with (self._directory / f"{len(self._processes)}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "migd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _check_alive(self, what: str, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            raise MigdError(f"{what} ended with {process.returncode}: {self._last_line(process)}")

    def _last_line(self, process: subprocess.Popen[bytes]) -> str:
        lines = self._log(process).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _answer(self, what: str, process: subprocess.Popen[bytes], client: ControlClient) -> StatusReport:
        """Its first answer to STATUS."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            self._check_alive(what, process)
            with contextlib.suppress(MigdError):  # not listening yet
                answer = client.ask_once(commands.Status())
                assert isinstance(answer, StatusReport)
                return answer
            time.sleep(_POLL_S)
        raise MigdError(f"{what} did not answer within {_START_S:g} s")

    def _fill(self, name: str, guest: subprocess.Popen[bytes], ram_bytes: int) -> None:
        """Returns when the guest has filled and freed its RAM and goes on writing."""
        what = f"filling {ram_bytes / 2**20:.0f} MiB of guest {name} from real files, then freeing most of it"
        self._say(what)
        show, hide = self._bar("filling", int(ram_bytes * HOG_FRACTION))
        best, since = -1, time.monotonic()
        try:
            while b" ready: " not in self._log(guest).read_bytes():
                self._check_alive(f"guest {name}", guest)
                filled = _mapped_bytes(guest.pid)
                show(filled)
                if filled > best:
                    best, since = filled, time.monotonic()
                elif time.monotonic() - since > _STALL_S:
                    raise MigdError(f"guest {name} filled nothing for {_STALL_S:g} s")
                time.sleep(_POLL_S)
        finally:
            hide()

    # -- what people see ----------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        if not self._quiet:
            self._console.print(line)

    def _bar(self, name: str, total: int) -> tuple[Callable[[int], None], Callable[[], None]]:
        """Two functions: show how far it is, and take the bar away; neither does anything off a terminal."""
        if self._quiet or not self._console.is_terminal:
            return lambda _done: None, lambda: None
        columns = (TextColumn(f"{name:<15}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        progress = Progress(*columns, console=self._console, transient=True)
        task = progress.add_task(name, total=total)
        progress.start()
        return lambda done: progress.update(task, completed=min(done, total)), progress.stop

    # -- the end ------------------------------------------------------------------------------------

    def _end_all(self) -> None:
        """Also what others started for us: an incoming guest survives its daemon, and any crash of it."""
        self._end(_pids_naming(self._directory))
        while left := _pids_naming(self._directory):
            self._end(left)

    def _end(self, pids: list[int]) -> None:
        """SIGTERM, and SIGKILL for what is still there after _END_S."""
        _signal_all(pids, signal.SIGTERM)
        deadline = time.monotonic() + _END_S
        while (left := self._alive(pids)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        _signal_all(left, signal.SIGKILL)
        while self._alive(left):
            time.sleep(_POLL_S)

    def _alive(self, pids: list[int]) -> list[int]:
        for process in self._processes:
            process.poll()
        return [pid for pid in pids if pid in _pids_naming(self._directory)]


def _pids_naming(directory: Path) -> list[int]:
    """Processes with a private directory of ours on their command line; zombies have none left."""
    wanted = os.fsencode(directory)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if wanted in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def _signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _mapped_bytes(pid: int) -> int:
    """Shared memory that a process has touched: the RAM of a guest."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
