"""StaticDirtyLog: the dirty log of RAM that its guest never writes, such as an image served in place.

It is always empty, and that is sound as far as the guest goes: it handed over a descriptor that cannot be
written through. Of anybody else who writes the file it knows nothing, since no mapping of the guest's shows
it; the tracking verification finds that after the pause.
"""

from __future__ import annotations

from migd.ram.bitmap import PageBitmap


class StaticDirtyLog:
    """See ``migd.migration.ports.DirtyLog``."""

    name = "none (image)"
    sees_writes = True
    """There are none of the guest's to see."""
    cost_s = 0.0

    def __init__(self, pages: int) -> None:
        self._pages = pages

    async def harvest(self) -> PageBitmap:
        """No page."""
        return PageBitmap(self._pages)

    def close(self) -> None:
        """Nothing is held."""
