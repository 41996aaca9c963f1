"""What ``--json`` prints where it is not one of the daemon's own records: every document has its schema.

A migration's result is ``migd.migration.stats.Result``, or ``Arrival``; events are those of
``migd.control.events``, one a line.
"""

from __future__ import annotations

import msgspec

from migd.control.commands import GuestStatus, MigrationStatus, Remembered, StatusReport
from migd.migration.stats import SCHEMA


class _Document(msgspec.Struct, frozen=True):
    schema: int = SCHEMA


class StatusDocument(_Document, frozen=True, kw_only=True):
    """`migd status`: every daemon that answers."""

    daemons: list[StatusReport]


class ListedGuest(GuestStatus, frozen=True, kw_only=True):
    daemon: str
    """Its daemon's role."""
    runtime_dir: str


class ListedMigration(MigrationStatus, frozen=True, kw_only=True):
    daemon: str
    runtime_dir: str


class ListDocument(_Document, frozen=True, kw_only=True):
    """`migd list`: guests, and migrations that go on, of every daemon that answers."""

    guests: list[ListedGuest]
    migrations: list[ListedMigration]


class HistoryDocument(_Document, frozen=True, kw_only=True):
    """`migd history`: migrations that are over, the newest last."""

    migrations: list[Remembered]


class BegunDocument(_Document, frozen=True, kw_only=True):
    """`migd migrate --detach`: the migration has begun."""

    migration: str


class DoneDocument(_Document, frozen=True, kw_only=True):
    """A command that changes something has done so; ``text`` is what it prints without `--json`."""

    text: str
    migration: str = ""
    """The one that it was about, if it was about one."""


class ErrorDocument(_Document, frozen=True, kw_only=True):
    """Instead of any of these, where the program ends with an error of its own."""

    error: str
    """The line on stderr, without the program's name."""
    exit_code: int
