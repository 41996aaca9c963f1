"""What people see: a progress bar or a line per iteration, the result table, the status page."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from migd.control.commands import MigrationStatus, Moving, Remembered, StatusReport
from migd.control.documents import ListDocument
from migd.migration.stats import Arrival, Iteration, Result
from migd.ram.page import PAGE_BYTES
from migd.sizes import bandwidth_text

_ID_DIGITS = 8
"""Of a migration's id in tables: enough to name it by."""

_ARROWS = {"out": "->", "in": "<-"}


class Narrator:
    """Follows a migration on stderr: a bar on a terminal, a line per iteration elsewhere, or nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._lines = not quiet and not self._console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._done_pages = 0
        if not quiet and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<15}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Narrator:
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task("connecting", total=None)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; what is printed next stays."""
        if self._progress is not None:
            self._progress.stop()

    def moving(self, event: Moving) -> None:
        """The share never goes back, although pages do when the guest writes them again."""
        if self._progress is not None and self._task is not None:
            self._done_pages = max(self._done_pages, event.done_pages)
            self._progress.update(
                self._task,
                description=event.state,
                completed=self._done_pages,
                total=event.total_pages or None,
            )

    def iterated(self, iteration: Iteration) -> None:
        if self._lines:
            self._console.print(str(iteration))


def result_rows(result: Result) -> list[tuple[str, str]]:
    """Label and value of every figure of a result, in the order of the table."""
    if result.checked_pages is None:
        check = "none"
    else:
        check = f"{result.checked_pages} pages, {result.wrong_pages} wrong"
    return [
        ("total", f"{result.total_s * 1e3:.0f} ms"),
        ("downtime (guest's clock)", f"{result.downtime.guest_s * 1e3:.1f} ms"),
        *((f"  {name}", f"{seconds * 1e3:.1f} ms") for name, seconds in result.downtime.parts()),
        ("iterations", str(len(result.iterations))),
        ("bytes on the wire", f"{result.wire_bytes / 1e6:.1f} MB"),
        ("pages of RAM", str(result.ram_pages)),
        ("pages sent", str(result.sent_pages)),
        ("  re-sent", str(result.resent_pages)),
        ("zero pages", str(result.zero_pages)),
        ("skipped as free", str(result.skipped_free_pages)),
        ("holes", str(result.hole_pages)),
        ("FREE records", str(result.free_records)),
        ("rescued", str(result.rescued_pages)),
        ("reclaimed", str(result.reclaimed_pages)),
        ("dirty after the pause", str(result.late_dirty_pages)),
        ("hints applied", str(result.hints_applied)),
        (
            "  late / stale / rejected",
            f"{result.hints_late} / {result.hints_stale} / {result.hints_rejected}",
        ),
        ("hints", result.hints),
        ("dirty log", result.dirty_log or "-"),
        ("compression ratio", f"{result.compression_ratio:.2f}"),
        ("verification", result.verification or "-"),
        ("guest's own check", check),
    ]


def result_text(result: Result) -> str:
    """One result as a table; for a failure, first what happened and where the guest is."""
    headline = f"{result.guest} -> {result.peer}: {result.outcome}"
    if result.error:
        headline += f": {result.error}"
    return headline if result.outcome != "completed" else f"{headline}\n{comparison_text([('', result)])}"


def arrival_text(record: Arrival) -> str:
    """One arrival: what became of it, and in how long."""
    headline = f"{record.guest} <- {record.peer}: {record.outcome}"
    if record.error:
        headline += f": {record.error}"
    size, placed = record.ram_pages * PAGE_BYTES / 2**20, record.placed_bytes / 2**20
    return f"{headline}\n{size:.0f} MiB of RAM, {placed:.0f} MiB by records, in {record.total_s * 1e3:.0f} ms"


def record_text(record: Result | Arrival) -> str:
    """The outcome of a migration, whichever way it went."""
    return result_text(record) if isinstance(record, Result) else arrival_text(record)


def history_text(entries: list[Remembered]) -> str:
    """Migrations that are over, one line each."""
    table = _table("ended", "migration", "guest", "", "peer", "outcome", "took", "error")
    for entry in entries:
        record = entry.record
        table.add_row(
            entry.ended,
            record.migration[:_ID_DIGITS],
            record.guest,
            "->" if isinstance(record, Result) else "<-",
            record.peer,
            record.outcome,
            f"{record.total_s:.3f} s",
            record.error,
        )
    return _rendered(table) if entries else "no migration is remembered"


def list_text(found: ListDocument) -> str:
    """Guests, then migrations that go on, one line each."""
    table = _table("daemon", "what", "name", "guest", "state", "")
    for guest in found.guests:
        words = f"{guest.ram_bytes / 2**20:.0f} MiB, pid {guest.pid}"
        table.add_row(guest.daemon, "guest", guest.name, guest.name, guest.state, words)
    for moving in found.migrations:
        words = f"{_ARROWS[moving.direction]} {moving.peer}, {_share(moving)} done, {_moved(moving)}"
        name = moving.migration[:_ID_DIGITS]
        table.add_row(moving.daemon, "migration", name, moving.guest, moving.state, words)
    return _rendered(table) if table.row_count else "no guest is attached, and no migration goes on"


def _share(moving: MigrationStatus) -> str:
    return f"{moving.done_pages / moving.total_pages:.0%}" if moving.total_pages else "-"


def _moved(moving: MigrationStatus) -> str:
    """Bytes and mean rate so far. No time left: what the guest will write meanwhile nobody knows."""
    rate = moving.moved_bytes / moving.elapsed_s / 1e6 if moving.elapsed_s else 0.0
    return f"{moving.moved_bytes / 1e6:.0f} MB in {moving.elapsed_s:.1f} s ({rate:.0f} MB/s)"


def comparison_text(results: list[tuple[str, Result]]) -> str:
    """Several results side by side under their names."""
    table = Table(box=None, pad_edge=False, show_header=len(results) > 1, header_style="")
    table.add_column("")
    for name, _ in results:
        table.add_column(name, justify="right" if len(results) > 1 else "left")
    columns = [result_rows(result) for _, result in results]
    for rows in zip(*columns, strict=True):
        table.add_row(rows[0][0], *(value for _, value in rows))
    return _rendered(table)


def status_text(found: StatusReport) -> str:
    """The status page of one daemon."""
    lines = [
        f"migd {found.role} {found.version}, pid {found.pid}, {found.runtime_dir}",
        *([f"listening on {found.listen} (plaintext)"] if found.listen else []),
        f"write tracking: {found.write_tracking}",
        f"bandwidth: outgoing {bandwidth_text(found.max_outgoing_bytes_s)}, "
        f"incoming {bandwidth_text(found.max_incoming_bytes_s)}",
    ]
    guests = _table("guest", "kind", "state", "RAM", "pid", "migration", "writes found by")
    for guest in found.guests:
        size = f"{guest.ram_bytes / 2**20:.0f} MiB"
        migration = guest.migration[:_ID_DIGITS]
        guests.add_row(guest.name, guest.kind, guest.state, size, str(guest.pid), migration, guest.tracking)
    migrations = _table("migration", "guest", "", "peer", "state", "done", "moved", "error")
    for moving in found.migrations:
        migrations.add_row(
            moving.migration[:_ID_DIGITS],
            moving.guest,
            _ARROWS[moving.direction],
            moving.peer,
            moving.state,
            _share(moving),
            _moved(moving),
            moving.error,
        )
    lines.append(_rendered(guests) if found.guests else "no guest is attached")
    lines.append(_rendered(migrations) if found.migrations else "no migrations")
    limits = ", ".join(f"{name} {getattr(found.limits, name):g}" for name in found.limits.__struct_fields__)
    lines.append(f"limits: {limits}")
    return "\n".join(lines)


def _table(*heads: str) -> Table:
    """Without lines, as it may be cut into columns by other programs."""
    return Table(*heads, box=None, pad_edge=False)


def _rendered(table: Table) -> str:
    console = Console(file=sys.stdout, width=200, highlight=False, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
