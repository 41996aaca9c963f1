"""The report as people read it: times, traffic and costs of each contender, and what the machine can do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from migd.bench.figures import BenchReport, Spread
from migd.bench.machine_limits import MachineLimits
from migd.ram.block import PAGE_BYTES

MOST_OF_RAM = 0.5
"""What sends less than this share of RAM spends its time elsewhere: a comparison would mislead."""

Figures: TypeAlias = dict[str, Spread]
Cell: TypeAlias = Callable[[Figures], str]


def report_text(found: BenchReport) -> str:
    """Medians; for the times that matter, the lowest and highest beside them."""
    runs = max((len(contender.runs) for contender in found.contenders), default=0)
    options = "".join(f", {name} {value}" for name, value in found.options.items())
    head = (
        f"migd {found.version}: {found.ram_bytes / 2**20:.0f} MiB of RAM{options}; {found.cores} cores, "
        f"Linux {found.kernel}\n"
        + (f"median of {runs} runs (lowest - highest)" if runs > 1 else "one run each")
    )
    costs = {**_COSTS, **_shares(found.limits, found.ram_bytes)}
    return "\n\n".join([head, *(_table(found, cells) for cells in (_TIMES, _TRAFFIC, costs)), _limits(found)])


# -- cells --------------------------------------------------------------------------------------------


def _median(name: str, unit: float = 1, digits: int = 0) -> Cell:
    return lambda figures: f"{figures[name].median / unit:.{digits}f}"


def _spread_ms(name: str) -> Cell:
    def show(figures: Figures) -> str:
        spread = figures[name]
        around = f" ({spread.low * 1e3:.0f} - {spread.high * 1e3:.0f})" if spread.low < spread.high else ""
        return f"{spread.median * 1e3:.0f}{around}"

    return show


_TIMES = {
    "total ms": _spread_ms("total_s"),
    "downtime ms": _spread_ms("downtime_s"),
    "pause": _median("pause_s", 1e-3, 1),
    "final send": _median("send_s", 1e-3, 1),
    "verify": _median("verify_s", 1e-3, 1),
    "ready": _median("ready_s", 1e-3, 1),
    "go": _median("go_s", 1e-3, 1),
}
_TRAFFIC = {
    "iterations": _median("iterations"),
    "pages sent": _median("sent_pages"),
    "zero": _median("zero_pages"),
    "skipped": _median("skipped_free_pages"),
    "holes": _median("hole_pages"),
    "MB on the wire": _median("wire_bytes", 1e6, 1),
}
_COSTS = {
    "source CPU ms": _median("source_cpu_s", 1e-3),
    "dest. CPU ms": _median("destination_cpu_s", 1e-3),
    "source peak MiB": _median("source_anon_bytes", 2**20),
    "dest. peak MiB": _median("destination_anon_bytes", 2**20),
    "RAM GB/s": _median("ram_gb_s", 1, 2),
}


def _shares(limits: MachineLimits, ram_bytes: int) -> dict[str, Cell]:
    """How near a contender that sends most of RAM comes to the limits that hold for it."""

    def share(name: str, limit_gb_s: float) -> Cell:
        def show(figures: Figures) -> str:
            most = figures["sent_pages"].median * PAGE_BYTES >= MOST_OF_RAM * ram_bytes
            return f"{figures[name].median / limit_gb_s:.0%}" if most else "-"

        return show

    return {
        "of first touch": share("content_gb_s", limits.first_touch_gb_s),
        "of loopback": share("wire_gb_s", limits.loopback_gb_s),
    }


# -- tables -------------------------------------------------------------------------------------------


def _table(found: BenchReport, cells: dict[str, Cell]) -> str:
    rows = [[contender.label, *_row(contender.figures, cells)] for contender in found.contenders]
    return _rendered(["", *cells], rows)


def _row(figures: Figures, cells: dict[str, Cell]) -> list[str]:
    return [cell(figures) for cell in cells.values()] if figures else ["failed"]


def _limits(found: BenchReport) -> str:
    limits = found.limits
    rows = [
        ("memory copy", limits.memcpy_gb_s),
        ("first touch by pwrite, after touching and freeing", limits.first_touch_gb_s),
        ("  of memory long unused", limits.first_touch_fresh_gb_s),
        ("loopback TCP, one connection", limits.loopback_gb_s),
        (f"lz4 of programs, one core (ratio {limits.lz4_ratio:.2f})", limits.lz4_compress_gb_s),
        ("  unpacking", limits.lz4_decompress_gb_s),
        ("XXH3-128 of each page, one core", limits.xxh3_page_gb_s),
    ]
    return _rendered(["what this machine can do", "GB/s"], [[name, f"{rate:.2f}"] for name, rate in rows])


def _rendered(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=None, pad_edge=False, header_style="")
    for at, head in enumerate(heads):
        table.add_column(head, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout, width=200, highlight=False, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
