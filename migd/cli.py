"""The command line: daemons, guests, and what an operator asks a running daemon."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click
import msgspec

from migd import __version__, report
from migd.config import Config, default_runtime_dir, load, runtime_dir
from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import Reply, Request
from migd.errors import ConfigError, MigdError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Size(click.ParamType[int]):
    """A number of bytes: 1G = 10^9, 1Gi = 2^30."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).removesuffix("B")
        number = text.rstrip("KMGTi")
        factor = _SUFFIXES.get(text[len(number) :])
        try:
            if factor is None or float(number) < 0:
                raise ValueError
            return int(float(number) * factor)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no size; write it like 512Mi, 1Gi or 50M", param, ctx)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="migd")
def main() -> None:
    """Move the memory of a running guest to another host and leave its free pages behind.

    \b
    On the destination host:   migd destination --config configs/destination.toml
    On the source host:        migd source --config configs/source.toml
                               migd guest --name vm1 --ram 1Gi &
                               migd migrate vm1 --to 127.0.0.1:7440
    See it all at once:        migd demo

    Exit codes: 0 done; 1 failed, the guest runs on at the source; 2 usage or configuration; 3 refused;
    4 outcome unknown, run `migd resolve`; 5 verification failed; 130 cancelled.
    """


# -- daemons ----------------------------------------------------------------------------------------

_config_option = click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="TOML file; without it, the defaults."
)
_runtime_option = click.option(
    "--runtime-dir",
    "directory",
    type=click.Path(path_type=Path),
    envvar="MIGD_RUNTIME_DIR",
    help="Where the daemon keeps its sockets and journal; default: $XDG_RUNTIME_DIR/migd/ROLE or "
    "/tmp/migd-UID/ROLE.",
)


@main.command()
@_config_option
@_runtime_option
def source(config_path: Path | None, directory: Path | None) -> None:
    """Run the source daemon: holds the RAM of guests and sends them away."""
    _serve("source", config_path, directory)


@main.command()
@_config_option
@_runtime_option
def destination(config_path: Path | None, directory: Path | None) -> None:
    """Run the destination daemon: listens for guests and starts them here."""
    _serve("destination", config_path, directory)


def _serve(role: str, config_path: Path | None, directory: Path | None) -> None:
    from migd import log  # the daemon's imports take longer than most commands
    from migd.daemon import Role, run_daemon

    config = load(config_path) if config_path else Config()
    log.configure(config.daemon.log_level)
    run_daemon(Role(role), config, directory or runtime_dir(config, role), click.echo)


@main.command()
@click.option("--name", required=True, help="What the guest is called in every other command.")
@click.option("--ram", type=Size(), default="1Gi", show_default=True, help="RAM, like 512Mi or 1Gi.")
@click.option(
    "--workload",
    type=click.Choice(["idle", "churn", "hog", "write-heavy"]),
    default="churn",
    show_default=True,
    help="idle; churn: allocate, write and free; hog: fill nearly everything, free it, then churn; "
    "write-heavy: rewrite the live set as fast as --rate allows.",
)
@click.option("--rate", type=Size(), help="Bytes written per second, like 50M; 0: as fast as it goes.")
@click.option("--live", default=0.05, show_default=True, help="Share of RAM that stays allocated.")
@click.option("--fill", multiple=True, help="File or directory whose content fills RAM; repeatable. "
              "Default: the Python installation.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of the workload's random choices.")
@click.option(
    "--contract",
    type=click.Choice(["anything", "zero", "none"]),
    default="anything",
    show_default=True,
    help="What the guest expects of a page it had freed; with none, its hints are not used.",
)
@click.option("--socket", "socket_path", type=click.Path(path_type=Path),
              help="The daemon's guest socket; default: guest.sock of the source daemon.")  # fmt: skip
def guest(
    name: str,
    ram: int,
    workload: str,
    rate: int | None,
    live: float,
    fill: tuple[str, ...],
    seed: int,
    contract: str,
    socket_path: Path | None,
) -> None:
    """Run a stub guest: a process with real memory, an allocator and a workload, that checks itself."""
    from migd.guest.stub import GuestOptions, run_guest

    options = GuestOptions(
        daemon=str(socket_path or default_runtime_dir("source") / "guest.sock"),
        name=name,
        ram_bytes=ram,
        workload=workload,
        rate_bytes_s=rate,
        live_fraction=live,
        seed=seed,
        contract=contract,
    )
    if fill:
        options = replace(options, fill=fill)
    sys.exit(run_guest(options))


# -- asking a daemon --------------------------------------------------------------------------------

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


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


@main.command()
@click.argument("guest")
@click.option("--to", required=True, metavar="HOST:PORT", help="Where the destination daemon listens.")
@click.option("--paused", is_flag=True, help="Pause the guest during the transfer; needs no write tracking.")
@click.option("--hints/--no-hints", default=None, help="Use the guest's free-page hints.  [default: config]")
@click.option("--streams", type=click.IntRange(1, 64), help="TCP connections.  [default: config]")
@click.option("--downtime-limit", type=float, metavar="MS", help="Longest pause to aim for, in ms.")
@click.option("--verify", type=click.Choice(["auto", "strict", "late", "off"]),
              help="When the source checks that no write was missed.  [default: config]")  # fmt: skip
@click.option("--compression", type=click.Choice(["auto", "lz4", "none"]), help="[default: config]")
@click.option("--detach", is_flag=True, help="Return once the migration has begun.")
@_json_option
@_runtime_option
def migrate(
    guest: str,
    to: str,
    paused: bool,
    hints: bool | None,
    streams: int | None,
    downtime_limit: float | None,
    verify: str | None,
    compression: str | None,
    detach: bool,
    as_json: bool,
    directory: Path | None,
) -> None:
    """Move GUEST to another host while it runs. Ctrl-C cancels, and the guest runs on here."""
    client = ControlClient(directory or default_runtime_dir("source"))
    request = commands.Migrate(
        guest=guest,
        to=to,
        live=not paused,
        hints=hints,
        detach=detach,
        streams=streams,
        downtime_limit_ms=downtime_limit,
        verify=verify,  # type: ignore[arg-type]  # click has checked it
        compression=compression,  # type: ignore[arg-type]
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _Cancelling(client, guest))
    _show(client.ask(request), detach=detach, as_json=as_json)


def _show(replies: Iterator[Reply], *, detach: bool = False, as_json: bool = False) -> NoReturn:
    """Events as they come, then the result; exits with the code that the result carries."""
    with report.Narrator(quiet=as_json) as narrator:
        for reply in replies:
            match reply:
                case commands.Accepted(migration=migration) if detach:
                    narrator.close()
                    click.echo(_json(reply) if as_json else migration)
                    sys.exit(0)
                case commands.Moving():
                    narrator.moving(reply)
                case commands.Iterated(iteration=iteration):
                    narrator.iterated(iteration)
                case commands.Finished(result=result):
                    narrator.close()
                    click.echo(_json(result) if as_json else report.result_text(result))
                    sys.exit(result.exit_code)
                case commands.Done(text=text):
                    narrator.close()
                    click.echo(_json(reply) if as_json else text)
                    sys.exit(0)
                case commands.Failed():
                    narrator.close()
                    _fail(reply)
                case _:
                    pass
    _die(
        "the daemon ended before the migration did; the guest's state is in `migd status` once it is back", 4
    )


@main.command()
@_json_option
@_runtime_option
def status(as_json: bool, directory: Path | None) -> None:
    """Show guests, migrations and limits of the daemons here (or of the one in --runtime-dir)."""
    roles = [directory] if directory else [default_runtime_dir(role) for role in ("source", "destination")]
    reports, errors = [], []
    for path in roles:
        try:
            reply = _ask(path, commands.Status())
        except ConfigError as error:
            errors.append(error)
            continue
        assert isinstance(reply, commands.StatusReport)
        reports.append(reply)
    if not reports:
        raise errors[0]
    click.echo(_json(reports) if as_json else "\n\n".join(report.status_text(found) for found in reports))


@main.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@_runtime_option
def cancel(target: str, directory: Path | None) -> None:
    """Cancel a migration before GO; its guest runs on at the source."""
    reply = _ask(directory or default_runtime_dir("source"), commands.Cancel(target=target))
    assert isinstance(reply, commands.Done)
    click.echo(reply.text)


@main.command()
@click.argument("target", metavar="GUEST|MIGRATION")
@_json_option
@_runtime_option
def resolve(target: str, as_json: bool, directory: Path | None) -> None:
    """Ask the destination what became of a migration whose outcome is unknown, and act on its answer."""
    client = ControlClient(directory or default_runtime_dir("source"))
    _show(client.ask(commands.Resolve(target=target)), as_json=as_json)


@main.command()
@click.option("--ram", type=Size(), default="1Gi", show_default=True, help="RAM of the guest.")
@click.option("--rate", type=Size(), default="50M", show_default=True, help="Bytes it writes per second.")
@_json_option
def demo(ram: int, rate: int, as_json: bool) -> None:
    """Migrate a guest live over loopback twice, without and with hints, and compare.

    Starts a destination daemon, a source daemon and a guest as processes of their own, and ends them.
    """
    from migd.demo import run_demo

    sys.exit(run_demo(ram, rate, as_json=as_json))


def _ask(directory: Path, request: Request) -> Reply:
    reply = ControlClient(directory).ask_once(request)
    if isinstance(reply, commands.Failed):
        _fail(reply)
    return reply


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def _fail(reply: commands.Failed) -> NoReturn:
    _die(reply.error, reply.exit_code)


def _die(text: str, exit_code: int) -> NoReturn:
    click.echo(f"migd: {text}", err=True)
    sys.exit(exit_code)


def run() -> NoReturn:
    """The program: every MigdError is one clear line and its exit code."""
    try:
        main()
    except MigdError as error:
        _die(str(error), error.exit_code)
    sys.exit(0)
