"""Where a daemon keeps its sockets and journal: whose it is, what it outlives, and how fast it is."""

from __future__ import annotations

import os
import stat
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from migd.doctor.finding import Finding, fail, ok, warn
from migd.host import SOCKET_PATH_BYTES
from migd.ram import linux

_WRITES = 9
_RECORD_BYTES = 300
"""About a line of the journal."""
_SLOW_S = 0.010
"""A disk that takes longer adds tens of milliseconds to every pause."""
_AT_SOURCE, _AT_DESTINATION = 2, 3
"""Times the guest waits for the disk while it is paused: GO, and READY and STARTED; the first record of a
migration makes its directory durable, too."""
_LITTLE_ROOM_BYTES = 16 << 20
_NO_ROOM_BYTES = 1 << 20
"""Of a journal's records each takes a block of the file system."""


def examine(directory: Path) -> Iterator[Finding]:
    """All about one runtime directory, which need not be there yet; nothing of it is changed for good."""
    check = f"runtime directory {directory}"
    yield ownership(check, directory)
    place = _nearest(directory)
    yield _durability(f"journal in {directory}", place)
    yield _space(f"journal in {directory}", place)
    if os.access(place, os.W_OK | os.X_OK):
        yield disk_speed(f"journal in {directory}", sync_s(place))


def _nearest(directory: Path) -> Path:
    """It, or the directory above it that is there: what it will be made in."""
    return next(place for place in (directory, *directory.absolute().parents) if place.is_dir())


def ownership(check: str, directory: Path) -> Finding:
    meaning = "no daemon starts there"
    path_bytes = len(os.fsencode(directory / "control.sock"))
    if path_bytes > SOCKET_PATH_BYTES:
        found = f"a socket's path in it has {path_bytes} bytes, the kernel takes {SOCKET_PATH_BYTES}"
        return fail(check, found, meaning, "choose a shorter --runtime-dir")
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return _makeable(check, _nearest(directory))
    except OSError as error:
        return fail(check, f"{error.strerror}", meaning, "choose another --runtime-dir")
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        found = f"not a directory of this user, {os.getuid()}"
        return fail(check, found, meaning, "run as the daemon's user, or choose another")
    if directory.absolute().parent.stat().st_uid not in (os.getuid(), 0):
        found = f"{directory.absolute().parent} belongs to another user"
        return fail(check, found, f"{meaning}: that user could replace it", "choose another --runtime-dir")
    mode = stat.S_IMODE(status.st_mode)
    if mode != 0o700:
        return warn(
            check, f"mode {mode:04o}", "others can look into it", "a daemon makes it 0700 when it starts"
        )
    return ok(check, "ours, mode 0700")


def _makeable(check: str, place: Path) -> Finding:
    if os.access(place, os.W_OK | os.X_OK):
        return ok(check, f"not there yet, can be made in {place}")
    found = f"not there, and cannot be made in {place}"
    return fail(
        check, found, "no daemon starts there", "choose another --runtime-dir, or make it for this user"
    )


def _durability(check: str, place: Path) -> Finding:
    found = _volatile(place)
    if not found:
        return ok(check, "on a disk, outlives a reboot")
    return warn(
        check,
        found,
        "a reboot loses it, as it does the guests here; but a source that does not know whether its guest "
        "was started here is then told that it was not, although it may have run",
        "set daemon.runtime_dir to a directory on a disk",
    )


def _volatile(place: Path) -> str:
    """Why what lies there does not outlive a reboot; empty if it does."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if linux.filesystem_type(fd) == linux.TMPFS:
            return "on tmpfs"
    finally:
        os.close(fd)
    if place.resolve().is_relative_to("/tmp"):
        return "below /tmp, which most systems empty at every boot, and of old files at any time"
    return ""


def _space(check: str, place: Path) -> Finding:
    space = os.statvfs(place)
    free_bytes = space.f_bavail * space.f_frsize
    inodes = space.f_favail if space.f_files else 1 << 20
    found = f"{free_bytes >> 20} MiB and {inodes} files free"
    remedy = "make room, or set daemon.runtime_dir to another disk"
    if free_bytes < _NO_ROOM_BYTES or inodes < 8:
        return fail(check, found, "a record that cannot be written ends its migration", remedy)
    if free_bytes < _LITTLE_ROOM_BYTES or inodes < 1000:
        return warn(check, found, "once it is full, migrations fail", remedy)
    return ok(check, found)


def sync_s(place: Path) -> float:
    """Seconds until a record is durable, the median of a few, written to a file that has no name."""
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        times = []
        for _ in range(_WRITES):
            began = time.perf_counter()
            file.write(bytes(_RECORD_BYTES))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def disk_speed(check: str, durable_s: float) -> Finding:
    """A slow disk is downtime: the guest is paused while the hand-over is made durable."""
    found = f"a record is durable after {durable_s * 1e3:.1f} ms"
    if durable_s <= _SLOW_S:
        return ok(check, found)
    added_ms = (_AT_SOURCE + _AT_DESTINATION) * durable_s * 1e3
    return warn(
        check,
        found,
        f"a guest is paused for {_AT_SOURCE} of these at the source and {_AT_DESTINATION} at the "
        f"destination: {added_ms:.0f} ms if both are as slow",
        "set daemon.runtime_dir to a faster disk",
    )
