"""Looking on: `migd attach` and `migd wait` follow one migration to its end, `migd events` follows all."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TypeAlias

import click

from migd import report
from migd.cli.choice import all_here, follower_of
from migd.cli.options import as_json_text, done, fail, json_option, runtime_option
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import ENCODER, Reply
from migd.control.documents import BegunDocument
from migd.errors import MigdError, OutcomeUnknown, PeerLost, TimedOut

_Unread: TypeAlias = queue.Queue[Reply | MigdError | None]

_UNREAD_EVENTS = 100
"""Between the daemons and our output; beyond that the daemons wait, and tell how many events we missed."""


def show(
    replies: Iterator[Reply], *, detach: bool = False, as_json: bool = False, silent: bool = False
) -> NoReturn:
    """Events as they come, then the result; exits with the code that the result carries.

    ``silent`` prints nothing but, with ``as_json``, the result.
    """
    with report.Narrator(quiet=silent or as_json) as narrator:
        for reply in replies:
            match reply:
                case commands.Accepted(migration=migration) if detach:
                    narrator.close()
                    click.echo(as_json_text(BegunDocument(migration=migration)) if as_json else migration)
                    sys.exit(0)
                case commands.Moving():
                    narrator.moving(reply)
                case commands.Iterated(iteration=iteration):
                    narrator.iterated(iteration)
                case commands.Finished(result=record) | commands.Arrived(record=record):
                    narrator.close()
                    if as_json or not silent:
                        click.echo(as_json_text(record) if as_json else report.record_text(record))
                    sys.exit(record.exit_code)
                case commands.Done():
                    narrator.close()
                    done(reply, as_json=as_json)
                    sys.exit(0)
                case commands.Failed():
                    narrator.close()
                    fail(reply)
                case _:
                    pass
    raise OutcomeUnknown(
        "the daemon ended before the migration did; the guest's state is in `migd status` once it is back"
    )


@click.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@json_option
@runtime_option
def attach(target: str, as_json: bool, directory: Path | None) -> None:
    """Follow a migration to its result, a detached one or one that comes in.

    Exits with the code of the result. Ctrl-C only stops the following (exit code 124): the migration goes on.
    """
    try:
        show(follower_of(directory, target).ask(commands.Attach(target=target)), as_json=as_json)
    except KeyboardInterrupt:
        raise TimedOut(f"detached: the migration goes on, `migd attach {target}` follows it again") from None


@click.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="Stop waiting after so many seconds, exit code 124; the migration goes on.")  # fmt: skip
@json_option
@runtime_option
def wait(target: str, timeout_s: float | None, as_json: bool, directory: Path | None) -> None:
    """Wait silently until a migration is over; exit with the code of its result.

    Also if it was over before, and for one that comes in: 0 once the guest runs here for good.
    """
    replies = follower_of(directory, target).ask(commands.Attach(target=target))
    if timeout_s is not None:
        replies = _until(replies, target, timeout_s)
    show(replies, as_json=as_json, silent=True)


def _until(replies: Iterator[Reply], target: str, timeout_s: float) -> Iterator[Reply]:
    """A migration that goes on says something 20 times a second."""
    deadline = time.monotonic() + timeout_s
    for reply in replies:
        if isinstance(reply, commands.Moving) and time.monotonic() > deadline:
            raise TimedOut(f"{target}: the migration is not over after {timeout_s:g} s, it is {reply.state}")
        yield reply


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--since", type=click.IntRange(min=0), default=0, metavar="SEQ",
              help="Only those after the event of this number.")  # fmt: skip
@json_option
@runtime_option
def events(follow: bool, since: int, as_json: bool, directory: Path | None) -> None:
    """Print what happened to guests and migrations, one JSON object a line, with --json or without.

    A daemon remembers its last 1000 events; they are numbered from 1 at its start. Whoever reads too slowly,
    or asks too late, gets a `missed` event with their number.
    """
    request = commands.Events(since=since, follow=follow)
    unread: _Unread = queue.Queue(_UNREAD_EVENTS)
    readers = [
        threading.Thread(target=_read, args=(ControlClient(found.directory), request, unread), daemon=True)
        for found in all_here(directory)
    ]
    for reader in readers:
        reader.start()
    try:
        _print(unread, len(readers))
    except KeyboardInterrupt:
        sys.exit(0)


def _read(client: ControlClient, request: commands.Events, unread: _Unread) -> None:
    """All that one daemon says; then None, or why it ended."""
    try:
        for reply in client.ask(request):
            unread.put(reply)
        unread.put(PeerLost(f"{client} has ended") if request.follow else None)
    except MigdError as error:
        unread.put(error)


def _print(unread: _Unread, readers: int) -> None:
    while readers:
        match unread.get():
            case None:
                readers -= 1
            case MigdError() as error:
                raise error
            case commands.Failed() as failed:
                fail(failed)
            case commands.Quiet():
                pass
            case event:
                click.echo(ENCODER.encode(event))
