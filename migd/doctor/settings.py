"""What a configuration says that its types allow and this host, or another key of it, does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from migd.config import Config, DestinationConfig, runtime_dir
from migd.doctor import directory
from migd.doctor.finding import Finding, Level, fail, ok, warn
from migd.errors import ConfigError
from migd.migration.convergence import SWITCHOVER_OVERHEAD_S
from migd.ram.provider import provider
from migd.sizes import bandwidth_text
from migd.transport.tcp import is_loopback, parse_address

_DOES_NOT_START = "no daemon starts with that"


def examine(config: Config, role: str) -> Iterator[Finding]:
    """One finding a thing looked at, named by its key; nothing is changed."""
    yield from _runtime_dir(config, role)
    yield from _ram(config)
    if role != "source":
        yield from _listen(config.destination)
        yield from _guest_command(config.destination)
    yield from _contradictions(config, role)


def _runtime_dir(config: Config, role: str) -> Iterator[Finding]:
    key = "daemon.runtime_dir"
    try:
        place = runtime_dir(config, role)
    except ConfigError as error:
        yield fail(key, str(error).removeprefix(f"{key}: "), _DOES_NOT_START, "name a directory in full")
        return
    found = directory.ownership(key, place)
    yield found if found.level is not Level.OK else ok(key, f"{place}: {found.found}")


def _ram(config: Config) -> Iterator[Finding]:
    key = "daemon.ram"
    try:
        provider(config.daemon.ram)
    except ConfigError as error:
        remedy = 'name a directory on tmpfs or hugetlbfs, or "memfd"'
        yield fail(key, str(error).removeprefix(f"{key}: "), _DOES_NOT_START, remedy)
    else:
        yield ok(key, config.daemon.ram)


def _listen(config: DestinationConfig) -> Iterator[Finding]:
    key = "destination.listen"
    try:
        parse_address(config.listen)
    except ConfigError as error:
        yield fail(key, str(error), _DOES_NOT_START, "write HOST:PORT, or [ADDRESS]:PORT for IPv6")
        return
    if is_loopback(config.listen):
        yield ok(key, f"{config.listen}: this host alone")
    elif config.insecure_plaintext:
        meaning = "whoever reaches it can read guest memory on its way and send guests here"
        yield warn(key, f"{config.listen}: other hosts, in plaintext", meaning, "use a network of its own")
    else:
        remedy = "listen on 127.0.0.1, or accept that with destination.insecure_plaintext = true"
        yield fail(key, f"{config.listen}: other hosts, in plaintext", _DOES_NOT_START, remedy)


def _guest_command(config: DestinationConfig) -> Iterator[Finding]:
    key = "destination.guest_command"
    if not config.guest_command:
        yield ok(key, "migd's own stub guest")
        return
    program = config.guest_command[0]
    if shutil.which(program) is None:
        meaning = "no guest can arrive"
        yield fail(
            key, f"{program} is no program here", meaning, "install it, or name it with its whole path"
        )
    elif not any("{socket}" in word for word in config.guest_command):
        meaning = "the process does not learn where to attach, and no guest can arrive"
        yield fail(key, "{socket} is not in it", meaning, "pass {socket}, {name} and {migration} to it")
    else:
        yield ok(key, os.fspath(shutil.which(program) or program))


def _contradictions(config: Config, role: str) -> Iterator[Finding]:
    """Keys that cannot have the effect they ask for, because of another or of what is possible at all."""
    limits, migration, destination = config.limits, config.migration, config.destination
    if role != "destination":
        shared = config.daemon.max_bandwidth
        if 0 < shared < migration.max_bandwidth:
            found = f"{bandwidth_text(migration.max_bandwidth)}, more than all migrations together"
            remedy = f"lower it, or raise daemon.max_bandwidth ({bandwidth_text(shared)})"
            yield warn("migration.max_bandwidth", found, "no migration ever gets that much", remedy)
        if migration.downtime_limit_ms / 1e3 < SWITCHOVER_OVERHEAD_S:
            found = f"{migration.downtime_limit_ms:g} ms"
            meaning = f"a hand-over alone takes {SWITCHOVER_OVERHEAD_S * 1e3:g} ms: only {_exhausted(config)}"
            yield warn("migration.downtime_limit_ms", found, meaning, "raise it")
        if limits.hint_first_s > limits.hint_window_s:
            found = f"{limits.hint_first_s:g} s, longer than hint_window_s ({limits.hint_window_s:g} s)"
            meaning = "the first read waits for answers that no longer count"
            yield warn("limits.hint_first_s", found, meaning, "make it the shorter of the two")
    if role == "serve" and migration.streams > destination.max_streams:
        found = f"{migration.streams}, more than destination.max_streams ({destination.max_streams})"
        meaning = "two daemons with this configuration refuse each other's guests"
        yield warn("migration.streams", found, meaning, "lower it, or raise the other")
    if limits.progress_s <= limits.ping_s:
        found = f"{limits.progress_s:g} s, no more than ping_s ({limits.ping_s:g} s)"
        meaning = "a source learns by pings what was applied: every migration looks stalled"
        yield fail("limits.progress_s", found, meaning, "make it several times ping_s")


def _exhausted(config: Config) -> str:
    """When a guest that always has something left is moved."""
    migration = config.migration
    spent = f"after {migration.max_iterations} iterations or {migration.max_total_s:g} s"
    if migration.on_exhausted == "force":
        return f"a guest that writes nothing meets it, any other is paused {spent}"
    return f"a guest that writes nothing meets it, any other is given up {spent}"
