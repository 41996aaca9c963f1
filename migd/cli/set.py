"""`migd set`: what may be changed while daemons and migrations run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from migd.cli.choice import receiver, sender, sender_of
from migd.cli.options import Bandwidth, Positive, ask, done, json_option, runtime_option
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import Request
from migd.errors import ConfigError

FIXED = {
    "streams": "the streams of a migration are connected when it begins",
    "hints": "whether a guest is asked for free pages is agreed with it when a migration begins",
    "verify": "how a migration is verified is decided when it begins",
    "compression": "what both daemons can unpack is agreed when a migration begins",
    "dirty-log": "what finds the guest's writes is armed when a migration begins",
}
"""Options of ``migd migrate`` that hold for all of a migration, and why."""

STARTED_WITH = {"workers": "daemon.workers", "max-streams": "destination.max_streams"}
"""Keys that a daemon reads when it starts, under the names that somebody may try."""


class _Settings(click.Group):
    """Says of what cannot be changed how to get it all the same."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        option = name.replace("_", "-")
        if option in FIXED:
            raise ConfigError(
                f"{name} cannot change while a migration runs: {FIXED[option]}. Cancel it and migrate again "
                f"with --{option}, or set migration.{option.replace('-', '_')} for those to come"
            )
        if option in STARTED_WITH:
            raise ConfigError(
                f"{name} cannot change while a daemon runs: set {STARTED_WITH[option]} in its configuration "
                f"and restart it"
            )
        return super().get_command(ctx, name)


@click.group("set", cls=_Settings)
def set_() -> None:
    """Change a limit while migrations run.

    It counts at once, also for a migration that waits, and lasts as long as the daemon or the migration; to
    keep it, write it into the configuration. Streams, hints, verification, compression and the dirty log of
    a migration are chosen when it begins and cannot change.
    """


_target = click.argument("target", metavar="GUEST|MIGRATION")


@set_.command("max-bandwidth")
@click.argument("limit", type=Bandwidth(), metavar="BYTES/S")
@click.argument("target", metavar="[GUEST|MIGRATION]", default="")
@click.option("--incoming", is_flag=True, help="The daemon's limit for what arrives, not for what leaves.")
@json_option
@runtime_option
def max_bandwidth(limit: int, target: str, incoming: bool, as_json: bool, directory: Path | None) -> None:
    """Limit what goes over the wire to 1G, 500M, ... per second, or not at all (0, unlimited).

    Of one migration, or without GUEST|MIGRATION of all that leave this daemon together, who share it evenly.
    """
    if target and incoming:
        raise click.UsageError("--incoming is the limit of all arrivals together: leave out the migration")
    if target:
        client = sender_of(directory, target)
    else:
        client = receiver(directory) if incoming else sender(directory)
    _set(client, commands.SetBandwidth(bytes_s=limit, target=target, incoming=incoming), as_json)


@set_.command("downtime-limit")
@click.argument("limit", type=Positive(), metavar="MS")
@_target
@json_option
@runtime_option
def downtime_limit(limit: float, target: str, **where: Any) -> None:
    """Pause the guest once what is left is estimated to fit MS milliseconds."""
    _set_policy(commands.SetPolicy(target=target, downtime_limit_ms=limit), **where)


@set_.command("max-iterations")
@click.argument("limit", type=click.IntRange(min=1), metavar="N")
@_target
@json_option
@runtime_option
def max_iterations(limit: int, target: str, **where: Any) -> None:
    """Let the migration be forced or cancelled after N iterations, counted from its beginning."""
    _set_policy(commands.SetPolicy(target=target, max_iterations=limit), **where)


@set_.command("max-total")
@click.argument("limit", type=Positive(), metavar="S")
@_target
@json_option
@runtime_option
def max_total(limit: float, target: str, **where: Any) -> None:
    """Let the migration be forced or cancelled S seconds after its beginning."""
    _set_policy(commands.SetPolicy(target=target, max_total_s=limit), **where)


@set_.command("on-exhausted")
@click.argument("what", type=click.Choice(["force", "cancel"]))
@_target
@json_option
@runtime_option
def on_exhausted(what: str, target: str, **where: Any) -> None:
    """Pause the guest all the same (force), or give up (cancel), when iterations or time are used up."""
    request = commands.SetPolicy(target=target, on_exhausted=what)  # type: ignore[arg-type]  # click checked
    _set_policy(request, **where)


def _set_policy(request: commands.SetPolicy, *, as_json: bool, directory: Path | None) -> None:
    _set(sender_of(directory, request.target), request, as_json)


def _set(client: ControlClient, request: Request, as_json: bool) -> None:
    reply = ask(client, request)
    assert isinstance(reply, commands.Done)
    done(reply, as_json=as_json)
