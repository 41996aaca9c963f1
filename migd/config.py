"""Configuration: one TOML file per daemon, typed; an unknown or ill-typed key is an error that names it."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from migd.errors import ConfigError
from migd.limits import Limits

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class DaemonConfig(_Table, frozen=True):
    """``[daemon]``: this process."""

    runtime_dir: str = ""
    """Sockets, journal, guest logs; 0700. Empty: see ``default_runtime_dir``."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    workers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Threads for copying, digests and compression; 0: one for each CPU core, at least 2."""
    event_loop: Literal["uvloop", "asyncio"] = "uvloop"


class DestinationConfig(_Table, frozen=True):
    """``[destination]``: accepting guests from other hosts."""

    listen: Annotated[str, msgspec.Meta(pattern=r"^.+:[0-9]{1,5}\Z")] = "127.0.0.1:7440"
    insecure_plaintext: bool = False
    """Allow ``listen`` beyond loopback although nothing on the network is encrypted or authenticated."""
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=64)] = 16
    guest_command: tuple[str, ...] = ()
    """argv of an incoming guest's process; {socket}, {name} and {migration} are replaced. Empty: the stub."""


class MigrationConfig(_Table, frozen=True):
    """``[migration]``: how guests leave; the command line can override most of it for one migration."""

    streams: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    compression: Literal["auto", "lz4", "none"] = "auto"
    verify: Literal["auto", "strict", "late", "off"] = "auto"
    hints: bool = True
    downtime_limit_ms: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    max_iterations: Annotated[int, msgspec.Meta(ge=1)] = 30
    max_total_s: Seconds = 300.0
    on_exhausted: Literal["force", "cancel"] = "force"
    insecure_plaintext: bool = False
    """Allow a destination beyond loopback although nothing on the network is encrypted or authenticated."""


class Config(_Table, frozen=True):
    """All of a file."""

    daemon: DaemonConfig = msgspec.field(default_factory=DaemonConfig)
    destination: DestinationConfig = msgspec.field(default_factory=DestinationConfig)
    migration: MigrationConfig = msgspec.field(default_factory=MigrationConfig)
    limits: Limits = msgspec.field(default_factory=Limits)


def load(path: Path) -> Config:
    """The configuration in a TOML file. ConfigError names file, line or key, and what was expected."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_readable(str(error))}") from error


def _readable(message: str) -> str:
    """msgspec's ``Object contains unknown field `x` - at `$.limits` `` -> ``limits.x: unknown key``."""
    text, _, place = message.partition(" - at ")
    table = place.strip("`").removeprefix("$").removeprefix(".")
    unknown = text.removeprefix("Object contains unknown field ")
    if unknown != text:
        key = unknown.strip("`")
        return f"unknown key {table + '.' if table else ''}{key}"
    return f"{table}: {text}" if table else text


def default_runtime_dir(role: str) -> Path:
    """$XDG_RUNTIME_DIR/migd/ROLE where there is one, else /tmp/migd-UID/ROLE."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return (Path(base) / "migd" if base else Path(f"/tmp/migd-{os.getuid()}")) / role


def runtime_dir(config: Config, role: str) -> Path:
    """Where a daemon of this role keeps its sockets and journal. ConfigError for an unknown ``~user``."""
    chosen = config.daemon.runtime_dir
    try:
        return Path(chosen).expanduser() if chosen else default_runtime_dir(role)
    except RuntimeError as error:  # a home directory that nobody has
        raise ConfigError(f"daemon.runtime_dir: {chosen}: {error}") from error
