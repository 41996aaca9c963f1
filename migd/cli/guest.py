"""`migd guest`: a stub guest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from migd.cli.choice import guest_socket
from migd.cli.options import Size, Sizes

_DEFAULT_RAM_BYTES = (1 << 30,)


@click.command()
@click.option("--name", required=True, help="What the guest is called in every other command.")
@click.option("--ram", type=Sizes(), help="RAM, like 1Gi; several blocks like 512Mi,1536Mi.  [default: 1Gi]")
@click.option("--image", type=click.Path(), default="", help="Serve the RAM in this file where it lies, "
              "without writing to it; sparse is fine. The guest is idle.")  # fmt: skip
@click.option("--free", type=click.Path(), default="", help="Free pages of --image: a file of one bit per "
              "4096 bytes, least significant first, 1 = free. Without it, none is.")  # fmt: skip
@click.option(
    "--workload",
    type=click.Choice(["idle", "churn", "hog", "write-heavy"]),
    help="idle; churn: allocate, write and free; hog: fill nearly everything, free it, then churn; "
    "write-heavy: rewrite the live set as fast as --rate allows.  [default: churn; of an image idle]",
)
@click.option("--rate", type=Size(), help="Bytes written per second, like 50M; 0: as fast as it goes.")
@click.option("--live", default=0.05, show_default=True, help="Share of RAM that stays allocated.")
@click.option(
    "--rest",
    type=click.Choice(["untouched", "zeroed", "freed"]),
    default="untouched",
    show_default=True,
    help="The pages beside the live set: never touched; used, and zero; or old data, as of a hog.",
)
@click.option("--run-pages", default=0, show_default=True, help="Live runs have 1 to this many pages, none "
              "next to another; 0: up to 64, wherever they fit.")  # fmt: skip
@click.option("--fill", multiple=True, help="File or directory whose content fills RAM, or /dev/urandom; "
              "repeatable. Default: the Python installation.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of the workload's random choices.")
@click.option(
    "--contract",
    type=click.Choice(["anything", "zero", "none"]),
    default="anything",
    show_default=True,
    help="What the guest expects of a page it had freed; with none, its hints are not used.",
)
@click.option("--socket", "socket_path", type=click.Path(path_type=Path),
              help="The daemon's guest socket; default: that of `migd serve` or `migd source`.")  # fmt: skip
def guest(
    name: str,
    ram: tuple[int, ...] | None,
    image: str,
    free: str,
    workload: str | None,
    rate: int | None,
    live: float,
    rest: str,
    run_pages: int,
    fill: tuple[str, ...],
    seed: int,
    contract: str,
    socket_path: Path | None,
) -> None:
    """Run a stub guest: a process with real memory, an allocator and a workload, that checks itself."""
    from migd.guest.options import GuestOptions
    from migd.guest.stub import run_guest

    options = GuestOptions(
        daemon=str(socket_path or guest_socket()),
        name=name,
        ram_bytes=_DEFAULT_RAM_BYTES if ram is None and not image else ram or (),
        image=image,
        free=free,
        workload=workload or "",
        rate_bytes_s=rate,
        live_fraction=live,
        rest=rest,
        run_pages=run_pages,
        seed=seed,
        contract=contract,
    )
    if fill:
        options = replace(options, fill=fill)
    sys.exit(run_guest(options))
