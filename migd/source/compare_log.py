"""CompareLog: the dirty log where no kernel helps, by comparing RAM with what was last sent (R19).

It sees content, not writes: a page that was freed, hinted, and written again with the same bytes looks clean
to it. So it speaks only of pages that were sent, or that are known to be zero. Of a page skipped as free
nothing but the guest's own bitmap at the pause decides (W24): until then, skipping only puts off.
"""

from __future__ import annotations

from migd.ledger.ledger import Ledger
from migd.migration.ports import Clock
from migd.ram.bitmap import PageBitmap
from migd.source.sent_image import SentImage


class CompareLog:
    """See ``migd.migration.ports.DirtyLog``. The guest takes no part in it, and there is nothing to close."""

    name = "compare"
    sees_writes = False

    def __init__(self, image: SentImage, ledger: Ledger[PageBitmap], clock: Clock) -> None:
        """``image`` has keyed digests: no guest may be able to make one page look like another (R18)."""
        self._image = image
        self._ledger = ledger
        self._clock = clock
        self.cost_s = 0.0
        self._alike = PageBitmap(ledger.pages)
        self._held = PageBitmap(ledger.pages)

    async def harvest(self) -> PageBitmap:
        """Every page that differs from what was last sent: about 1 s of a processor for each GiB sent.

        There is no mark that could be cleared too late: a page stays dirty until it is sent again, from a
        private copy whose digest is what the next harvest compares with (R3, R8, W25). Pages to send, or
        skipped as free, have been sent nothing that could still be right: they are not looked at.
        """
        began = self._clock.now()
        ledger = self._ledger
        looked_at = ledger.sent | ledger.zero | ledger.hole
        differing = await self._image.differing(looked_at)
        self._alike, self._held = looked_at - differing, self._image.digests.held()
        self.cost_s = self._clock.now() - began
        return differing

    @property
    def alike(self) -> PageBitmap:
        """Pages that the last harvest found to be as the destination has them, and still has."""
        held = self._image.digests.held()
        return self._alike - (self._held - held) - (held - self._held)

    def close(self) -> None:
        pass
