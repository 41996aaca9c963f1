"""What Python, its libraries and the kernel can do, each found out by doing it."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import platform
from collections.abc import Iterator

import numpy as np

from migd import __version__
from migd.doctor.finding import Finding, fail, ok, warn
from migd.doctor.system import System
from migd.errors import ResourceError
from migd.ram import linux
from migd.ram import soft_dirty as marks
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock

_LIBRARIES = ("click", "lz4", "msgspec", "numpy", "rich", "uvloop", "xxhash")
_PAGES = 4


def software() -> Iterator[Finding]:
    """Versions, for a report of a fault and for comparing two hosts."""
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    yield ok("migd", f"{__version__}, Python {platform.python_version()}, {libraries}")
    yield ok("kernel", f"{platform.system()} {platform.release()} on {platform.machine()}")


def write_tracking(dirty_log: str) -> Finding:
    """Writes to a mapping of our own, and reads them from the kernel's log; ``dirty_log`` as configured."""
    check = "write tracking"
    try:
        with RamMapping() as mapping:
            logged = mapping.logged_writes()
    except (OSError, ResourceError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return _untracked(check, f"the kernel has none ({reason})", dirty_log)
    if logged != [1, 3]:
        return fail(
            check,
            f"pages 1 and 3 were written and the kernel logged {logged}",
            "a live migration would lose writes",
            'set migration.dirty_log = "compare", or use --paused, and report this kernel',
        )
    used = ', not used as migration.dirty_log = "compare"' if dirty_log == "compare" else ""
    return ok(check, f"userfaultfd with WP_ASYNC on shared memory, PAGEMAP_SCAN: two writes seen{used}")


def _untracked(check: str, found: str, dirty_log: str) -> Finding:
    remedy = (
        "run Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP; in a container, allow "
        "the system call userfaultfd"
    )
    if dirty_log == "userfaultfd":
        meaning = 'live migrations are refused, as migration.dirty_log = "userfaultfd"'
        return fail(check, found, meaning, f"{remedy}; or let it be auto")
    meaning = (
        "live migrations compare memory with what was sent, which costs processor time and a longer pause"
    )
    return warn(check, found, meaning, remedy)


class RamMapping:
    """A few pages of guest RAM as a guest maps them: sealed, shared, with its writes logged."""

    def __enter__(self) -> RamMapping:
        self._block = RamBlock.create(BlockShape("doctor", _PAGES))
        self._mapping = mmap.mmap(self._block.fd, self._block.bytes)
        self._bytes = np.frombuffer(self._mapping, np.uint8)
        return self

    def __exit__(self, *_error: object) -> None:
        del self._bytes
        self._mapping.close()
        self._block.close()

    def logged_writes(self) -> list[int]:
        """Pages logged by the kernel after pages 1 and 3 were written, from a log begun before that."""
        address, length = self._bytes.ctypes.data, len(self._bytes)
        fault_fd = linux.userfaultfd()
        try:
            linux.write_protect_register(fault_fd, address, length)
            pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                linux.protect_armed(pagemap_fd, address, length)
                for page in (1, 3):
                    self._bytes[page * PAGE_BYTES] = 1
                written = linux.harvest_written(pagemap_fd, address, length)
            finally:
                os.close(pagemap_fd)
        finally:
            os.close(fault_fd)
        ranges = ((written - np.uint64(address)) // np.uint64(PAGE_BYTES)).tolist()
        return [page for start, stop in ranges for page in range(start, stop)]


def soft_dirty() -> Finding:
    """The older kind of write tracking."""
    found = "there" if marks.supported() else "not there"
    return ok("soft-dirty", f"{found}; for a QEMU without the preload, which holds still while they are read")


def sealing() -> Finding:
    """Guest RAM as every guest gets it by default."""
    try:
        RamBlock.create(BlockShape("doctor", _PAGES)).close()
    except ResourceError as error:
        return fail(
            "sealed memory",
            str(error),
            "guest RAM cannot be made",
            "allow memfd_create: a container's filter or its memory limit refuses it",
        )
    return ok("sealed memory", "memfd with seals against resizing")


def process_handles() -> Finding:
    """A destination notices by these that a guest's process has ended."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return fail(
            "pidfd",
            str(error.strerror),
            "no incoming guest can be watched",
            "in a container, allow the system call pidfd_open",
        )
    return ok("pidfd", "there")


def user_faults(system: System) -> Finding:
    """A switch that often is suspected, and does not matter."""
    value = system.text("proc/sys/vm/unprivileged_userfaultfd") or "not there"
    return ok("vm.unprivileged_userfaultfd", value, "either will do: migd asks for faults of user code only")
