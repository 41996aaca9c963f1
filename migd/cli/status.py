"""What an operator asks about: the daemons here, their guests and migrations, now and in the past."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from migd import report
from migd.cli.choice import all_here
from migd.cli.options import as_json_text, fail, json_option, runtime_option
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import GuestStatus, MigrationStatus, Remembered
from migd.control.documents import (
    HistoryDocument,
    ListDocument,
    ListedGuest,
    ListedMigration,
    StatusDocument,
)
from migd.errors import MigdError

L = TypeVar("L", ListedGuest, ListedMigration)


@click.command()
@json_option
@runtime_option
def status(as_json: bool, directory: Path | None) -> None:
    """Show guests, migrations and limits of the daemons here (or of the one in --runtime-dir)."""
    reports = [found.report for found in all_here(directory)]
    if as_json:
        click.echo(as_json_text(StatusDocument(daemons=reports)))
    else:
        click.echo("\n\n".join(map(report.status_text, reports)))


@click.command("list")
@json_option
@runtime_option
def list_all(as_json: bool, directory: Path | None) -> None:
    """List guests, and migrations that go on, one line each."""
    guests: list[ListedGuest] = []
    migrations: list[ListedMigration] = []
    for found in all_here(directory):
        place = {"daemon": found.report.role, "runtime_dir": str(found.directory)}
        guests += [_listed(guest, place, ListedGuest) for guest in found.report.guests]
        migrations += [
            _listed(migration, place, ListedMigration)
            for migration in found.report.migrations
            if not migration.over
        ]
    document = ListDocument(guests=guests, migrations=migrations)
    click.echo(as_json_text(document) if as_json else report.list_text(document))


def _listed(status: GuestStatus | MigrationStatus, place: dict[str, str], kind: type[L]) -> L:
    return msgspec.convert({**msgspec.structs.asdict(status), **place}, kind)


@click.command()
@click.argument("target", metavar="[GUEST|MIGRATION]", default="")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="The newest only.")
@json_option
@runtime_option
def history(target: str, limit: int, as_json: bool, directory: Path | None) -> None:
    """Show migrations that are over: a line each, or the whole result of one MIGRATION.

    Daemons remember the last 1000, through restarts.
    """
    found: list[Remembered] = []
    for daemon in all_here(directory):
        found += _past(ControlClient(daemon.directory), commands.Past(target=target, limit=limit))
    found = sorted(found, key=lambda entry: entry.ended)[-limit:]
    if target and not found:
        raise MigdError(f"{target!r} is in no migration that is remembered here")
    if as_json:
        click.echo(as_json_text(HistoryDocument(migrations=found)))
    elif target and all(entry.record.guest != target for entry in found):
        click.echo("\n\n".join(report.record_text(entry.record) for entry in found))
    else:
        click.echo(report.history_text(found))


def _past(client: ControlClient, request: commands.Past) -> Iterator[Remembered]:
    for reply in client.ask(request):
        match reply:
            case Remembered():
                yield reply
            case commands.Failed():
                fail(reply)
            case _:
                pass
