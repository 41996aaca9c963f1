"""Wrong versions of real classes, which the simulation has to notice."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

import migd.daemon.returns
from migd.destination.handover import HandOver as AtDestination
from migd.destination.loader import Loader
from migd.errors import GuestError, OutcomeUnknown
from migd.guest.hint_receiver import SocketHints
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.migration.decision import Paused
from migd.migration.journal import Mark, Record
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from migd.source.handover import DestinationAborted
from migd.source.handover import HandOver as AtSource
from migd.wire.framing import Frame
from migd.wire.messages import Started
from migd.wire.protocol import FrameType
from tests.simulation.faults import Fault, When
from tests.simulation.hints import Manners
from tests.simulation.life import WatchedJournal
from tests.simulation.registry import ExactLog
from tests.simulation.runner import Report, run_plan
from tests.simulation.scenario import Plan, draw_plan


@dataclass(frozen=True)
class WrongVersion:
    """``owner.name`` replaced by ``wrong``; the oracle then says ``notice``."""

    number: str
    """Of docs/safety.md's table."""
    bug: str
    owner: object
    name: str
    wrong: Callable[..., Any]
    notice: str
    faults: tuple[Fault, ...] = ()
    """Without which it is harmless."""

    def found(self, seeds: int) -> Report | None:
        """The first seed that notices, of so many."""
        with self._in_place():
            for seed in range(seeds):
                report = run_plan(seed, self._plan(seed))
                if any(self.notice in wrong for wrong in report.wrongs):
                    return report
        return None

    def _plan(self, seed: int) -> Plan:
        """Without verification: nothing but the rule that was broken stands in the way."""
        plan = draw_plan(random.Random(f"plan {seed}"), faults=False)
        options = msgspec.structs.replace(
            plan.options, verify="off", dirty_log="auto", hints=True, downtime_limit_ms=1.0, max_iterations=30
        )
        tempers = tuple(
            dataclasses.replace(temper, can_arm=True, steps=400, hints=Manners(slow=0.5), smuggles=False)
            for temper in plan.tempers
        )
        limits = Limits(hint_first_s=0.01)  # answers that are waited for come before a harvest
        contracts = tuple(contract or FreeContract.ANYTHING for contract in plan.contracts)
        return dataclasses.replace(
            plan, options=options, tempers=tempers, contracts=contracts, faults=self.faults, limits=limits
        )

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        right = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.wrong)
        try:
            yield
        finally:
            setattr(self.owner, self.name, right)


def _hint_whatever_was_written(ledger: Ledger[PageBitmap], epoch: int, free: PageBitmap) -> int:
    if epoch != ledger.open_epoch:
        return 0
    applied = ledger._apply_free(free)
    ledger.tally.hints_applied += applied
    return applied


def _outwards(channel: SocketHints, ranges: tuple[tuple[int, int], ...]) -> PageBitmap:
    free = PageBitmap(channel._pages)
    for start, length in ranges:
        free.add_run(start // PAGE_BYTES, min(-(-(start + length) // PAGE_BYTES), channel._pages))
    return free


async def _read_then_clear(log: ExactLog) -> PageBitmap:
    memory = log._memory
    if memory.log is None:
        raise GuestError("disarmed")
    found = sorted(memory.log)
    await asyncio.sleep(2e-3)
    memory.log = set()
    return PageBitmap.of(memory.pages, found)


_place = Loader.place


def _place_no_free(loader: Loader, frame: Frame) -> int:
    return frame.count * PAGE_BYTES if frame.type is FrameType.FREE else _place(loader, frame)


def _no_zero_records(ledger: Ledger[PageBitmap], zero: PageBitmap) -> PageBitmap:
    return PageBitmap(ledger.pages)


_ready = AtDestination.ready


async def _ready_and_start(handover: AtDestination) -> None:
    await _ready(handover)
    await handover._guest.start()


_go = AtSource.go


async def _go_or_resume(handover: AtSource) -> Started:
    try:
        return await _go(handover)
    except OutcomeUnknown as error:
        raise DestinationAborted("no answer for so long") from error


_append = WatchedJournal.append


def _append_but_started(journal: WatchedJournal, record: Record) -> None:
    if record.mark not in (Mark.STARTED, Mark.VERIFIED):
        _append(journal, record)


_RESCUED = "were rescued from a wrong skip"
"""The guest's bitmap at the pause is a second line of defence (R14): none of a right guest reaches it."""

WRONG_VERSIONS = (
    WrongVersion(
        "W02",
        "a hint counts although its page was harvested since the request",
        Ledger,
        "hint",
        _hint_whatever_was_written,
        _RESCUED,
    ),
    WrongVersion("W05", "ranges are rounded outwards", SocketHints, "_from_ranges", _outwards, _RESCUED),
    WrongVersion("W06", "a harvest reads, then clears", ExactLog, "harvest", _read_then_clear, "WRONG PAGE"),
    WrongVersion(
        "W09", "no ZERO record where content may lie", Ledger, "zero_records", _no_zero_records, "WRONG PAGE"
    ),
    WrongVersion("W14", "a FREE record is ignored", Loader, "place", _place_no_free, "WRONG PAGE"),
    WrongVersion(
        "H1",
        "the source resumes when nobody has answered GO for long",
        AtSource,
        "go",
        _go_or_resume,
        "TWO GUESTS",
        (Fault("lose_the_network", When(state="in starting")),),
    ),
    WrongVersion(
        "H2",
        "the destination starts at END",
        AtDestination,
        "ready",
        _ready_and_start,
        "TWO GUESTS",
        (Fault("reset_all", When(state="in loading", delay_s=2e-3)),),
    ),
    WrongVersion(
        "H4",
        "a restarted source resumes any paused guest",
        migd.daemon.returns,
        "paused_at_source",
        lambda _last: Paused.RESUME,
        "TWO GUESTS",
        (Fault("kill_both_daemons", When(state="in running")),),
    ),
    WrongVersion(
        "H5",
        "STARTED is not durable",
        WatchedJournal,
        "append",
        _append_but_started,
        "TWO GUESTS",
        (Fault("kill_both_daemons", When(state="in running")),),
    ),
)
