"""What the commands share: sizes, common options, asking a daemon, and how an error ends the program."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import Reply, Request
from migd.control.documents import DoneDocument, ErrorDocument
from migd.sizes import parse_bandwidth, parse_bytes

_AS_JSON = "migd.as_json"
"""In the context of a command line: whether --json was given."""


class Size(click.ParamType[int]):
    """A number of bytes: 1G = 10^9, 1Gi = 2^30."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Bandwidth(click.ParamType[int]):
    """Bytes per second: 1G = 10^9; 0 for ``unlimited``."""

    name = "BYTES/S"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bandwidth(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Positive(click.ParamType[float]):
    """A finite number above 0."""

    name = "NUMBER"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is no number above 0", param, ctx)
        return number


class Sizes(click.ParamType[tuple[int, ...]]):
    """One or several, with commas between: 512Mi,1536Mi."""

    name = "SIZE[,SIZE...]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(Size().convert(part, param, ctx) for part in str(value).split(","))


config_option = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="TOML file; without it, the defaults."
)
runtime_option = click.option(
    "--runtime-dir",
    "directory",
    type=click.Path(path_type=Path),
    envvar="MIGD_RUNTIME_DIR",
    help="Where the daemon keeps its sockets and journal.  [default: $XDG_RUNTIME_DIR/migd/ROLE or "
    "/tmp/migd-UID/ROLE; commands look for serve, source and destination]",
)


def _remember(context: click.Context, _option: click.Parameter, as_json: bool) -> bool:
    """For ``die``: an error is then a document, too."""
    context.meta[_AS_JSON] = as_json
    return as_json


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember, is_eager=True, help="Print JSON instead of text."
)


def ask(client: ControlClient, request: Request) -> Reply:
    """The last reply; a failure ends the program."""
    reply = client.ask_once(request)
    if isinstance(reply, commands.Failed):
        fail(reply)
    return reply


def as_json_text(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def done(reply: commands.Done, *, as_json: bool) -> None:
    """What a command that changes something says."""
    document = DoneDocument(text=reply.text, migration=reply.migration)
    click.echo(as_json_text(document) if as_json else reply.text)


def fail(reply: commands.Failed) -> NoReturn:
    die(reply.error, reply.exit_code)


def die(text: str, exit_code: int) -> NoReturn:
    """One line on stderr and, with --json, a document on stdout."""
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(_AS_JSON):
        click.echo(as_json_text(ErrorDocument(error=text, exit_code=exit_code)))
    click.echo(f"migd: {text}", err=True)
    sys.exit(exit_code)
