"""The dirty log: which pages the guest wrote since the last harvest, as the kernel saw it.

Two halves of one mechanism, in two processes. The guest arms its *own* mapping (``WriteProtection``), since
the kernel logs the writes of a mapping and of no other; the daemon harvests (``KernelDirtyLog``) through
the guest's pagemap descriptor. Not seen, hence never done: pwrite on the memfd, a second writable mapping,
a forked child, hole punching (docs/architecture.md).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migd.errors import GuestError, LiveUnsupported
from migd.ram import linux
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES


@dataclass(frozen=True)
class ArmedRange:
    """Where a RAM block lies in the guest's address space, and its first page in the layout."""

    address: int
    pages: int
    first_page: int


class WriteProtection:
    """The guest's half: logs this process's writes to its own mappings from construction to ``close``."""

    def __init__(self, mappings: list[tuple[int, int]]) -> None:
        """Arm ``(address, bytes)`` mappings. LiveUnsupported where the kernel cannot."""
        self._mappings = mappings
        try:
            self._fd = linux.userfaultfd()
        except OSError as error:
            raise LiveUnsupported(f"the kernel cannot track writes ({error.strerror})") from error
        try:
            for address, length in mappings:
                linux.write_protect_register(self._fd, address, length)
            self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            os.close(self._fd)
            raise LiveUnsupported(f"arming write tracking failed ({error.strerror})") from error

    def close(self) -> None:
        """Stop logging and let the mapping go."""
        for address, length in self._mappings:
            linux.write_protect_unregister(self._fd, address, length)
        os.close(self._fd)
        os.close(self.pagemap_fd)


class KernelDirtyLog:
    """The daemon's half: harvests what an armed guest wrote. Owns ``pagemap_fd`` until ``close``."""

    name = "userfaultfd"
    sees_writes = True
    cost_s = 0.0  # 0.4 to 2 ms a GiB: part of what every pause takes

    def __init__(self, pagemap_fd: int, ranges: list[ArmedRange], pages: int) -> None:
        self._fd = pagemap_fd
        self._ranges = ranges
        self._pages = pages

    def begin(self) -> None:
        """Check that all of the ranges are armed, and begin the log. GuestError if the guest armed less.

        This first scan takes about 12 ms a GiB; later ones 0.4 to 2.
        """
        for armed in self._ranges:
            length = armed.pages * PAGE_BYTES
            covered = self._scanned(linux.protect_armed, armed)
            if int((covered[:, 1] - covered[:, 0]).sum()) != length:
                raise GuestError(f"the guest armed less than the {length} bytes at {armed.address:#x}")

    async def harvest(self) -> PageBitmap:
        """``collect``, in one step: nothing else runs on the loop between the scan and its use."""
        return self.collect()

    def collect(self) -> PageBitmap:
        """Atomic get-and-clear (R3). GuestError if the guest died or disarmed meanwhile.

        A dead guest's pagemap scans as empty rather than failing, so the caller must know that the guest
        lives: the control channel's end says so first.
        """
        dirty = PageBitmap(self._pages)
        for armed in self._ranges:
            written = self._scanned(linux.harvest_written, armed)
            pages = (written - np.uint64(armed.address)) // np.uint64(PAGE_BYTES)
            dirty.add_runs(pages.astype(np.int64) + armed.first_page)
        return dirty

    def _scanned(
        self, scan: Callable[[int, int, int], NDArray[np.uint64]], armed: ArmedRange
    ) -> NDArray[np.uint64]:
        try:
            return scan(self._fd, armed.address, armed.pages * PAGE_BYTES)
        except OSError as error:
            raise GuestError(
                f"the dirty log is gone ({error.strerror}): the guest died or disarmed"
            ) from error
        except struct.error as error:
            raise GuestError(f"the guest armed an impossible address: {armed.address:#x}") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
