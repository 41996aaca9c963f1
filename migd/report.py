"""What people see: a progress bar or a line per iteration, the result table, the status page."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from migd.control.commands import Moving, StatusReport
from migd.migration.stats import Iteration, Result


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
    ]
    guests = Table("guest", "state", "RAM", "pid", "migration", box=None, pad_edge=False)
    for guest in found.guests:
        size = f"{guest.ram_bytes / 2**20:.0f} MiB"
        guests.add_row(guest.name, guest.state, size, str(guest.pid), guest.migration[:8])
    migrations = Table("migration", "guest", "", "peer", "state", "done", "error", box=None, pad_edge=False)
    for moving in found.migrations:
        share = f"{moving.done_pages / moving.total_pages:.0%}" if moving.total_pages else "-"
        arrow = {"out": "->", "in": "<-"}[moving.direction]
        row = (moving.migration[:8], moving.guest, arrow, moving.peer, moving.state, share, moving.error)
        migrations.add_row(*row)
    lines.append(_rendered(guests) if found.guests else "no guest is attached")
    lines.append(_rendered(migrations) if found.migrations else "no migrations")
    limits = ", ".join(f"{name} {getattr(found.limits, name):g}" for name in found.limits.__struct_fields__)
    lines.append(f"limits: {limits}")
    return "\n".join(lines)


def _rendered(table: Table) -> str:
    console = Console(file=sys.stdout, width=200, highlight=False, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
