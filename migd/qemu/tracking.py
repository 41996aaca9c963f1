"""Tracking: how the writes of a QEMU are found, by what this kernel and that process allow.

In this order: the kernel's log of QEMU's own mapping, if it was started with the preload; soft-dirty marks,
for which the guest has to hold still; nothing, and then the daemon compares content. Each refusal says why,
and what would help.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from migd.errors import LiveUnsupported
from migd.guest.control import Log
from migd.qemu.inventory import Inventory
from migd.qemu.process import QemuProcess, RamMapping
from migd.ram.page import PAGE_BYTES
from migd.ram.soft_dirty import SoftDirty, supported

_PRELOAD = 'start QEMU with LD_PRELOAD="$(migd preload)"'


class Tracking:
    """Of one process with RAM in the files ``fds``, which stay the caller's."""

    def __init__(self, process: QemuProcess, fds: Sequence[int]) -> None:
        self._process = process
        self._fds = fds

    def mappings(self) -> list[RamMapping]:
        """Where QEMU has each block. GuestError if that is not how it has to be."""
        return [self._process.mapping_of(fd) for fd in self._fds]

    def described(self, found: Inventory) -> str:
        """For people: the log that would be used now, or why content would be compared."""
        try:
            return str(self.log(found))
        except LiveUnsupported as error:
            return f"compare: {error}"

    def log(self, found: Inventory) -> Log:
        """LiveUnsupported, and what would help, if there is none that finds every write."""
        if reason := found.untracked():
            raise LiveUnsupported(reason)
        if all(self._process.tracked(mapping) for mapping in self.mappings()):
            return Log.USERFAULTFD
        if not supported():
            raise LiveUnsupported(
                f"QEMU was started without the preload, and this kernel has no soft-dirty marks: {_PRELOAD}"
            )
        if obstacle := self.obstacle():
            raise LiveUnsupported(f"QEMU was started without the preload, and {obstacle}: {_PRELOAD}")
        return Log.SOFT_DIRTY

    def refuse_other_writers(self, friends: Collection[int]) -> None:
        """LiveUnsupported if a process may write to RAM past QEMU's mapping (W13), unless it is a friend."""
        for fd in self._fds:
            if others := self._process.other_writers(fd, but={os.getpid(), *friends}):
                told = ", ".join(f"{each.command.split(' ')[0]} (pid {each.pid})" for each in others)
                raise LiveUnsupported(f"others may write to the guest's RAM unseen: {told}")

    def marks(self) -> SoftDirty:
        """The caller's to close."""
        ranges = [(each.address, each.bytes // PAGE_BYTES) for each in self.mappings()]
        return SoftDirty(self._process.pid, ranges)

    def obstacle(self) -> str | None:
        """Why soft-dirty marks must not be believed, if so: swap may be turned on at any time."""
        marks = self.marks()
        try:
            return next((why for fd in self._fds if (why := marks.obstacle(fd))), None)
        finally:
            marks.close()
