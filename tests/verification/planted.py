"""Bugs planted in the source daemon, each of which loses a page, and a migration with one of them in it.

The page is lost although every stream ends with matching counts and digests: the source itself believes that
it has sent what it should. The judge is the guest alone, which knows what it stored.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from migd.errors import GuestError
from migd.guest import hints
from migd.guest.hint_receiver import SocketHints
from migd.limits import Limits
from migd.migration.ports import HintSink
from migd.migration.state import SourceState
from migd.ram.bitmap import PageBitmap, PageIndices
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from migd.ram.dirty_log import KernelDirtyLog
from migd.source import batcher
from migd.source.batcher import Batch, Batcher
from tests.support.scripted_guest import PAGES, Joined, ScriptedGuest
from tests.verification.wrong_ledgers import (
    VICTIM,
    BelievesLateHints,
    Books,
    FreesAPageInUse,
    LosesCount,
    RemembersTheFirstAttempt,
    SeesHolesInContent,
    SendsNoZeroRecords,
    SkipsWhatNobodyHinted,
    TrimsTooMuch,
    only,
)

OWNED = 200
TAKEN = 400
"""A page that the guest takes into use during the migration."""


# -- wrong parts around it ----------------------------------------------------------------------------


class RoundsOutwards(SocketHints):
    """W05, over a real hint channel: its guest answers with a range that begins inside a page."""

    def __init__(self, pages: int) -> None:
        ours, self._theirs = socket.socketpair()
        super().__init__(ours, pages, Limits())
        hello = hints.Hello(FreeContract.ANYTHING, hints.Strength.STRONG, PAGE_BYTES, pages)
        self._theirs.send(hints.encode(hello))

    async def request(self, epoch: int, sink: HintSink) -> None:
        await super().request(epoch, sink)
        start = OWNED * PAGE_BYTES - 1  # the last byte of the last page in use
        free = hints.Ranges(epoch, ((start, PAGES * PAGE_BYTES - start),))
        self._theirs.send(hints.encode(free) + hints.encode(hints.End(epoch, PAGES - OWNED)))

    def _from_ranges(self, ranges: tuple[tuple[int, int], ...]) -> PageBitmap:
        runs = ((start // PAGE_BYTES, -(-(start + length) // PAGE_BYTES)) for start, length in ranges)
        return PageBitmap.from_runs(self._pages, runs)

    def close(self) -> None:
        super().close()
        self._theirs.close()


class LyingGuest(ScriptedGuest):
    """It goes on using a page that it calls free: its own check looks at it, its bitmap does not."""

    @property
    def free_pages(self) -> PageBitmap:
        return super().free_pages | only(VICTIM)


def looks_at_the_first_bytes(pages: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """A zero scan that gives up early."""
    is_zero: NDArray[np.bool_] = pages[:, :8].max(axis=1) == 0
    return is_zero


_collect = KernelDirtyLog.collect
_build = Batcher.build


def collects_all_but_one(log: KernelDirtyLog) -> PageBitmap:
    return _collect(log) - only(VICTIM)


def forgets_a_batch(packer: Batcher, indices: PageIndices, buffer: memoryview) -> Batch:
    """Built, and counted as sent, and never put into a stream."""
    batch = _build(packer, indices, buffer)
    return replace(batch, count=0) if VICTIM in indices else batch


# -- a migration with a bug in it ---------------------------------------------------------------------


@dataclass
class Scene:
    """Both sides, and what a bug may put in the place of their parts."""

    sides: Joined
    patch: pytest.MonkeyPatch

    @property
    def guest(self) -> ScriptedGuest:
        return self.sides.guest

    def answer_hints(self) -> None:
        """Honestly, and at once."""
        self.guest.scripted_hints.on_request = lambda epoch, sink: sink(epoch, self.guest.free_pages)


Plant = Callable[[Scene], Awaitable[None] | None]


@dataclass(frozen=True)
class Bug:
    """One way to lose a page; ``plant`` prepares the guest for it and exchanges what is no ledger."""

    name: str
    what: str
    plant: Plant
    ledger: type[Books] = Books
    guest: Callable[[], ScriptedGuest] = ScriptedGuest
    hints: bool = True
    wrong_pages: int = 1

    def __str__(self) -> str:
        return self.name


def _nothing_else(_scene: Scene) -> None:
    """The wrong ledger does it all."""


def _late_hint(scene: Scene) -> None:
    """Free when it was asked, written, harvested, and only then heard."""
    guest, held_back = scene.guest, list[Callable[[], object]]()

    def answer(epoch: int, sink: HintSink) -> None:
        held_back.append(lambda: sink(epoch, only(TAKEN)))
        guest.write(TAKEN)

    guest.scripted_hints.on_request = answer
    scene.sides.at_source.at[SourceState.PAUSING] = lambda: [say() for say in held_back]


def _outwards(scene: Scene) -> None:
    scene.guest.hints = RoundsOutwards(PAGES)


def _written_at_the_pause(scene: Scene) -> None:
    scene.answer_hints()
    scene.guest.at_pause = lambda: scene.guest.write(VICTIM)


def _cleared_at_the_pause(scene: Scene) -> None:
    scene.guest.at_pause = lambda: scene.guest.clear(VICTIM)


def _begins_with_zeros(scene: Scene) -> None:
    scene.guest.store(VICTIM, bytes(64) + scene.guest.content(VICTIM)[64:])
    scene.patch.setattr(batcher, "zero_pages", looks_at_the_first_bytes)


def _lost_mark(scene: Scene) -> None:
    _written_at_the_pause(scene)
    scene.patch.setattr(KernelDirtyLog, "collect", collects_all_but_one)


def _forgotten_batch(scene: Scene) -> None:
    scene.patch.setattr(Batcher, "build", forgets_a_batch)


async def _first_attempt(scene: Scene) -> None:
    """Sends everything, and ends at the pause."""

    def refuse() -> None:
        scene.guest.at_pause = lambda: None
        raise GuestError("not now")

    scene.guest.at_pause = refuse
    failed = await scene.sides.migrate(migration="a1" * 16)
    assert (failed.outcome, failed.sent_pages) == ("failed", OWNED)


def _without_bitmap() -> ScriptedGuest:
    return ScriptedGuest(bitmap=False)


BUGS = (
    Bug(
        "wrong skip", "the ledger skips a page that no hint named", Scene.answer_hints, SkipsWhatNobodyHinted
    ),
    Bug("outward rounding", "a hint that begins inside a page skips all of it (W05)", _outwards),
    Bug(
        "late hint",
        "a hint is applied after its page was harvested (W02, W03)",
        _late_hint,
        BelievesLateHints,
    ),
    Bug(
        "wrong trim",
        "the ledger skips a page at the pause that is in use",
        _written_at_the_pause,
        TrimsTooMuch,
    ),
    Bug(
        "wrong hole",
        "a page with content counts as never touched",
        _nothing_else,
        SeesHolesInContent,
        hints=False,
    ),
    Bug("wrong zero", "a page that begins with zeros counts as zero", _begins_with_zeros),
    Bug(
        "no ZERO record",
        "a sent page becomes zero, and nothing is sent (W09)",
        _cleared_at_the_pause,
        SendsNoZeroRecords,
    ),
    Bug(
        "stale FREE",
        "a FREE record goes out behind the content of a page in use",
        Scene.answer_hints,
        FreesAPageInUse,
    ),
    Bug("lost dirty bit", "the log forgets a page that was written", _lost_mark),
    Bug("unsent batch", "a batch counts as sent and is in no stream", _forgotten_batch, wrong_pages=OWNED),
    Bug(
        "unsent retry",
        "a second attempt sends only what the first has not (W20)",
        _first_attempt,
        RemembersTheFirstAttempt,
        wrong_pages=OWNED,
    ),
    Bug(
        "page in no set",
        "a page drops out of the books, and nobody adds them up (R17)",
        _nothing_else,
        LosesCount,
    ),
    Bug(
        "late hint, no bitmap",
        "as above, of a guest that cannot say which pages are free at its pause",
        _late_hint,
        BelievesLateHints,
        _without_bitmap,
    ),
    Bug(
        "lying guest",
        "the guest itself calls a page free that it uses, to the last",
        Scene.answer_hints,
        guest=LyingGuest,
    ),
)
