"""Ledgers with one mistake each, which the real one's checks do not find: its states add up all the same."""

from __future__ import annotations

from migd.ledger.ledger import Balance, Ledger
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from tests.support.scripted_guest import PAGES

VICTIM = 17
"""The page that is lost: owned by the guest from the beginning, and not zero."""


def only(page: int) -> PageBitmap:
    return PageBitmap.of(PAGES, [page])


class Books(Ledger[PageBitmap]):
    """The ledger, with or without the pause audit (R14), as every wrong one below."""

    audited = True

    def settle(self, free_at_pause: PageBitmap, *, trim: bool) -> int:
        believed = free_at_pause if self.audited else free_at_pause | self.skipped
        return super().settle(believed, trim=trim)


class SkipsWhatNobodyHinted(Books):
    """One page more than the hint names."""

    def hint(self, epoch: int, free: PageBitmap) -> int:
        return super().hint(epoch, free | only(VICTIM))


class BelievesLateHints(Books):
    """W02, W03: written and harvested since the request, or not."""

    def hint(self, epoch: int, free: PageBitmap) -> int:
        return self._apply_free(free) if epoch == self.open_epoch else 0


class TrimsTooMuch(Books):
    """One page more than the guest's bitmap names, of those left to send at the pause."""

    def settle(self, free_at_pause: PageBitmap, *, trim: bool) -> int:
        return super().settle(free_at_pause | only(VICTIM), trim=trim)


class SeesHolesInContent(Books):
    """A page with content counts as never touched."""

    def mark_holes(self, holes: PageBitmap) -> None:
        super().mark_holes(holes | only(VICTIM))


class SendsNoZeroRecords(Books):
    """W09: of a page that was sent, and is zero now."""

    def zero_records(self, zero: PageBitmap) -> PageBitmap:
        return PageBitmap(self.pages)


class FreesAPageInUse(Books):
    """A FREE record behind the content of a page in use, which goes on counting as sent."""

    def settle(self, free_at_pause: PageBitmap, *, trim: bool) -> int:
        rescued = super().settle(free_at_pause, trim=trim)
        self.free_pending |= only(VICTIM)
        return rescued

    def freed(self, free: PageBitmap) -> None:
        super().freed(free)
        self.skipped -= only(VICTIM)
        self.sent |= only(VICTIM)


class RemembersTheFirstAttempt(Books):
    """W20: the second attempt sends only what the first has not."""

    sent_before: PageBitmap | None = None

    def cancel(self) -> None:
        self.sent_before = self.sent
        super().cancel()

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        super().arm(contract, sees_writes=sees_writes)
        if self.sent_before is not None:
            self.to_send -= self.sent_before
            self.sent |= self.sent_before


class LosesCount(Books):
    """A picked page is in no set any more, and R17 is not looked at."""

    def pick(self, limit: int) -> PageBitmap:
        picked = super().pick(limit)
        self.in_flight -= only(VICTIM)
        return picked - only(VICTIM)

    def check(self) -> Balance:
        return self.balance()
