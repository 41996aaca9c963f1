"""Tracking: how one attempt knows what was written; the log it uses, what it harvests, what it verifies.

A harvest is awaited, and the guest's hints arrive on the same loop meanwhile. That is right for either log,
whatever the order, since ``Ledger.harvest`` makes a dirty page one to send whatever set it is in by then:

- A hint that comes between a look at page p and the ledger's use of it skips p, or has p owe a FREE record;
  if p is dirty, the harvest undoes both. A hint that comes later is late by then (R4).
- What a comparison looks at (sent, zero, hole) no hint changes, only this session's own steps do; and it
  awaits the harvest before it takes the next one, be that a pick, a new epoch or the pause.
- What is written during a comparison, behind it, differs in the next one: there is no mark to lose. The last
  one looks at a paused guest.

``tests/ledger/test_ledger_model.py`` takes both halves of a harvest as steps of their own, in every order.
"""

from __future__ import annotations

import logging

from migd.errors import LiveUnsupported
from migd.migration.ports import DirtyLog
from migd.ram.bitmap import PageBitmap
from migd.ram.digest import KEY_BYTES
from migd.source.attempt import Attempt, DirtyLogChoice
from migd.source.compare_log import CompareLog
from migd.source.sent_image import SentImage

log = logging.getLogger(__name__)


class Tracking:
    """The dirty log of an attempt, once it is armed, and the image of what it sent."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._ledger = attempt.ledger
        self._log: DirtyLog | None = None
        self._free: PageBitmap | None = None
        self._image: SentImage | None = None
        self.missing = ""
        """Why no log sees writes, and what would help, if one was asked for and cannot be had."""

    async def arm(self) -> None:
        """R1: the log first. LiveUnsupported if the one that was asked for is not to be had here."""
        self._log = await self._armed_log()
        self._attempt.result.dirty_log = self._log.name

    async def _armed_log(self) -> DirtyLog:
        choice = self._attempt.options.dirty_log
        if choice is DirtyLogChoice.COMPARE:
            return self._compare_log()
        try:
            return await self._attempt.guest.arm()
        except LiveUnsupported as error:
            if choice is DirtyLogChoice.USERFAULTFD:
                raise LiveUnsupported(f"{error}; use --dirty-log compare, or --paused") from error
            log.warning("%s: %s; comparing content instead", self._attempt.migration, error)
            self.missing = str(error)
            return self._compare_log()

    def _compare_log(self) -> CompareLog:
        self._image = self._new_image(self._attempt.entropy.token(KEY_BYTES))
        return CompareLog(self._image, self._ledger, self._attempt.clock)

    def _new_image(self, key: bytes = b"") -> SentImage:
        attempt = self._attempt
        lanes = attempt.options.streams
        return SentImage(attempt.guest.ram, attempt.worker, lanes=lanes, key=key)

    @property
    def image(self) -> SentImage:
        """What was sent; with the digests that the log needs, once it is armed."""
        if self._image is None:
            self._image = self._new_image()
        return self._image

    @property
    def armed(self) -> bool:
        """False in a migration that is paused from the first byte on: nothing writes."""
        return self._log is not None

    @property
    def sees_writes(self) -> bool:
        """False for a log that compares content: its rules are others (R19)."""
        return self._log is None or self._log.sees_writes

    @property
    def cost_s(self) -> float:
        """See ``migd.migration.ports.DirtyLog``."""
        return self._log.cost_s if self._log is not None else 0.0

    async def harvest(self) -> int:
        """What was written since the last time is to send again; how many pages."""
        assert self._log is not None
        return self._ledger.harvest(await self._log.harvest())

    def paused(self, free: PageBitmap | None) -> None:
        """What the guest said at its pause: free pages, if it can tell (R14)."""
        self._free = free

    async def untracked(self) -> PageBitmap:
        """Pages of the paused guest that the destination does not have as they are: a write was missed.

        Or a bug left them behind, so it is not the ledger that says which pages count. Only what it skipped
        *and* the guest itself calls free may differ, and of that nothing may lie at the destination (R11).
        A guest that cannot tell was believed in its hints, and is here.
        """
        skipped = self._ledger.skipped if self._free is None else self._ledger.skipped & self._free
        pages = PageBitmap.full(self._ledger.pages) - skipped
        if isinstance(self._log, CompareLog):
            pages -= self._log.alike  # its final harvest, of the paused guest, has compared them
        return await self.image.differing(pages) | self.image.digests.held() & skipped

    def forget(self) -> None:
        """Let go of 16 bytes for each page sent."""
        self._image = self._free = None

    def close(self) -> bool:
        """Log no more; True if there was a log."""
        closing, self._log = self._log, None
        if closing is not None:
            closing.close()
        return closing is not None
