"""The Linux calls that Python lacks: userfaultfd write-protection, PAGEMAP_SCAN, fallocate and a few more.

Numbers and layouts are those of x86-64 and aarch64 ``linux/userfaultfd.h`` and ``linux/fs.h``. Errors are
OSError as the kernel gives them; what they mean for a migration is decided by the callers.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import struct

import numpy as np
from numpy.typing import NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc.process_vm_writev.restype = ctypes.c_ssize_t
_libc.process_vm_writev.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.POINTER(_Iovec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_REGISTER_MODE_WP = 2

_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_FEATURES = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM
"""Without any one of these, writes to shared memory go unseen: refuse to run (SAFETY.md)."""

_PAGEMAP_SCAN = 0xC0606610
_SCAN_ARGUMENTS = struct.Struct("<12Q")
_PM_SCAN_WP_MATCHING = 1
_PM_SCAN_CHECK_WPASYNC = 2
_PAGE_IS_WPALLOWED = 1
_PAGE_IS_WRITTEN = 2
_MAX_REGIONS = 4096

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2


def userfaultfd() -> int:
    """A descriptor with asynchronous write-protection on shared memory, or OSError where the kernel has none.

    Opened with UFFD_USER_MODE_ONLY, so no privilege is needed (Linux >= 6.7).
    """
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(38, f"userfaultfd: unknown machine {platform.machine()}")
    fd = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"userfaultfd: {os.strerror(code)}")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("<3Q", 0xAA, _FEATURES, 0)))
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, "userfaultfd lacks WP_ASYNC on shared memory") from error
    return fd


def write_protect_register(fd: int, address: int, length: int) -> None:
    """Let the kernel log writes to a mapping of this process; the first scan protects it."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(struct.pack("<4Q", address, length, _REGISTER_MODE_WP, 0)))


def write_protect_unregister(fd: int, address: int, length: int) -> None:
    """Stop logging: the guest's writes cost nothing again."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, bytearray(struct.pack("<2Q", address, length)))


def harvest_written(pagemap_fd: int, address: int, length: int) -> NDArray[np.uint64]:
    """Atomically get, clear and re-protect (R3): address ranges written since the last call, shape (n, 2).

    ``pagemap_fd`` is /proc/PID/pagemap of the process that owns the mapping. One ioctl reads and
    re-protects. EPERM if a mapping in the range is not armed; a range without a mapping looks clean.
    """
    return _protect(pagemap_fd, address, length, _PAGE_IS_WRITTEN)


def protect_armed(pagemap_fd: int, address: int, length: int) -> NDArray[np.uint64]:
    """Begin the log: protect whatever is armed, and return it as address ranges, shape (n, 2)."""
    return _protect(pagemap_fd, address, length, _PAGE_IS_WPALLOWED)


def _protect(pagemap_fd: int, address: int, length: int, category: int) -> NDArray[np.uint64]:
    """Re-protect the pages in a category and return them; a partial walk continues from where it ended."""
    regions = np.empty((_MAX_REGIONS, 3), np.uint64)
    found: list[NDArray[np.uint64]] = []
    start, end = address, address + length
    while start < end:
        arguments = bytearray(
            _SCAN_ARGUMENTS.pack(
                _SCAN_ARGUMENTS.size,
                _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC,
                start,
                end,
                0,
                regions.ctypes.data,
                _MAX_REGIONS,
                0,
                0,
                category,
                0,
                category,
            )
        )
        count = fcntl.ioctl(pagemap_fd, _PAGEMAP_SCAN, arguments)
        found.append(regions[:count, :2].copy())
        walked = _SCAN_ARGUMENTS.unpack(arguments)[4]
        if walked <= start:
            raise OSError(5, f"PAGEMAP_SCAN made no progress at {start:#x}")
        start = walked
    return np.concatenate(found) if found else np.zeros((0, 2), np.uint64)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range of a file read as zero and give its memory back."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate(PUNCH_HOLE): {os.strerror(code)}")


HUGETLBFS = 0x958458F6
TMPFS = 0x01021994
"""Of both `linux/magic.h`; a memfd is a file of one or the other."""

_STATFS_BYTES = 120


def filesystem_type(fd: int) -> int:
    """The magic number of the file system that a descriptor's file is on."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fstatfs: {os.strerror(code)}")
    return int(struct.unpack_from("<q", answer)[0]) & 0xFFFF_FFFF


def store(address: int, data: NDArray[np.uint8]) -> None:
    """Copy contiguous bytes to an address of this process; OSError (EFAULT) where a store would be SIGBUS."""
    done = 0
    while done < data.nbytes:
        ours = _Iovec(data.ctypes.data + done, data.nbytes - done)
        theirs = _Iovec(address + done, data.nbytes - done)
        count = _libc.process_vm_writev(os.getpid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        if count <= 0:
            code = ctypes.get_errno()
            raise OSError(code, f"process_vm_writev: {os.strerror(code)}")
        done += count


def write_tracked(pagemap_fd: int, address: int, length: int) -> bool:
    """Whether all of a range is registered for asynchronous write-protection; looks, and changes nothing.

    OSError where the kernel has no PAGEMAP_SCAN (before 6.7).
    """
    regions = np.empty((_MAX_REGIONS, 3), np.uint64)
    allowed = _PAGE_IS_WPALLOWED
    start, end = address, address + length
    while start < end:
        arguments = bytearray(
            _SCAN_ARGUMENTS.pack(
                *(_SCAN_ARGUMENTS.size, 0, start, end, 0, regions.ctypes.data, _MAX_REGIONS, 0),
                *(0, allowed, 0, allowed),
            )
        )
        count = fcntl.ioctl(pagemap_fd, _PAGEMAP_SCAN, arguments)
        walked = _SCAN_ARGUMENTS.unpack(arguments)[4]
        if walked <= start or int((regions[:count, 1] - regions[:count, 0]).sum()) != walked - start:
            return False
        start = walked
    return True
