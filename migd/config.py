"""Configuration: one TOML file per daemon, typed; an unknown or ill-typed key is an error that names it."""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from migd.errors import ConfigError
from migd.limits import Limits
from migd.sizes import check_bandwidth, parse_bandwidth

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Bandwidth = Annotated[int, msgspec.Meta(ge=0, extra={"quantity": "bandwidth"})]
"""Bytes per second; a file may also say "1G" or "unlimited" (``migd.sizes``). 0 is unlimited."""


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class DaemonConfig(_Table, frozen=True):
    """This process."""

    runtime_dir: str = ""
    """Directory (0700) of the daemon's sockets, journal, history and guest logs. Empty:
    $XDG_RUNTIME_DIR/migd/ROLE, or /tmp/migd-UID/ROLE where that variable is not set. The journal decides
    who runs a guest after a crash: on a host that may reboot in the middle of a migration, name a directory
    on a disk."""
    ram: Annotated[str, msgspec.Meta(pattern=r"^(memfd|hugetlb|/[^\0]*)\Z")] = "memfd"
    """What the RAM of guests is made of that bring none, also of those that arrive. memfd: memory without a
    name that nobody can resize. hugetlb: the same in huge pages of 2 MiB, which have to be reserved on this
    host (/proc/sys/vm/nr_hugepages); writes are then tracked by 2 MiB, too. A directory on tmpfs or
    hugetlbfs, such as "/dev/shm": a file migd-GUEST-BLOCK-RANDOM there for each block, which other programs
    may open."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug: state changes; info: a line per iteration and migration; warning and error: an operator is
    needed."""
    workers: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Threads for copying, hashing and compressing; 0 is one for each CPU core, at least 2. Fewer leave
    more of the processor to the guests."""
    event_loop: Literal["uvloop", "asyncio"] = "uvloop"
    """uvloop, or asyncio: slower, for comparing when uvloop is suspected of something."""
    max_bandwidth: Bandwidth = 0
    """Bytes per second that all guests leaving from here may put on the wire together, like "1G" (10^9), or
    0 or "unlimited". Migrations share it evenly, however many streams they have; what one does not use the
    others get. It holds in the pause, too: a low limit makes downtime long. At least 100K.
    Changed while migrations run with: migd set max-bandwidth."""


class DestinationConfig(_Table, frozen=True):
    """Accepting guests from other hosts; of no use to a daemon that only sends."""

    listen: Annotated[str, msgspec.Meta(pattern=r"^.+:[0-9]{1,5}\Z")] = "127.0.0.1:7440"
    """HOST:PORT, or [ADDRESS]:PORT for IPv6; port 0 takes a free one and says which."""
    insecure_plaintext: bool = False
    """Accept that memory crosses the network unencrypted and that whoever reaches the port can send guests
    here. There is no TLS yet, so an address that other hosts can reach is refused without this: for a
    private network that nobody else is in, or through a tunnel that ends on another address."""
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=64)] = 16
    """Streams that one migration may ask for."""
    guest_command: tuple[str, ...] = ()
    """argv of the process spawned for an incoming guest; {socket}, {name} and {migration} are replaced. It
    must speak migd.guest.control. Empty: migd's own stub guest."""
    max_bandwidth: Bandwidth = 0
    """Bytes per second at which all guests arriving here are taken in together, like "1G", or 0 or
    "unlimited"; TCP holds the sources back. Shared like the limit of [daemon]. Each stream has megabytes in
    socket buffers when its source pauses the guest, and they must arrive within ready_s: for a limit below
    some 10 MB/s, limit the sources instead. Changed with: migd set max-bandwidth --incoming; guests that are
    arriving then keep frames of up to 2 MiB, each of which must come within progress_s."""


class MigrationConfig(_Table, frozen=True):
    """How guests leave; of no use to a daemon that only receives. Options of migd migrate come first."""

    streams: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    """TCP connections of one migration. One is enough for a slow link; more than cores gain nothing."""
    compression: Literal["auto", "lz4", "none"] = "auto"
    """auto compresses chunk by chunk with lz4 while that is faster than sending raw; lz4 always; none
    never."""
    verify: Literal["auto", "strict", "late", "off"] = "auto"
    """When the source checks that no write was missed: strict before the guest resumes (part of the
    downtime, up to 0.35 s for each GiB sent), late right after it, auto strict if that fits the downtime
    limit, or off."""
    dirty_log: Literal["auto", "userfaultfd", "compare"] = "auto"
    """How writes of the running guest are found: userfaultfd is the kernel's log of the guest's own
    mapping; compare compares memory with what was sent, which needs nothing of kernel or guest, and takes
    about 1 s of one core for each GiB sent, after each iteration and once more in the pause; auto is the
    first of them that works."""
    hints: bool = True
    """Whether the guest is asked which pages are free, so that those stay behind."""
    downtime_limit_ms: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Pause the guest once what is left is estimated to fit, in ms. Smaller: more iterations, more
    bytes."""
    max_iterations: Annotated[int, msgspec.Meta(ge=1)] = 30
    """Iterations while the guest runs, the first included; then on_exhausted."""
    max_total_s: Seconds = 300.0
    """Seconds before the guest is paused; then on_exhausted."""
    on_exhausted: Literal["force", "cancel"] = "force"
    """For a guest that writes faster than memory moves: force pauses it however long the rest takes; cancel
    gives up and leaves it running here."""
    max_bandwidth: Bandwidth = 0
    """Bytes per second that each migration may put on the wire, like "500M", or 0 or "unlimited"; what
    [daemon] says about all together holds besides. Changed while it runs with: migd set max-bandwidth 1G
    GUEST."""
    insecure_plaintext: bool = False
    """Allow destinations on other hosts although nothing on the way is encrypted or authenticated: there is
    no TLS yet. Only for a network that nobody else is on."""


class Config(_Table, frozen=True):
    """All of a file."""

    daemon: DaemonConfig = msgspec.field(default_factory=DaemonConfig)
    destination: DestinationConfig = msgspec.field(default_factory=DestinationConfig)
    migration: MigrationConfig = msgspec.field(default_factory=MigrationConfig)
    limits: Limits = msgspec.field(default_factory=Limits)


TABLES: dict[str, type[msgspec.Struct]] = {field.name: field.type for field in msgspec.structs.fields(Config)}
"""The struct of each table."""

_BANDWIDTHS = [
    (table, field.name)
    for table, struct in TABLES.items()
    for field in msgspec.structs.fields(struct)
    if field.type == Bandwidth
]


def load(path: Path) -> Config:
    """The configuration in a TOML file. ConfigError names file, line or key, and what was expected."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of endless numbers, and of lists that are too deep
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return msgspec.convert(_with_numbers(data), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_readable(str(error))}") from error
    except _BadValue as error:
        raise ConfigError(f"{path}: {error}") from error


class _BadValue(Exception):
    """A value of the right type that means nothing: ``TABLE.KEY: what is wrong``."""


def _with_numbers(data: dict[str, object]) -> dict[str, object]:
    """A file's content with bandwidths as numbers; what is of another type is left to be complained
    about."""
    tables = dict(data)
    for table, key in _BANDWIDTHS:
        keys = tables.get(table)
        if isinstance(keys, dict) and key in keys:
            tables[table] = {**keys, key: _bandwidth(f"{table}.{key}", keys[key])}
    return tables


def _bandwidth(key: str, value: object) -> object:
    try:
        if isinstance(value, str):
            return parse_bandwidth(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return check_bandwidth(value)
    except ValueError as error:
        raise _BadValue(f"{key}: {error}") from error
    return value


def _readable(message: str) -> str:
    """msgspec's ``Object contains unknown field `x` - at `$.limits` `` -> ``limits.x: unknown key``."""
    text, _, place = message.partition(" - at ")
    table = place.strip("`").removeprefix("$").removeprefix(".")
    unknown = text.removeprefix("Object contains unknown field ")
    if unknown != text:
        key = unknown.strip("`")
        return f"unknown key {table + '.' if table else ''}{key}{_meant(table, key)}"
    return f"{table}: {text}" if table else text


def _meant(table: str, key: str) -> str:
    """What whoever wrote an unknown key, or table, may have had in mind."""
    elsewhere = [name for name, struct in TABLES.items() if key in struct.__struct_fields__]
    if elsewhere:
        return f"; it belongs into [{elsewhere[0]}]"
    known = TABLES[table].__struct_fields__ if table in TABLES else tuple(TABLES)
    close = difflib.get_close_matches(key, known, n=1)
    return f"; do you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


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
