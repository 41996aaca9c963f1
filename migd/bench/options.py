"""The command line of the bench: what it takes, and the help that explains what it measures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from migd.bench import cases
from migd.bench.bench import MigrationOptions
from migd.bench.cases import CASES, DEFAULT_WRITE_RATES, Contender, contenders
from migd.errors import ConfigError
from migd.ram.block import PAGE_BYTES
from migd.sizes import parse_bytes
from migd.wire.protocol import MAX_STREAMS

LEAST_RAM_BYTES = 16_000_000
"""In less the processes are all that is measured."""

_DESCRIPTION = "Migrate guests of several kinds with the real daemons over loopback, and measure it."
_EPILOG = """\
cases:
{cases}

Each run has two fresh daemons and a fresh guest; the runs of all cases take turns. Right before each one, as
much memory as it will need is touched and freed, since a virtual machine is slow to get memory again that it
gave back to its host. At the destination the guest checks all its pages against its own journal. Beside the
medians stands what the machine itself can do, measured first.

Exit codes: 0 done; 1 a migration failed or a page was wrong, and the report says which; 2 usage; 3 not enough
memory; 130 interrupted. Nothing else should run meanwhile. docs/performance.md says how to read the report.
"""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. ``ram_bytes`` is whole pages."""

    contenders: list[Contender]
    ram_bytes: int
    runs: int
    migration: MigrationOptions
    json_path: Path | None


def parse(words: list[str]) -> BenchOptions:
    """SystemExit for what argparse refuses, after its help; ConfigError for the rest."""
    found = _parser().parse_args(words)
    if found.ram < LEAST_RAM_BYTES:
        raise ConfigError(f"--ram: {found.ram} bytes are too few to measure anything; 16M is the least")
    if found.json is not None and not found.json.absolute().parent.is_dir():
        raise ConfigError(f"--json: {found.json.parent} is no directory")
    if found.streams is not None and found.streams > MAX_STREAMS:
        raise ConfigError(f"--streams: {found.streams} is not between 1 and {MAX_STREAMS}")
    migration: MigrationOptions = {}
    for name in ("streams", "verify", "compression"):
        if (value := getattr(found, name)) is not None:
            migration[name] = value
    return BenchOptions(
        contenders=contenders(found.case or CASES, found.write_rate or DEFAULT_WRITE_RATES),
        ram_bytes=found.ram // PAGE_BYTES * PAGE_BYTES,
        runs=found.runs,
        migration=migration,
        json_path=found.json,
    )


def _parser() -> argparse.ArgumentParser:
    assert cases.__doc__ is not None
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(cases=indent(cases.__doc__.split("\n\n", 1)[1].rstrip(), "  ")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("--ram", type=size, default="2G", metavar="SIZE",
        help="RAM of the guest, like 512Mi or 2G, down to whole pages; default: 2G")
    add("--case", nargs="+", action="extend", metavar="NAME", help="only these cases; default: all")
    add("--runs", type=count, default=5, metavar="N", help="runs of each; default: 5")
    add("--write-rate", nargs="+", action="extend", type=size, metavar="SIZE",
        help="bytes a second that the live-writer writes, a row for each; default: 50M 200M")
    add("--streams", type=count, metavar="N", help="TCP connections of a migration")
    add("--verify", choices=["auto", "strict", "late", "off"],
        help="when the source checks that no write was missed")
    add("--compression", choices=["auto", "lz4", "none"], help="of the pages sent")
    add("--json", type=Path, metavar="FILE",
        help="write everything there, too: each run, the medians, what the machine can do")
    # fmt: on
    return parser


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
