"""`migd doctor`: what this host, and a destination, have and lack for live migrations."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.text import Text

from migd.cli.choice import ROLES, runtime_dirs
from migd.cli.options import as_json_text, config_option, json_option, runtime_option
from migd.config import Config, default_runtime_dir, load
from migd.doctor.finding import Finding, Level
from migd.migration.stats import SCHEMA

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What `migd doctor --json` prints."""

    schema: int = SCHEMA
    ok: bool
    """Nothing failed that a live migration needs."""
    findings: list[Finding]


@click.command()
@click.option(
    "--to", metavar="HOST:PORT", help="A destination to ask, too: version, memory, clock, round trip."
)
@config_option
@runtime_option
@json_option
def doctor(to: str | None, config_path: Path | None, directory: Path | None, as_json: bool) -> None:
    """Find out what this host has and lacks for live migrations, mostly by trying.

    Nothing is changed. Each line says ok, warn or fail; below the others it says what that means and, behind
    an arrow, what to do. The exit code is 1 if anything fails that a live migration needs.
    """
    from migd.doctor.examination import Examination  # takes longer to import than most commands to run

    config = load(config_path) if config_path else Config()
    directories = runtime_dirs(directory, config) or [default_runtime_dir(ROLES[0])]  # which would be made
    examination = Examination(config, directories, to or "")
    with Console(stderr=True).status("looking at this host ..."):
        findings = list(examination.findings())
    failed = sum(finding.level is Level.FAIL for finding in findings)
    if as_json:
        click.echo(as_json_text(Diagnosis(ok=not failed, findings=findings)))
    else:
        _print(findings)
    sys.exit(1 if failed else 0)


def _print(findings: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        level = f"{finding.level:<5}"
        console.print(
            Text.assemble((level, _STYLES[finding.level]), f"{finding.check:<{width}}  {finding.found}")
        )
        for below in filter(None, (finding.meaning, finding.remedy and f"-> {finding.remedy}")):
            console.print(Text(f"       {below}"))
    console.print(_summary(findings))


def _summary(findings: list[Finding]) -> str:
    warned, failed = (
        sum(finding.level is level for finding in findings) for level in (Level.WARN, Level.FAIL)
    )
    said = f"{len(findings)} looked at: {warned} warned about, {failed} failed"
    return f"{said}; live migrations will not work before that is mended" if failed else said
