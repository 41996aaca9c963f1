"""Backing: what kind of file guest RAM lies in, and which way of reading and writing it is safe.

========  =====================================  ===================  =============================
kind      what it is                             read                 write
========  =====================================  ===================  =============================
MEMFD     memfd that is sealed against resizing  through the mapping  pwrite
HUGETLB   memfd or file in huge pages            preadv               copied by the kernel into the
                                                                      mapping: it has no pwrite
FILE      any other regular file                 preadv               pwrite
========  =====================================  ===================  =============================

A file that is not sealed may shrink at any time, and touching a mapping behind its end is SIGBUS, the death
of the daemon. A system call meets the end of the file as a short count instead, and a full file system, or an
empty pool of huge pages, as an error. preadv does not allocate holes either.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from contextlib import suppress
from enum import StrEnum

from migd.errors import GuestError, ResourceError
from migd.ram import linux
from migd.ram.page import PAGE_BYTES

HUGE_PAGE_BYTES = 2 << 20
"""Of the huge pages that RAM is made of here, whatever the default size of the host is."""

HUGE_POOL = "/proc/sys/vm/nr_hugepages"

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A file that cannot shrink cannot raise SIGBUS under a mapping; SEAL_SEAL rules out a later write seal."""

_WRITE_SEALS = fcntl.F_SEAL_WRITE | getattr(fcntl, "F_SEAL_FUTURE_WRITE", 0x10)
_UNUSABLE_FLAGS = os.O_APPEND | os.O_DIRECT | os.O_PATH
"""pwrite appends, reads must be aligned, nothing can be read at all."""


class Backing(StrEnum):
    """See the table above; the value is how `migd status` and messages call it."""

    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    FILE = "file"


def new_memfd(name: str, *, huge: bool) -> int:
    """A descriptor of an empty memfd, for ``prepare``. OSError as the kernel gives it."""
    flags = os.MFD_HUGETLB | os.MFD_HUGE_2MB if huge else 0
    return os.memfd_create(f"migd-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)


def prepare(fd: int, size_bytes: int) -> Backing:
    """Make an empty file of our own RAM: its size, seals where it takes them, huge pages set aside.

    OSError as the kernel gives it; ResourceError for want of huge pages.
    """
    os.ftruncate(fd, size_bytes)
    with suppress(OSError):  # a file of a file system has no seals
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    found = inspect(fd, size_bytes, read_only=False)
    if found is Backing.HUGETLB:
        _reserve_huge(fd, size_bytes)
    return found


def inspect(fd: int, size_bytes: int, *, read_only: bool) -> Backing:
    """What a descriptor that somebody handed over is. GuestError, without the name, if it is no such RAM.

    It must be open for reading and writing, or with ``read_only`` for nothing but reading.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise GuestError("the descriptor is no regular file")
    if status.st_size != size_bytes:
        raise GuestError(f"{size_bytes // PAGE_BYTES} pages announced, the file has {status.st_size} bytes")
    seals = _seals(fd)
    _check_access(fd, seals, read_only)
    if linux.filesystem_type(fd) == linux.HUGETLBFS:
        return Backing.HUGETLB
    return Backing.MEMFD if seals & SEALS == SEALS else Backing.FILE


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # a file system without seals
        return 0


def _check_access(fd: int, seals: int, read_only: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & _UNUSABLE_FLAGS:
        raise GuestError("the descriptor was opened with O_APPEND, O_DIRECT or O_PATH")
    access = flags & os.O_ACCMODE
    if read_only and access != os.O_RDONLY:
        raise GuestError("the RAM is said never to be written, but the descriptor can be written through")
    if not read_only and (access != os.O_RDWR or seals & _WRITE_SEALS):
        raise GuestError("the descriptor cannot be read and written through")


def _reserve_huge(fd: int, size_bytes: int) -> None:
    """Have huge pages set aside for all of a file. ResourceError if the host has not so many left.

    A shared mapping reserves them, and they stay reserved for the file after it is gone; without that, the
    store that finds the pool empty is SIGBUS, in the guest as well.
    """
    try:
        mmap.mmap(fd, size_bytes).close()
    except OSError as error:
        raise ResourceError(
            f"{size_bytes // HUGE_PAGE_BYTES} huge pages of 2 MiB cannot be reserved ({error.strerror}): "
            f"allow more in {HUGE_POOL}"
        ) from error
