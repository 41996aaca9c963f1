"""Wrong versions of the ledger and of the world around it: each a rule of docs/safety.md left out.

A class is one bug; the first line of its docstring names it. All else is the real class, or the model that
the real class is searched in. Mutants of the ledger take either kind of PageSet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from migd.guest.hint_receiver import SocketHints
from migd.ledger.ledger import Ledger
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from tests.proof.mutant import Death, Mutant
from tests.support.compare_model import CompareModel
from tests.support.hinted_bytes import HalfFreePages
from tests.support.ledger_model import Model, Session
from tests.support.page_model import HARVESTED, PAUSED, ZERO, Page, Standing
from tests.support.search import search

ANYTHING, INIT_ON_FREE = FreeContract.ANYTHING, FreeContract.ZERO

# -- of the ledger --------------------------------------------------------------------------------------


class RequestsBeforeArming(Ledger[Any]):
    """Hints are requested before arming."""

    def issue(self) -> int:
        self.armed, self.contract = True, ANYTHING
        return super().issue()

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        epoch = self.open_epoch
        super().arm(contract, sees_writes=sees_writes)
        self.open_epoch = epoch


class AppliesLateHints(Ledger[Any]):
    """A hint is applied whatever was harvested since it was asked for."""

    def hint(self, epoch: int, free: Any) -> int:
        self._dirty_since_issue = self._sets(self.pages)
        return super().hint(epoch, free)


class FinalHarvestDoesNotCount(Ledger[Any]):
    """A hint is applied that the final harvest has made late."""

    def final_harvest(self, dirty: Any) -> int:
        before = self._dirty_since_issue.copy()
        count = self.harvest(dirty)
        self._dirty_since_issue = before
        return count


class ReusesEpochs(Ledger[Any]):
    """Epoch numbers begin anew with each attempt."""

    def arm(self, contract: FreeContract, *, sees_writes: bool = True) -> None:
        super().arm(contract, sees_writes=sees_writes)
        self._next_epoch = 1


class NeverSendsZeroRecords(Ledger[Any]):
    """A page that became zero is skipped, though content of it was sent before."""

    def zero_records(self, zero: Any) -> Any:
        return self._sets(self.pages)


class PicksAPageTwiceInAnIteration(Ledger[Any]):
    """A page may be picked again, by any stream, before the barrier."""

    def harvest(self, dirty: Any) -> int:
        if not self.in_flight:
            self._picked = self._sets(self.pages)
        return super().harvest(dirty)


class FreesAheadOfTheBarrier(Ledger[Any]):
    """The FREE record of a page does not wait for the barrier behind its content."""

    def pick_free(self, limit: int) -> Any:
        picked, self._picked, self._free_cursor = self._picked, self.in_flight.copy(), 0
        freeing = super().pick_free(limit)
        self._picked |= picked
        return freeing


class OwesNoFreeRecords(Ledger[Any]):
    """A page that was sent and then freed is skipped, and no FREE record follows."""

    def hint(self, epoch: int, free: Any) -> int:
        applied = super().hint(epoch, free)
        self.free_pending = self._sets(self.pages)
        return applied


class RetriesWithWhatWasSent(Ledger[Any]):
    """A second attempt takes for sent what the first one sent."""

    def _begin(self) -> None:
        sent = getattr(self, "sent", self._sets(self.pages))
        super()._begin()
        self.sent |= sent
        self.to_send -= sent


class KeepsTheEpochOverARetry(Ledger[Any]):
    """Arming again leaves the epoch of a cancelled attempt open."""

    def _begin(self) -> None:
        epoch = getattr(self, "open_epoch", None)
        super()._begin()
        self.open_epoch = epoch


class SkipsWhatIsBeingRead(Ledger[Any]):
    """A page hinted while a sender reads it counts as skipped, and no FREE record follows."""

    def _apply_free(self, free: Any) -> int:
        flying = free & self.in_flight
        self.in_flight -= flying
        self.skipped |= flying
        return super()._apply_free(free - flying)

    def sent_pages(self, data: Any) -> None:
        super().sent_pages(data & self.in_flight)


class ForgetsFreeRecordsOfALiar(Ledger[Any]):
    """A FREE record on its way when the hints lose their credit stays the last word."""

    def distrust_hints(self) -> None:
        super().distrust_hints()
        self._doubted = self._sets(self.pages)


class TakesAnOldLookForHoles(Ledger[Any]):
    """A page harvested between the look for holes and its use counts as a hole."""

    def mark_holes(self, holes: Any) -> None:
        self._dirty_since_arming = self._sets(self.pages)
        super().mark_holes(holes)


class ForgetsAFreeRecordOnceDirty(Ledger[Any]):
    """A dirty page that owes a FREE record gets that, and not its content."""

    def harvest(self, dirty: Any) -> int:
        owed = dirty & self.free_pending
        count = super().harvest(dirty - owed)
        self._dirty_since_issue |= owed
        return count


class EndsWithoutTheBitmap(Ledger[Any]):
    """END is sent with skipped pages that only a comparing log vouches for."""

    def finish(self) -> None:
        self._settled = True
        super().finish()


class LooksForHolesAfterAComparison(Ledger[Any]):
    """A look for holes is used though a comparing log was harvested since."""

    def mark_holes(self, holes: Any) -> None:
        self._harvested = False
        super().mark_holes(holes)


# -- of the world around it -----------------------------------------------------------------------------


class HarvestsAtThePauseAsEver(Model):
    """Calls ``final_harvest`` of FinalHarvestDoesNotCount."""

    def harvested(self, session: Session, dirty: int) -> Session | None:
        if session.phase != PAUSED:
            return super().harvested(session, dirty)
        return self._with(session, "final_harvest", dirty, found=False, phase=HARVESTED)


class RoundsOutwards(SocketHints):
    """Ranges of free bytes are rounded outwards to whole pages."""

    def _from_ranges(self, ranges: tuple[tuple[int, int], ...]) -> PageBitmap:
        wider = []
        for start, length in ranges:
            first, stop = start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)
            wider.append((first * PAGE_BYTES, (stop - first) * PAGE_BYTES))
        return super()._from_ranges(tuple(wider))


class HintsAreRoundedOutwards(HalfFreePages):
    """Ranges of free bytes are rounded outwards to whole pages."""

    receiver = RoundsOutwards


class ReadsTheMarksThenClearsThem(Model):
    """A harvest reads the marks, and clears them later."""

    def look(self, page: Page, standing: Standing) -> Page:
        return page._replace(found=page.logged)

    def told(self, page: Page) -> Page:
        return page._replace(found=False, logged=False)


class ClearsTheMarkAfterTheRead(Model):
    """A page's mark is cleared after the page was read."""

    def after_record(self, page: Page) -> Page:
        return page._replace(logged=False)


class HintClearsTheDirtyLog(Model):
    """A hint clears the dirty log, too."""

    def after_hint(self, page: Page, applied: bool) -> Page:
        return page._replace(logged=False)


class ResumesWithAStreamStillFull(Model):
    """The guest is resumed with a stream still full."""

    def arrived(self, page: Page) -> int:
        return page.before | page.streams[0] | page.streams[1]


class DoesNotWaitAtTheBarrier(Model):
    """A stream may be an iteration behind the others."""

    def behind_barrier(self, page: Page) -> Page:
        return page._replace(streams=(0, 0), before=page.before | page.streams[0] | page.streams[1])


class WritesBesideTheLog(Model):
    """A writer that the dirty log does not see: pwrite, a second mapping, DMA."""

    def log(self, page: Page) -> Page:
        return page


class DestinationIsNotZero(Model):
    """The destination's memory is another tenant's."""

    def fresh(self) -> int:
        return 2


class DiscardsSourceMemory(Model):
    """A hint discards the page at the source."""

    def after_hint(self, page: Page, applied: bool) -> Page:
        return self.aged(page)._replace(content=ZERO, intact=not page.allocated) if applied else page


class GuestRunsOnAfterThePause(Model):
    """The pause is not acknowledged: the guest still writes."""

    def guest_runs(self, phase: int) -> bool:
        return phase <= HARVESTED


class GuestAnswersFromAnOldList(Model):
    """The guest answers from a list that it took before it was asked."""

    def listed(self, page: Page) -> bool:
        return not page.allocated

    def hinted(self, page: Page) -> bool:
        return page.listed


# -- of a log that compares -----------------------------------------------------------------------------


class TrustsTheLogForWhatWasNeverSent(CompareModel):
    """A comparing log is trusted for a page that was hinted and never sent."""

    sees_writes = True

    def at_arming(self, page: Page) -> int:
        return page.content

    def compared(self, standing: Standing) -> bool:
        return super().compared(standing) or bool(standing.ledger.skipped)

    def harvested(self, session: Session, dirty: int) -> Session | None:
        after = super().harvested(session, dirty)
        last = after is not None and after.phase == HARVESTED
        return self._with(after, "close_epoch") if after is not None and last else after

    def settled(self, session: Session, free: int) -> Session | None:
        return None  # it asks for no bitmap


class ComparesWithTheLastHarvest(CompareModel):
    """A comparing log compares with what it saw at its last harvest."""

    def at_arming(self, page: Page) -> int:
        return page.content

    def at_look(self, page: Page) -> int:
        return page.content

    def at_record(self, page: Page, copy: int) -> int:
        return page.digest


class DigestsMemoryAndNotTheCopy(CompareModel):
    """A comparing log takes the digest of memory, not of the copy that was sent."""

    def at_record(self, page: Page, copy: int) -> int:
        return page.content


class ForgetsHoles(CompareModel):
    """A comparing log does not look at holes."""

    def differing(self, page: Page, standing: Standing) -> bool:
        return super().differing(page, standing) and not standing.ledger.hole


class ForgetsZeroPages(CompareModel):
    """A comparing log does not look at pages that were zero."""

    def differing(self, page: Page, standing: Standing) -> bool:
        return super().differing(page, standing) and not standing.ledger.zero


class LooksBeforeThePause(CompareModel):
    """The last look of a comparing log is not one at a paused guest."""

    def guest_runs(self, phase: int) -> bool:
        return phase <= HARVESTED


# -- all of them ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A wrong version, what is right instead, and the bounds that are enough to tell them apart."""

    number: str
    wrong: type[Any]
    bounds: Mapping[str, Any] = field(default_factory=dict)
    model: type[Model] = Model
    """What a wrong ledger runs in; of a wrong world, what it runs against."""
    right: type[Model] | None = None
    """The control, if it is not ``model``."""

    @property
    def is_ledger(self) -> bool:
        return issubclass(self.wrong, Ledger)

    @property
    def name(self) -> str:
        return f"{self.number} {self.wrong.__name__}"

    @property
    def test(self) -> str:
        kind = "ledger" if self.is_ledger else "world"
        return f"tests/ledger/test_mutants.py::test_a_{kind}_that_breaks_a_rule_loses_a_page[{self.name}]"

    @property
    def bug(self) -> str:
        return (self.wrong.__doc__ or "").partition("\n")[0].rstrip(".")

    def kill(self) -> Death:
        """Search the wrong version for a lost page."""
        return (
            _death(self.model, self.wrong, self.bounds)
            if self.is_ledger
            else _death(self.wrong, Ledger, self.bounds)
        )

    def control(self) -> Death:
        """The same search of the right version."""
        return _death(self.right or self.model, Ledger, self.bounds)


def _death(model: type[Model], ledger: type[Ledger[Any]], bounds: Mapping[str, Any]) -> Death:
    found = search(model(ledger, **{"pages": 1, "epochs": 1, **bounds}), max_states=200_000)
    return Death(found.reason, tuple(found.trace))


NO_HINTS = {"epochs": 0}
RETRY = {"cancels": 1}

TRIALS = [
    Trial("W01", RequestsBeforeArming),
    Trial("W02", AppliesLateHints),
    Trial("W03", FinalHarvestDoesNotCount, model=HarvestsAtThePauseAsEver, right=Model),
    Trial("W04", ReusesEpochs, RETRY),
    Trial("W05", HintsAreRoundedOutwards, model=HalfFreePages),
    Trial("W06", ReadsTheMarksThenClearsThem, {**NO_HINTS, "awaits": True}),
    Trial("W07", ClearsTheMarkAfterTheRead, NO_HINTS),
    Trial("W08", HintClearsTheDirtyLog),
    Trial("W09", NeverSendsZeroRecords),
    Trial("W10", PicksAPageTwiceInAnIteration),
    Trial("W11", ResumesWithAStreamStillFull, NO_HINTS),
    Trial("W12", FreesAheadOfTheBarrier),
    Trial("W13", WritesBesideTheLog, NO_HINTS),
    Trial("W14", OwesNoFreeRecords, {"contract": INIT_ON_FREE}),
    Trial("W15", DestinationIsNotZero),
    Trial("W16", DiscardsSourceMemory),
    Trial("W17", GuestRunsOnAfterThePause, NO_HINTS),
    Trial("W20", RetriesWithWhatWasSent, RETRY),
    Trial("W21", KeepsTheEpochOverARetry, RETRY),
    Trial("W22", SkipsWhatIsBeingRead),
    Trial("W23", GuestAnswersFromAnOldList),
    Trial("W24", TrustsTheLogForWhatWasNeverSent, model=CompareModel),
    Trial("W25", ComparesWithTheLastHarvest, NO_HINTS, model=CompareModel),
    Trial("W25", DigestsMemoryAndNotTheCopy, NO_HINTS, model=CompareModel),
    Trial("R7", ForgetsFreeRecordsOfALiar, {"liar": True}),
    Trial("R9", DoesNotWaitAtTheBarrier, NO_HINTS),
    Trial("R11", ForgetsAFreeRecordOnceDirty),
    Trial("R13", LooksBeforeThePause, NO_HINTS, model=CompareModel),
    Trial("R19", EndsWithoutTheBitmap, model=CompareModel),
    Trial("R19", ForgetsHoles, {**NO_HINTS, "holes": True}, model=CompareModel),
    Trial("R19", ForgetsZeroPages, NO_HINTS, model=CompareModel),
    Trial("R20", TakesAnOldLookForHoles, {"holes": True}),
    Trial("R20", LooksForHolesAfterAComparison, {**NO_HINTS, "holes": True}, model=CompareModel),
]

MUTANTS = [
    Mutant(trial.number, trial.wrong.__name__, trial.bug, trial.test, partial(Trial.kill, trial))
    for trial in TRIALS
]
