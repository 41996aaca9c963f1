"""`migd qemu` and `migd preload`: guests that are virtual machines under a stock QEMU."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from migd.cli.choice import guest_socket
from migd.cli.options import Size
from migd.errors import ConfigError

_PAGE_BYTES = 4096


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--name", required=True, help="What the guest is called in every other command.")
@click.option("--qmp", type=click.Path(path_type=Path), help="Monitor socket (QMP) of a QEMU that is there "
              "already: running, or waiting with -incoming defer.")  # fmt: skip
@click.option("--ram", type=Size(), help="RAM of a guest that begins here, like 1Gi; its memory backend is "
              "called ram.  [default: 1Gi]")  # fmt: skip
@click.option("--incoming", default="", help="The migration that QEMU is to be started for; the destination "
              "daemon says {migration}.")  # fmt: skip
@click.option("--socket", "socket_path", type=click.Path(path_type=Path),
              help="The daemon's guest socket; default: that of `migd serve` or `migd source`.")  # fmt: skip
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def qemu(
    name: str,
    qmp: Path | None,
    ram: int | None,
    incoming: str,
    socket_path: Path | None,
    command: tuple[str, ...],
) -> None:
    """Stand beside a stock QEMU, as the guest that a migd daemon moves.

    \b
    A QEMU that runs already:   migd qemu --name vm1 --qmp /run/vm1.qmp
    One to be started:          migd qemu --name vm1 --ram 1Gi -- qemu-system-x86_64 -m 1G ...
    At a destination, in its configuration:
      guest_command = ["migd", "qemu", "--name", "{name}", "--incoming", "{migration}",
                       "--socket", "{socket}", "--", "qemu-system-x86_64", "-m", "1G", ...]

    In the command {ram} stands for the RAM that the daemon makes, as in -object
    memory-backend-file,id=ram,size=1G,mem-path={ram},share=on; {hints} for the socket of the port
    org.migd.hints.0, {name} for the guest's name and {dir} for a directory of its sockets. A monitor is
    added to it, and -incoming defer -S where a guest arrives.

    It ends with QEMU, or by Ctrl-C: a QEMU that it has started ends then, another one goes on. Should it be
    killed, QEMU goes on as it is; start it again with --qmp, and it finds where it was.
    """
    from migd.qemu.companion import CompanionOptions, run_companion

    if (qmp is None) == (not command):
        raise ConfigError("either --qmp SOCKET, or a command behind --: see `migd qemu --help`")
    if (incoming or qmp) and ram is not None:
        raise ConfigError("--ram is for a guest that begins here: one that arrives, or runs, has its RAM")
    begins = not incoming and qmp is None
    ram_bytes = (1 << 30 if ram is None else ram) if begins else 0
    if begins and (ram_bytes < _PAGE_BYTES or ram_bytes % _PAGE_BYTES):
        raise ConfigError(f"--ram {ram_bytes}: a multiple of {_PAGE_BYTES} bytes")
    options = CompanionOptions(
        name=name,
        daemon=(socket_path or guest_socket()).absolute(),
        qmp=qmp,
        command=command,
        incoming=incoming,
        ram_bytes=ram_bytes,
    )
    sys.exit(run_companion(options))


@click.command()
@click.option("--into", type=click.Path(path_type=Path), help="Keep it in this directory, for a QEMU of "
              "another user.  [default: $XDG_CACHE_HOME/migd or ~/.cache/migd]")  # fmt: skip
def preload(into: Path | None) -> None:
    """Print the library to start a QEMU with, so that the kernel tracks its writes.

    \b
    LD_PRELOAD="$(migd preload)" qemu-system-x86_64 ...

    It is built on first use, which takes a C compiler. A QEMU without it can be moved, too: by soft-dirty
    marks where the kernel has them, else by comparing memory, and then its free pages are sent as well.
    `migd qemu` adds it to the QEMUs that it starts.
    """
    from migd.qemu.preload import library

    click.echo(library(into))
