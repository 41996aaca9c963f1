"""`migd migrate` and what one may do to a migration: cancel it, resolve an unknown outcome."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from migd.cli.choice import resolver_of, sender_of, sender_of_guest
from migd.cli.options import Bandwidth, Positive, ask, done, json_option, runtime_option
from migd.cli.watch import show
from migd.control import commands
from migd.control.client import ControlClient
from migd.wire.protocol import Keeper


@dataclass
class _Cancelling:
    """Ctrl-C during a migration cancels it; the daemon's result then ends the command."""

    client: ControlClient
    guest: str

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        click.echo("cancelling ...", err=True)
        reply = self.client.ask_once(commands.Cancel(target=self.guest))
        if isinstance(reply, commands.Failed):
            click.echo(reply.error, err=True)


@click.command()
@click.argument("guest")
@click.option("--to", required=True, metavar="HOST:PORT", help="Where the destination daemon listens.")
@click.option("--paused", is_flag=True, help="Pause the guest during the transfer.")
@click.option("--hints/--no-hints", default=None, help="Use the guest's free-page hints.  [default: config]")
@click.option("--streams", type=click.IntRange(1, 64), help="TCP connections.  [default: config]")
@click.option("--max-bandwidth", type=Bandwidth(), help="Of this migration on the wire, like 500M; 0 or "
              "unlimited: only the daemon's limit.  [default: config]")  # fmt: skip
@click.option("--downtime-limit", type=Positive(), metavar="MS", help="Longest pause to aim for, in ms.")
@click.option("--max-iterations", type=click.IntRange(min=1), help="While the guest runs.  [default: config]")
@click.option("--max-total", type=Positive(), metavar="S", help="Before the guest is paused, in seconds.")
@click.option("--on-exhausted", type=click.Choice(["force", "cancel"]),
              help="When iterations or time are used up: pause it all the same, or give up.")  # fmt: skip
@click.option("--verify", type=click.Choice(["auto", "strict", "late", "off"]),
              help="When the source checks that no write was missed.  [default: config]")  # fmt: skip
@click.option("--compression", type=click.Choice(["auto", "lz4", "none"]), help="[default: config]")
@click.option("--dirty-log", type=click.Choice(["auto", "userfaultfd", "compare"]),
              help="How writes of the running guest are found.  [default: config]")  # fmt: skip
@click.option("--detach", is_flag=True, help="Print the migration's id and return once it has begun.")
@json_option
@runtime_option
def migrate(
    guest: str,
    to: str,
    paused: bool,
    hints: bool | None,
    streams: int | None,
    max_bandwidth: int | None,
    downtime_limit: float | None,
    max_iterations: int | None,
    max_total: float | None,
    on_exhausted: str | None,
    verify: str | None,
    compression: str | None,
    dirty_log: str | None,
    detach: bool,
    as_json: bool,
    directory: Path | None,
) -> None:
    """Move GUEST to another host while it runs. Ctrl-C cancels, and the guest runs on here."""
    client = sender_of_guest(directory, guest)
    request = commands.Migrate(
        guest=guest,
        to=to,
        live=not paused,
        hints=hints,
        detach=detach,
        streams=streams,
        max_bandwidth_bytes_s=max_bandwidth,
        downtime_limit_ms=downtime_limit,
        max_iterations=max_iterations,
        max_total_s=max_total,
        on_exhausted=on_exhausted,  # type: ignore[arg-type]  # click has checked it
        verify=verify,  # type: ignore[arg-type]
        compression=compression,  # type: ignore[arg-type]
        dirty_log=dirty_log,  # type: ignore[arg-type]
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _Cancelling(client, guest))
    show(client.ask(request), detach=detach, as_json=as_json)


@click.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@json_option
@runtime_option
def cancel(target: str, as_json: bool, directory: Path | None) -> None:
    """Cancel a migration before GO; its guest runs on at the source."""
    reply = ask(sender_of(directory, target), commands.Cancel(target=target))
    assert isinstance(reply, commands.Done)
    done(reply, as_json=as_json)


@click.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@click.option("--force-source", is_flag=True,
              help="Where nobody else can decide: the guest is to run on at the source.")  # fmt: skip
@click.option("--force-dest", is_flag=True, help="The same for the destination.")
@json_option
@runtime_option
def resolve(target: str, force_source: bool, force_dest: bool, as_json: bool, directory: Path | None) -> None:
    """Decide what became of a guest whose hand-over stayed open.

    At its source, `migd resolve GUEST` asks the destination and does what that says: the guest runs on
    here, or it runs there and is let go of. An option that contradicts the destination is refused, with
    what is true. Two cases are left to you:

    The destination does not answer and never will: --force-source has the guest run on here, --force-dest
    ends it here. First make sure that it does not run there, or that it does: else there are two, or none.

    The verification after the start was bad, and the guest is paused on both sides: --force-source has it
    run on at the source as it was at the pause, --force-dest at the destination with pages that may be
    wrong. At the destination the same options decide, too; its source then follows with `migd resolve`.

    Exit code 0: decided; with a migration's result that result's. 3: the option contradicts what is known.
    4: the destination does not answer. 5: the guest stays paused by a bad verification.
    """
    if force_source and force_dest:
        raise click.UsageError("--force-source and --force-dest: the guest can only run on one side")
    keeper = Keeper.SOURCE if force_source else Keeper.DESTINATION if force_dest else None
    request = commands.Resolve(target=target, keeper=keeper)
    show(resolver_of(directory, target).ask(request), as_json=as_json)
