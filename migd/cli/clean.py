"""`migd clean`: what daemons that are gone have left behind goes, unless it still decides something."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec

from migd.cli.choice import runtime_dirs
from migd.cli.options import as_json_text, config_option, json_option, runtime_option
from migd.config import Config, load
from migd.errors import ResourceError
from migd.leftovers.leftover import Kind, Leftover, stays
from migd.migration.stats import SCHEMA


class Cleaning(msgspec.Struct, frozen=True, kw_only=True):
    """What `migd clean --json` prints. With ``dry_run``, ``removed`` is what would be."""

    schema: int = SCHEMA
    dry_run: bool
    removed: list[Leftover]
    kept: list[Leftover]
    failed: list[Leftover]
    """What should have been removed and could not be; ``why`` is the error."""


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@config_option
@runtime_option
@json_option
def clean(dry_run: bool, config_path: Path | None, directory: Path | None, as_json: bool) -> None:
    """Remove what daemons that are gone left behind: sockets, logs, RAM files, journals that are over.

    Where a daemon runs nothing is touched. A journal that still decides who runs a guest stays, and so does
    everything of a guest that lives; no process is ever signalled. It says what it kept, and why.
    """
    config = load(config_path) if config_path else Config()
    cleaning = _clean(runtime_dirs(directory, config), config, dry_run=dry_run, named=directory is not None)
    click.echo(as_json_text(cleaning) if as_json else "\n".join(_lines(cleaning)))
    sys.exit(1 if cleaning.failed else 0)


def _clean(directories: Iterable[Path], config: Config, *, dry_run: bool, named: bool) -> Cleaning:
    """ResourceError if a daemon uses the directory that was ``named``; of the usual ones that one stays."""
    from migd.leftovers.remains import Remains, ram_files

    cleaning = Cleaning(dry_run=dry_run, removed=[], kept=[], failed=[])
    _sort(ram_files(config.daemon.ram), cleaning)
    for directory in directories:
        try:
            with Remains(directory) as remains:
                _sort(remains.leftovers(), cleaning)
        except ResourceError as error:
            if named:
                raise
            cleaning.kept.append(stays(Kind.DIRECTORY, directory, str(error)))
    return cleaning


def _sort(leftovers: Iterable[Leftover], cleaning: Cleaning) -> None:
    """Each into its list, and those that may go are gone before the next one is looked for."""
    for leftover in leftovers:
        if not leftover.removable:
            cleaning.kept.append(leftover)
            continue
        try:
            if not cleaning.dry_run:
                leftover.remove()
        except (OSError, ResourceError) as error:
            cleaning.failed.append(msgspec.structs.replace(leftover, why=str(error)))
        else:
            cleaning.removed.append(leftover)


def _lines(cleaning: Cleaning) -> Iterator[str]:
    word = "would remove" if cleaning.dry_run else "removed"
    for said, leftovers in ((word, cleaning.removed), ("kept", cleaning.kept), ("FAILED", cleaning.failed)):
        for leftover in leftovers:
            yield f"{said} {leftover.kind} {leftover.place}: {leftover.why}"
    yield f"{word} {len(cleaning.removed)}, kept {len(cleaning.kept)}, failed {len(cleaning.failed)}"
