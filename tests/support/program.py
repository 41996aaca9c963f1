"""How the programs of the tests (scripts/model, scripts/soak, ...) begin, show progress and end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

FOUND = 1
"""The exit code of a program that found something wrong."""

INTERRUPTED = 130

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """``--json FILE``, as ``json_path``."""
    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    words = "Write the figures there, too, as one flat JSON object."
    return click.option("--json", "json_path", type=kind, metavar="FILE", help=words)(command)


def write_figures(path: Path | None, figures: Mapping[str, Any]) -> None:
    """For ``--json``; nothing without it."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(figures)) + b"\n")


def bar() -> Progress:
    """Shown on a terminal only, gone when it is left."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told how many are done, and how many there are by now."""
    with bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def run(command: click.Command, name: str) -> NoReturn:
    """Run it as ``scripts/NAME``; it gives an exit code, or None for 0.

    SIGTERM and SIGHUP interrupt as Ctrl-C does: whatever was started ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(command(prog_name=f"scripts/{name}", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"scripts/{name}: interrupted; everything it had started was ended", err=True)
        sys.exit(INTERRUPTED)
