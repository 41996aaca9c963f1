"""`migd config`: what a configuration means, and whether it would work here."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from migd.cli.options import as_json_text, json_option
from migd.cli.reference import ROLES, TABLES_OF, Key, as_toml, changed, keys
from migd.config import Config, load
from migd.doctor.finding import Finding, Level
from migd.migration.stats import SCHEMA

_role_option = click.option(
    "--role",
    type=click.Choice(list(ROLES)),
    default="serve",
    show_default=True,
    help="The daemon that it is for.",
)


Value = str | int | float | bool | list[str]


class ConfigKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key of a configuration."""

    key: str
    """TABLE.KEY"""
    value: Value
    """Bandwidths as numbers."""
    default: Value
    """The value without any file."""
    values: str
    """What it may be, in words."""
    meaning: str
    """In the words of `migd config show`."""


class ConfigCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What `migd config check` found."""

    schema: int = SCHEMA
    ok: bool
    """A daemon of this role starts with it, here and now."""
    file: str
    """As it was named."""
    role: str
    """Of the daemon that it was looked at for."""
    changed: list[ConfigKey]
    """The keys that are not at their defaults."""
    unused: list[str]
    """Of these, the ones that mean nothing to a daemon of this role."""
    findings: list[Finding]
    """What was looked at beyond the types of the keys."""


class ConfigDocument(msgspec.Struct, frozen=True, kw_only=True):
    """`migd config show`: a configuration as a daemon understands it."""

    schema: int = SCHEMA
    role: str
    """Of the daemon that it is for."""
    keys: list[ConfigKey]
    """Every key that means anything to a daemon of this role."""


@click.group("config")
def config_() -> None:
    """Look at configurations: what they say, and whether it would work."""


@config_.command()
@click.argument("file", type=click.Path(path_type=Path))
@_role_option
@json_option
def check(file: Path, role: str, as_json: bool) -> None:
    """Say whether a daemon starts with FILE on this host, and which keys are not at their defaults.

    Looks at types and ranges, and then at what they cannot tell: directories, addresses, programs, keys that
    contradict each other. Nothing is changed. The exit code is 2 if anything would not work.
    """
    from migd.doctor import settings  # takes longer to import than the rest

    config = load(file)
    findings = list(settings.examine(config, role))
    verdict = ConfigCheck(
        ok=all(finding.level is not Level.FAIL for finding in findings),
        file=str(file),
        role=role,
        changed=[_key(config, key) for key in changed(config)],
        unused=[key.path for key in changed(config) if key.table not in TABLES_OF[role]],
        findings=findings,
    )
    click.echo(as_json_text(verdict) if as_json else _text(verdict, config))
    sys.exit(0 if verdict.ok else 2)


def _key(config: Config, key: Key) -> ConfigKey:
    value, default = msgspec.to_builtins((key.value_in(config), key.default))
    return ConfigKey(key=key.path, value=value, default=default, values=key.values, meaning=key.meaning)


def _text(verdict: ConfigCheck, config: Config) -> str:
    lines = []
    for finding in verdict.findings:
        if finding.level is not Level.OK:
            lines.append(f"{finding.level}  {verdict.file}: {finding.check}: {finding.found}")
            lines.append(f"      {finding.meaning}\n      -> {finding.remedy}")
    lines.append(f"{verdict.file}: {'ok' if verdict.ok else 'not usable'} for migd {verdict.role}")
    for key in changed(config):
        unused = f"; of no use to migd {verdict.role}" if key.path in verdict.unused else ""
        lines.append(
            f"  {key.path} = {key.toml(key.value_in(config))}  (default {key.toml(key.default)}{unused})"
        )
    if not verdict.changed:
        lines.append("  every key has its default")
    return "\n".join(lines)


@config_.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_role_option
@json_option
def show(file: Path | None, role: str, as_json: bool) -> None:
    """Print FILE as a daemon understands it, or the defaults: every key, with what it means, as TOML."""
    config = load(file) if file else Config()
    every = [_key(config, key) for table in TABLES_OF[role] for key in keys(table)]
    document = ConfigDocument(role=role, keys=every)
    click.echo(as_json_text(document) if as_json else as_toml(config, role), nl=as_json)
