"""The command line: one module for each group of commands; this one puts them together."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from migd import __version__
from migd.cli.agent import agent
from migd.cli.clean import clean
from migd.cli.config import config_
from migd.cli.daemons import destination, serve, source
from migd.cli.doctor import doctor
from migd.cli.guest import guest
from migd.cli.migrate import cancel, migrate, resolve
from migd.cli.options import Size, die, json_option
from migd.cli.qemu import preload, qemu
from migd.cli.set import set_
from migd.cli.status import history, list_all, status
from migd.cli.watch import attach, events, wait
from migd.errors import EXIT_CODES, MigdError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """Every MigdError is one clear line and its exit code; what those mean closes the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except MigdError as error:
            die(str(error), error.exit_code)


@click.group(cls=_Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="migd")
def main() -> None:
    """Move the memory of a running guest to another host and leave its free pages behind.

    \b
    On every host:             migd serve --config configs/serve.toml
                               (or migd source, migd destination: one role only)
    Where the guest is:        migd guest --name vm1 --ram 1Gi &    (a process to try it with)
                               migd qemu --name vm1 --qmp SOCKET &  (a virtual machine)
                               migd migrate vm1 --to 127.0.0.1:7440
    See it all at once:        migd demo
    """


@main.command()
@click.option("--ram", type=Size(), default="1Gi", show_default=True, help="RAM of the guest.")
@click.option("--rate", type=Size(), default="50M", show_default=True, help="Bytes it writes per second.")
@click.option("--qemu", "real", is_flag=True, help="With a real Linux guest, aged by a hog, between two "
              "stock QEMUs, and moved by QEMU itself. Needs Debian; 100 MB once.")  # fmt: skip
@json_option
def demo(ram: int, rate: int, real: bool, as_json: bool) -> None:
    """Migrate a guest live over loopback twice, without and with hints, and compare.

    Starts a destination daemon, a source daemon and a guest as processes of their own, and ends them.
    """
    if real:
        from migd.versus.demo import run_qemu_demo

        sys.exit(run_qemu_demo(ram, as_json=as_json))
    from migd.demo import run_demo

    sys.exit(run_demo(ram, rate, as_json=as_json))


COMMANDS = (
    *(serve, source, destination),
    *(guest, qemu, agent, preload),
    *(migrate, cancel, resolve, set_),
    *(attach, wait, events),
    *(status, list_all, history),
    *(doctor, clean, config_),
)
for command in COMMANDS:
    main.add_command(command)


def run() -> NoReturn:
    """The program."""
    main()
    sys.exit(0)
