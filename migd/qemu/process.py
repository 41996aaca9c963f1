"""QemuProcess: where a running QEMU maps a RAM file, whether its writes are tracked, and who else maps it.

The kernel tracks the writes of one mapping of one process. So RAM that a migration can rely on is mapped
shared, writable, whole and once, by QEMU and by nobody else; whatever else is found is refused, or named.
Not found, because it leaves no mapping: a process that writes to the file with pwrite, a device that
was given pages of it (VFIO), and processes whose maps this user may not read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import select
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from migd.errors import GuestError
from migd.ram import linux

_PROC = Path("/proc")

_MAP_NORESERVE = 0x4000
"""Of x86-64 and aarch64; in Python's `mmap` since 3.13 only."""

_SYS_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_VM = 1

_libc = ctypes.CDLL(None, use_errno=True)

_SHARE = "-object memory-backend-file,...,share=on (or memory-backend-memfd, which is shared by itself)"


@dataclass(frozen=True)
class RamMapping:
    """Where a whole RAM file lies in QEMU's address space."""

    address: int
    bytes: int


@dataclass(frozen=True)
class Writer:
    """A process that maps a RAM file so that it can write to it."""

    pid: int
    command: str


@dataclass(frozen=True)
class _Area:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    flags: str
    """As printed: ``rw-s``."""
    offset: int

    @property
    def shared(self) -> bool:
        return self.flags.endswith("s")

    @property
    def writable(self) -> bool:
        return self.flags[1] == "w"


class QemuProcess:
    """A process by a descriptor of it: what is said of it is never said of another with the same number."""

    def __init__(self, pid: int) -> None:
        """GuestError if there is no such process."""
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError, ValueError) as error:
            raise GuestError(f"QEMU: there is no process {pid} ({error})") from error

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    @property
    def alive(self) -> bool:
        """Whether it has not ended; one that its parent has not waited for yet has."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def mapping_of(self, fd: int) -> RamMapping:
        """Where it maps the file behind ``fd``: shared, writable, all of it, once. GuestError if it does not.

        Several adjacent areas that together are the file count as one: the kernel splits them at will.
        """
        name, size = _called(fd), os.fstat(fd).st_size
        areas = _areas(self._maps(), _identity(fd))
        if not areas:
            raise GuestError(f"QEMU (pid {self.pid}) does not map {name}: it is not this guest's RAM")
        if any(not area.shared for area in areas):
            raise GuestError(
                f"QEMU (pid {self.pid}) maps {name} privately, what it writes is not in the file: "
                f"start it with {_SHARE}"
            )
        if any(not area.writable for area in areas):
            raise GuestError(f"QEMU (pid {self.pid}) maps {name} read-only: start it without readonly=on")
        return self._whole(sorted(areas, key=lambda area: (area.offset, area.start)), name, size)

    def _whole(self, areas: list[_Area], name: str, size: int) -> RamMapping:
        """Of areas in the order of the file."""
        offset, address = 0, areas[0].start
        for area in areas:
            if area.offset < offset:
                raise GuestError(
                    f"QEMU (pid {self.pid}) maps {name} more than once, at {address:#x} and {area.start:#x}: "
                    "writes through the second mapping are not tracked; one memory backend, used once"
                )
            if area.offset > offset:
                raise self._partly(name, offset, size)
            if area.start != address:
                raise GuestError(
                    f"QEMU (pid {self.pid}) maps {name} in pieces, at {areas[0].start:#x} and "
                    f"{area.start:#x}: one memory backend for one file"
                )
            offset, address = offset + area.end - area.start, area.end
        if offset != size:
            raise self._partly(name, offset, size)
        return RamMapping(areas[0].start, size)

    def _partly(self, name: str, mapped: int, size: int) -> GuestError:
        return GuestError(
            f"QEMU (pid {self.pid}) maps {name} only in part (the first {mapped} bytes of {size}): "
            "the memory backend's size= must be the size of the file, and its offset 0"
        )

    def open_pagemap(self) -> int:
        """A descriptor of its pagemap, the caller's to close. GuestError if this user gets none."""
        try:
            fd = os.open(_PROC / str(self.pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable("pagemap", error) from error
        if not self.alive:
            os.close(fd)
            raise GuestError(f"QEMU (pid {self.pid}) has ended")
        return fd

    def tracked(self, mapping: RamMapping) -> bool:
        """Whether all of it is registered for asynchronous write protection; nothing is changed by looking.

        False on a kernel that has none. GuestError if the process ended or may not be looked at.
        """
        pagemap = self.open_pagemap()
        try:
            return linux.write_tracked(pagemap, mapping.address, mapping.bytes)
        except OSError:  # no such ioctl before Linux 6.7
            return False
        finally:
            os.close(pagemap)

    def other_writers(self, fd: int, but: Collection[int] = ()) -> list[Writer]:
        """Every other process that maps the file so that it can write: it is not tracked (W13).

        ``but``: processes that are known and allowed for. One that ends while it is looked at is left out,
        and so is one that shares this one's memory, page tables and all (``-run-with async-teardown=on``):
        its writes are tracked, too.
        """
        return [
            writer
            for writer in _writers(fd)
            if writer.pid != self.pid and writer.pid not in but and not self._shares_memory(writer.pid)
        ]

    def _shares_memory(self, pid: int) -> bool:
        """Not just the file: a process with the same address space. False where the kernel will not say."""
        number = _SYS_KCMP.get(platform.machine())
        return number is not None and _libc.syscall(number, self.pid, pid, _KCMP_VM, 0, 0) == 0

    def _maps(self) -> bytes:
        try:
            maps = (_PROC / str(self.pid) / "maps").read_bytes()
        except OSError as error:
            raise self._unreadable("maps", error) from error
        if not self.alive:
            raise GuestError(f"QEMU (pid {self.pid}) has ended")
        return maps

    def _unreadable(self, file: str, error: OSError) -> GuestError:
        if not self.alive:
            return GuestError(f"QEMU (pid {self.pid}) has ended")
        return GuestError(
            f"/proc/{self.pid}/{file}: {error.strerror}: this must run as root, or as the user that QEMU was "
            "started by and has been all along (not -runas)"
        )


def holder_of(fd: int) -> list[int]:
    """Which processes map the file shared and writable: among them the QEMU with this RAM."""
    return [writer.pid for writer in _writers(fd)]


def _writers(fd: int) -> Iterator[Writer]:
    identity = _identity(fd)
    for pid in sorted(int(entry) for entry in os.listdir(_PROC) if entry.isdecimal()):
        process = _PROC / str(pid)
        try:
            maps = (process / "maps").read_bytes()
            if any(area.shared and area.writable for area in _areas(maps, identity)):
                command = (process / "cmdline").read_bytes() or (process / "comm").read_bytes()
                yield Writer(pid, command.replace(b"\0", b" ").decode(errors="replace").strip())
        except OSError:  # ended, or not ours to read
            continue


# -- a file in a list of mappings -----------------------------------------------------------------------

_AREA = rb"^([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][sp]) ([0-9a-f]+) %b(?:\s|$)"


def _areas(maps: bytes, identity: bytes) -> list[_Area]:
    """Those of one file. A search for its text comes first: most processes do not have it."""
    if identity not in maps:
        return []
    return [
        _Area(int(start, 16), int(end, 16), flags.decode(), int(offset, 16))
        for start, end, flags, offset in re.findall(_AREA % re.escape(identity), maps, re.MULTILINE)
    ]


def _identity(fd: int) -> bytes:
    """Device and inode as /proc/PID/maps prints them for this file: b"00:1b 42".

    Read off a mapping of our own, and not computed from fstat, whose device is another one where a file
    system has several behind one mount (btrfs, overlayfs). Read-only and not reserved: it takes no memory
    and is no writer.
    """
    status = os.fstat(fd)
    # Part of a huge page can be mapped, but not unmapped again.
    length = status.st_blksize if linux.filesystem_type(fd) == linux.HUGETLBFS else mmap.PAGESIZE
    try:
        with mmap.mmap(fd, length, mmap.MAP_SHARED | _MAP_NORESERVE, mmap.PROT_READ) as page:
            address = np.frombuffer(page, np.uint8).ctypes.data
            own = (_PROC / "self/maps").read_bytes()
    except (OSError, ValueError) as error:
        raise GuestError(f"{_called(fd)} cannot be RAM: {error}") from error
    found = re.search(rb"^%x-\S+ \S+ \S+ (\S+ \d+)" % address, own, re.MULTILINE)
    assert found is not None
    return found[1]


def _called(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")
