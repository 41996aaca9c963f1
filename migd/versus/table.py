"""The report as people read it: a table for each case, with what each figure is of the yardstick's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from migd.versus.cases import YARDSTICK
from migd.versus.figures import Report, Row, ratio

_FIGURES = (
    ("total_s", "total ms", 1e-3, 0),
    ("downtime_s", "downtime ms", 1e-3, 1),
    ("wire_bytes", "MB", 1e6, 1),
)


def report_text(found: Report) -> str:
    """Medians, the lowest and highest beside those of times; ``x`` columns are shares of the yardstick's."""
    runs = max((len(row.runs) for row in found.rows), default=0)
    how = f"median of {runs} runs (lowest - highest)" if runs > 1 else "one run each"
    head = (
        f"migd {found.version} and {found.emulator}: {found.ram_bytes >> 20} MiB of RAM under TCG, loopback; "
        f"{found.cores} cores, Linux {found.kernel}\n{how}; x: of {YARDSTICK}"
    )
    cases = list(dict.fromkeys(row.case for row in found.rows))
    return "\n\n".join([head, *(f"{case}\n{_table(found.of(case))}" for case in cases)])


def _table(rows: Sequence[Row]) -> str:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("")
    for _, heading, _, _ in _FIGURES:
        for title in (heading, "x"):
            table.add_column(title, justify="right")
    for row in rows:
        cells = [str(row.contender)]
        for figure, _, unit, digits in _FIGURES:
            cells += [_value(row, figure, unit, digits), _share(ratio(rows, row, figure))]
        table.add_row(*cells)
    console = Console(file=sys.stdout, width=200, highlight=False, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _value(row: Row, figure: str, unit: float, digits: int) -> str:
    if not row.measured:
        return "failed"
    low, high = row.spread(figure)
    around = f" ({low / unit:.{digits}f} - {high / unit:.{digits}f})" if len(row.measured) > 1 else ""
    return f"{row.median(figure) / unit:.{digits}f}{around}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
