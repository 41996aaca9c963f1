"""`migd serve`, `migd source` and `migd destination`: the daemon in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from migd.cli.options import config_option, runtime_option
from migd.config import Config, load, runtime_dir


@click.command()
@config_option
@runtime_option
def serve(config_path: Path | None, directory: Path | None) -> None:
    """Run a daemon with both roles: guests leave from it, arrive at it, and move on."""
    _serve("serve", config_path, directory)


@click.command()
@config_option
@runtime_option
def source(config_path: Path | None, directory: Path | None) -> None:
    """Run the source daemon: holds the RAM of guests and sends them away."""
    _serve("source", config_path, directory)


@click.command()
@config_option
@runtime_option
def destination(config_path: Path | None, directory: Path | None) -> None:
    """Run the destination daemon: listens for guests and starts them here."""
    _serve("destination", config_path, directory)


def _serve(role: str, config_path: Path | None, directory: Path | None) -> None:
    from migd import log  # the daemon's imports take longer than most commands
    from migd.daemon.daemon import Role, run_daemon

    config = load(config_path) if config_path else Config()
    log.configure(config.daemon.log_level)
    run_daemon(Role(role), config, directory or runtime_dir(config, role), click.echo)
