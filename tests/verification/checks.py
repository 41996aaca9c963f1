"""Which check finds which planted bug: each migration run with one bug and one check, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from migd.migration.state import DestinationState, SourceState
from migd.ram.bitmap import PageBitmap
from migd.source.attempt import DirtyLogChoice, SourceOptions, Verify
from tests.support.scripted_guest import PAGES, Joined, joined
from tests.verification.planted import Bug, Scene


class Check(StrEnum):
    """One line of defence by itself; that of the transport stands in all of them."""

    TRANSPORT = "transport digests alone"
    AUDIT = "pause audit (R14)"
    STRICT = "tracking, strict"
    LATE = "tracking, late"
    COMPARE = "compare log"


class Found(StrEnum):
    """What became of the page, and of the guest."""

    MISSED = "missed"
    """The guest runs at the destination without it, and everybody is content."""
    SENT = "sent after all"
    STAYED = "found before GO"
    """The guest runs on at the source."""
    HELD = "found after the start"
    """The guest is paused at the destination, and the source keeps its memory."""
    HARMLESS = "harmless"
    """Nothing that is in use here goes wrong by it."""


_VERIFY = {Check.STRICT: Verify.STRICT, Check.LATE: Verify.LATE}

_NOWHERE = dict.fromkeys(Check, Found.MISSED)
_BY_TRACKING = {**_NOWHERE, Check.STRICT: Found.STAYED, Check.LATE: Found.HELD, Check.COMPARE: Found.STAYED}
_BY_BOTH = {**_BY_TRACKING, Check.AUDIT: Found.SENT}
_OF_NO_CONCERN = {Check.COMPARE: Found.HARMLESS}  # what the bug falsifies is not what this log goes by

EXPECTED: dict[str, dict[Check, Found]] = {
    "wrong skip": _BY_BOTH,
    "outward rounding": _BY_BOTH,
    "late hint": {**_BY_BOTH, **_OF_NO_CONCERN},
    "wrong trim": _BY_TRACKING,
    "wrong hole": {**_BY_TRACKING, **_OF_NO_CONCERN},
    "wrong zero": _BY_TRACKING,
    "no ZERO record": _BY_TRACKING,
    "stale FREE": _BY_TRACKING,
    "lost dirty bit": {**_BY_TRACKING, **_OF_NO_CONCERN},
    "unsent batch": _BY_TRACKING,
    "unsent retry": {**_BY_TRACKING, **_OF_NO_CONCERN},
    "page in no set": _BY_TRACKING,
    "late hint, no bitmap": {**_NOWHERE, **_OF_NO_CONCERN},
    "lying guest": _NOWHERE,
}
"""Only the guest knows which pages it uses: where it cannot say so, or lies to the last, its own check on
arrival is what is left."""


@dataclass(frozen=True)
class Outcome:
    """``wrong_pages``: of the guest that arrived, by its own knowledge; None where none was started."""

    found: Found
    wrong_pages: int | None
    verification: str


async def outcome_of(bug: Bug, check: Check, directory: Path, patch: pytest.MonkeyPatch) -> Outcome:
    """Migrate a guest, with a bug in the source and this check."""
    async with joined(bug.guest(), directory) as sides:
        sides.ledger = books = bug.ledger(PAGES, PageBitmap)
        books.audited = check is Check.AUDIT
        planted = bug.plant(Scene(sides, patch))
        if planted is not None:
            await planted
        dirty_log = DirtyLogChoice.COMPARE if check is Check.COMPARE else DirtyLogChoice.USERFAULTFD
        verify = _VERIFY.get(check, Verify.OFF)
        await sides.migrate(SourceOptions(hints=bug.hints, verify=verify, dirty_log=dirty_log))
        return await _judged(sides)


async def _judged(sides: Joined) -> Outcome:
    assert sides.session is not None
    result = sides.session.result
    if result.states[-2:] == [SourceState.ABORTING, SourceState.FAILED]:
        assert "pages changed untracked" in result.error
        assert sides.guest.running
        assert sides.arrival.state is DestinationState.ABORTED
        return Outcome(Found.STAYED, None, result.verification)
    wrong_pages = (await sides.arrived.self_check()).wrong
    if result.states[-1] == SourceState.FAILED:
        assert not sides.guest.running
        assert sides.arrived.calls[-1] == "pause"
        return Outcome(Found.HELD, wrong_pages, result.verification)
    # All streams ended with matching counts and digests, and the guest was released.
    assert result.outcome == "completed"
    assert sides.arrival.state is DestinationState.COMPLETED
    if wrong_pages:
        return Outcome(Found.MISSED, wrong_pages, result.verification)
    found = Found.SENT if result.rescued_pages or result.reclaimed_pages else Found.HARMLESS
    return Outcome(found, 0, result.verification)
