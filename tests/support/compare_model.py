"""The model of tests/support/ledger_model.py with a log that compares content instead of seeing writes (R19).

Here bytes can come back: a page holds ZERO, A or B, and a write may store what was there before. So whatever
is a copy of a page - in a reader, in a stream, at the destination, the digest of what was last sent - is one
of these values, and nothing ages. Which bytes are A is a matter of names: every page that is not zero begins
with A.

A page that is skipped as free is nobody's until the guest is paused; then its bitmap decides. Until then the
invariant holds for such a page in a weaker sense: somebody will ask.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.ledger_model import Model
from tests.support.page_model import HARVESTED, ZERO, Page, Standing

A, B = 2, 4


class CompareModel(Model):
    """The dirty log is a digest of each page."""

    sees_writes = False
    contents = (("A to ", A), ("B to ", B))
    names = ((ZERO, "zeros"), (A, "A"), (B, "B"))

    # -- what a mutant replaces -------------------------------------------------------------------------

    def at_look(self, page: Page) -> int:
        """The digest after a comparison."""
        return page.digest

    def at_record(self, page: Page, copy: int) -> int:
        """A zero page is looked at as a zero page, and its digest is not."""
        return page.digest if copy == ZERO else copy

    def compared(self, standing: Standing) -> bool:
        """Whether the page's digest is compared; a zero page or a hole must be zero besides."""
        return bool(standing.ledger.sent)

    def differing(self, page: Page, standing: Standing) -> bool:
        """Whether a look at all of RAM would find the page now."""
        clear = standing.ledger.zero or standing.ledger.hole
        changed = self.compared(standing) and page.content != page.digest
        return changed or (bool(clear) and page.content != ZERO)

    # -- the log ------------------------------------------------------------------------------------------

    def initial_pages(self, touched: bool) -> Iterator[Page]:
        for page in super().initial_pages(touched):
            yield page._replace(content=ZERO if page.content == ZERO else A)

    def log(self, page: Page) -> Page:
        return page

    def aged(self, page: Page) -> Page:
        return page

    def look(self, page: Page, standing: Standing) -> Page:
        return page._replace(found=self.differing(page, standing), digest=self.at_look(page))

    def remembered(self, page: Page, standing: Standing) -> bool:
        """To send; differing, or still on its way, while one more look is to come; skipped or about to be,
        while the bitmap is to come."""
        ledger = standing.ledger
        if ledger.to_send or page.found:
            return True
        if standing.phase < HARVESTED and (self.differing(page, standing) or ledger.in_flight):
            return True
        return not ledger._settled and bool(ledger.skipped or ledger._freeing)
