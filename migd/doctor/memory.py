"""How much guest RAM this host can hold: what is free, what limits it, and where it may end up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from migd.doctor.finding import Finding, fail, ok, warn
from migd.doctor.system import System
from migd.errors import MigdError
from migd.ram.provider import provider

_LOW_BYTES = 512 << 20
"""Less than this holds hardly any guest beside the daemons, which need about 100 MiB themselves."""
_UNLIMITED_BYTES = 1 << 60
"""How version 1 of control groups writes that there is no limit: 2^63 less a page."""


def room(ram: str) -> Finding:
    """What guests would be given now, of the kind that ``daemon.ram`` names."""
    check = f"room for guest RAM ({ram})"
    try:
        free_bytes = provider(ram).room(0).free_bytes
    except MigdError as error:
        return fail(check, str(error), "no guest can be taken here", "see daemon.ram in configs/source.toml")
    found = f"{_mib(free_bytes)} can be given"
    if free_bytes == 0:
        return fail(check, found, "no guest can be taken here", _freeing(ram))
    if free_bytes < _LOW_BYTES:
        return warn(check, found, "larger guests are refused here", _freeing(ram))
    return ok(check, found, "less what guests that are here have not touched yet")


def _freeing(ram: str) -> str:
    if ram == "hugetlb":
        return "set more huge pages aside in /proc/sys/vm/nr_hugepages"
    return "free memory" if ram == "memfd" else f"free memory, or make {ram} larger"


def huge_pages(system: System, ram: str) -> Finding:
    """Set aside ones are lost to guests whose RAM is not made of them."""
    total, free = system.meminfo("HugePages_Total"), system.meminfo("HugePages_Free")
    found = f"{free} of {total} free"
    if total and free == total and ram == "memfd":
        return warn(
            "huge pages",
            found,
            f"{_mib(total * system.meminfo('Hugepagesize'))} are set aside and daemon.ram does not use them",
            'set daemon.ram = "hugetlb", or give them back in /proc/sys/vm/nr_hugepages',
        )
    return ok("huge pages", found)


def swap(system: System) -> Finding:
    """Guest RAM is shared memory, and that may be swapped out."""
    total_bytes = system.meminfo("SwapTotal")
    if not total_bytes:
        return ok("swap", "none")
    return warn(
        "swap",
        _mib(total_bytes),
        "guest RAM may be swapped out: a migration reads it back from disk, and guests' secrets lie there",
        'swapoff, or daemon.ram = "hugetlb", which is never swapped',
    )


def memory_limit(system: System) -> Finding:
    """A control group may allow this process and the guests it starts less than the host has free."""
    check = "memory limit"
    found = min(_limits(system), default=None)
    if found is None:
        return ok(check, "none")
    left_bytes, group = found
    if left_bytes >= system.meminfo("MemAvailable"):
        return ok(check, f"{_mib(left_bytes)} left in control group {group}")
    return warn(
        check,
        f"{_mib(left_bytes)} left in control group {group}, less than is free on this host",
        "migd counts what the host has free: a guest that is taken may be killed for memory later",
        "raise the limit of that group, or run the daemons outside of it",
    )


def _limits(system: System) -> Iterator[tuple[int, str]]:
    """(bytes left, path) of every control group with a limit that this process is in."""
    for line in system.text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits_above(system, "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _limits_above(system, "sys/fs/cgroup/memory", path, *names)


def _limits_above(
    system: System, root: str, path: str, limit_name: str, usage_name: str
) -> Iterator[tuple[int, str]]:
    """Its own and its ancestors'. A container sees its own group as the root."""
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        limit = system.text(f"{root}{group}/{limit_name}")
        usage = system.text(f"{root}{group}/{usage_name}")
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _UNLIMITED_BYTES:
            yield max(0, int(limit) - int(usage)), str(group)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"
