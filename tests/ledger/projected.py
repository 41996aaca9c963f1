"""ProjectedLedger: a ledger of many pages that keeps, for each of them, a ledger of that page alone.

Every call goes to all: of a set, each page's ledger is told whether its page is in it. If the two ever
differ, a page's fate depends on other pages, and what the exhaustive search finds for one page is worth less.
"""

from __future__ import annotations

from typing import Any

from migd.ledger.ledger import Ledger
from migd.ram.contract import FreeContract
from tests.support.int_pages import IntPages
from tests.support.world import indices

_NOT_COMPARED = {"pages", "_sets", "tally", "_cursor", "_free_cursor", "_alone"}
"""The cursors say where a pick begins to look: a matter of all pages."""


class ProjectedLedger(Ledger[Any]):
    """See the module. ``disagreement`` compares; the calls themselves only follow."""

    def __init__(self, pages: int, sets: Any, *, first_epoch: int = 1) -> None:
        self._alone = [Ledger(1, IntPages, first_epoch=first_epoch) for _ in range(pages)]
        super().__init__(pages, sets, first_epoch=first_epoch)

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        super().arm(contract, sees_writes=sees_writes)
        for one in self._alone:
            one.arm(contract, sees_writes=sees_writes)

    def cancel(self) -> None:
        super().cancel()
        for one in self._alone:
            one.cancel()

    def issue(self) -> int:
        epoch = super().issue()
        assert {one.issue() for one in self._alone} == {epoch}
        return epoch

    def distrust_hints(self) -> None:
        super().distrust_hints()
        for one in self._alone:
            one.distrust_hints()

    def barrier(self) -> None:
        super().barrier()
        for one in self._alone:
            one.barrier()

    def mark_holes(self, holes: Any) -> None:
        super().mark_holes(holes)
        self._each("mark_holes", holes)

    def hint(self, epoch: int, free: Any) -> int:
        applied = super().hint(epoch, free)
        each = [one.hint(epoch, _alone(free, page)) for page, one in enumerate(self._alone)]
        assert sum(each) == applied
        return applied

    def harvest(self, dirty: Any) -> int:
        count = super().harvest(dirty)
        self._each("harvest", dirty)
        return count

    def pick(self, limit: int) -> Any:
        return self._take("pick", super().pick(limit), limit)

    def pick_free(self, limit: int) -> Any:
        return self._take("pick_free", super().pick_free(limit), limit)

    def _take(self, method: str, picked: Any, limit: int) -> Any:
        for page, one in enumerate(self._alone):
            if page in picked:
                assert getattr(one, method)(1), f"page {page} alone would not be picked"
        if picked.count() < limit:
            overlooked = [p for p, one in enumerate(self._alone) if getattr(one, method)(1)]
            assert not overlooked, f"a {method} overlooks pages {overlooked}"
        return picked

    def sent_pages(self, data: Any) -> None:
        super().sent_pages(data)
        self._each("sent_pages", data)

    def zeroed(self, zero: Any) -> None:
        super().zeroed(zero)
        self._each("zeroed", zero)

    def freed(self, free: Any) -> None:
        super().freed(free)
        self._each("freed", free)

    def settle(self, free_at_pause: Any, *, trim: bool) -> int:
        count = super().settle(free_at_pause, trim=trim)
        assert (
            sum(one.settle(_alone(free_at_pause, p), trim=trim) for p, one in enumerate(self._alone)) == count
        )
        return count

    def close_epoch(self) -> None:
        super().close_epoch()
        for one in self._alone:
            one.close_epoch()

    def finish(self) -> None:
        super().finish()
        for one in self._alone:
            one.finish()

    def _each(self, method: str, pages: Any) -> None:
        for page, one in enumerate(self._alone):
            getattr(one, method)(_alone(pages, page))

    def disagreement(self) -> list[str]:
        """What this ledger says of a page, and the ledger of that page alone does not."""
        found = []
        for name, mine in vars(self).items():
            if name in _NOT_COMPARED:
                continue
            alone = [vars(one)[name] for one in self._alone]
            if isinstance(alone[0], IntPages):
                wrong = sorted(set(indices(mine)) ^ {page for page, one in enumerate(alone) if one.bits})
            else:
                wrong = [page for page, value in enumerate(alone) if value != mine]
            if wrong:
                found.append(f"{name} of pages {wrong}")
        return found


def _alone(pages: Any, page: int) -> IntPages:
    return IntPages(1, int(page in pages))
