"""GuestLog: the dirty log that a guest keeps itself, and hands over when it is asked."""

from __future__ import annotations

import time

from migd.errors import GuestError
from migd.guest import control
from migd.guest.control import Log
from migd.guest.link import GuestLink
from migd.ram.bitmap import PageBitmap


class GuestLog:
    """See ``migd.migration.ports.DirtyLog``. What the guest does is atomic for its writers (R3)."""

    sees_writes = True

    def __init__(self, link: GuestLink, log: Log, pages: int, timeout_s: float) -> None:
        self.name = str(log)
        self.cost_s = 0.0
        self._link = link
        self._pages = pages
        self._timeout_s = timeout_s

    async def harvest(self) -> PageBitmap:
        """Written since the last time. GuestError if the guest does not say."""
        began = time.monotonic()
        _, fds = await self._link.ask(control.Harvest(), control.Harvested, self._timeout_s)
        try:
            bits = control.blob_bytes(fds[0]) if len(fds) == 1 else b""
        except OSError as error:
            raise GuestError(f"the guest's dirty log cannot be read: {error.strerror}") from error
        finally:
            control.close_all(fds)
        if len(bits) != -(-self._pages // 8):
            raise GuestError(f"the guest's dirty log has {len(bits)} bytes for {self._pages} pages")
        self.cost_s = time.monotonic() - began
        return PageBitmap.from_bytes(bits, self._pages)

    def close(self) -> None:
        """Nothing is held; DISARM tells the guest."""
