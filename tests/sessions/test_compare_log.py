"""Live migrations by the compare log, to the page: both sessions, and a guest that knows what it stored.

What a page holds at the destination is judged by that guest alone. ``Turns`` lets the script act between two
jobs of a comparison: what happens there happens while a harvest is under way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

from migd.host import ThreadWorker
from migd.ledger.ledger import Ledger
from migd.migration.convergence import Exhausted, Policy
from migd.migration.ports import HintSink
from migd.migration.state import SourceState
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from migd.source import sent_image
from migd.source.attempt import DirtyLogChoice, SourceOptions, Verify
from migd.source.tracking import Tracking
from tests.support.scripted_guest import PAGES, Act, Joined, ScriptedGuest, joined

S = SourceState
P = ParamSpec("P")
T = TypeVar("T")

COMPARE = SourceOptions(dirty_log=DirtyLogChoice.COMPARE)
COMPARED = "strict: ok (compare log)"


class Turns:
    """A worker, with the script's turn before the n-th job of comparing, from 1 on."""

    def __init__(self, worker: ThreadWorker, turns: dict[int, Act]) -> None:
        self._worker = worker
        self._turns = turns
        self.jobs = 0

    def close(self) -> None:
        self._worker.close()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if function.__name__ == sent_image.SentImage._differing_of.__name__:
            self.jobs += 1
            self._turns.get(self.jobs, lambda: None)()
        return await self._worker.run(function, *args, **kwargs)


def take_turns(sides: Joined, turns: dict[int, Act]) -> Turns:
    worker = Turns(sides.worker, turns)
    sides.worker = worker  # type: ignore[assignment]  # of the source's sessions from now on
    return worker


def assert_moved(sides: Joined) -> None:
    assert sides.session is not None
    result = sides.session.result
    assert (result.outcome, result.error) == ("completed", "")
    assert (result.dirty_log, result.verification) == ("compare", COMPARED)
    assert (result.wrong_pages, result.rescued_pages, result.late_dirty_pages) == (0, 0, 0)
    assert result.checked_pages == len(sides.arrived.knows) > 0
    assert sides.arrived.running


def answers(guest: ScriptedGuest) -> Callable[[int, HintSink], object]:
    return lambda epoch, sink: sink(epoch, guest.free_pages)


# -- which log it is ----------------------------------------------------------------------------------


async def test_a_guest_that_cannot_arm_moves_live_by_comparing(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    guest.can_arm = False
    guest.at_pause = lambda: guest.write(3, 4, 300)
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate()
        assert_moved(sides)
        assert guest.calls == ["arm", "pause", "release"]
        assert [iteration.live for iteration in result.iterations] == [True, False]
        assert [iteration.sent_pages for iteration in result.iterations] == [200, 3]


async def test_asked_for_the_kernels_log_such_a_guest_stays(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    guest.can_arm = False
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate(SourceOptions(dirty_log=DirtyLogChoice.USERFAULTFD))
        assert result.states[-3:] == [S.ARMING, S.ABORTING, S.FAILED]
        assert result.error == (
            "the kernel cannot track writes (the script says so); use --dirty-log compare, or --paused"
        )
        assert result.exit_code == 3
        assert guest.running
        again = await sides.migrate(SourceOptions(live=False), migration="a1" * 16)
        assert (again.outcome, again.dirty_log, again.wrong_pages) == ("completed", "none (paused)", 0)


async def test_asked_for_the_compare_log_no_guest_is_armed(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        await sides.migrate(COMPARE)
        assert_moved(sides)
        assert guest.calls == ["pause", "release"]


async def test_paused_from_the_first_byte_on_nothing_is_compared(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate(
            SourceOptions(live=False, dirty_log=DirtyLogChoice.COMPARE, verify=Verify.STRICT)
        )
        assert (result.dirty_log, result.verification) == ("none (paused)", "strict: ok")


@pytest.mark.parametrize("verify", Verify)
async def test_the_last_look_is_the_verification_whatever_was_asked_for(
    tmp_path: Path, verify: Verify
) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        turns = take_turns(sides, {})
        result = await sides.migrate(SourceOptions(dirty_log=DirtyLogChoice.COMPARE, verify=verify))
        assert_moved(sides)
        assert turns.jobs == 2  # behind the bulk stage, and in the pause
        assert result.downtime.verify_s == 0


# -- what it finds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3])
async def test_a_guest_that_writes_all_the_time(
    tmp_path: Path, streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracking, "cost_s", 0.0)  # else the policy sees that no iteration meets this limit
    guest = ScriptedGuest(owned=300)
    guest.free(*range(200, 300))
    guest.scripted_hints.on_request = answers(guest)
    guest.at_pause = lambda: guest.write(9)
    async with joined(guest, tmp_path) as sides:
        turns = {1: lambda: guest.write(3, 4, 5), 2: lambda: guest.write(3), 3: lambda: guest.write(7, 8)}
        take_turns(sides, turns)
        policy = Policy(downtime_limit_s=1e-9, max_iterations=3)
        result = await sides.migrate(
            SourceOptions(streams=streams, dirty_log=DirtyLogChoice.COMPARE, policy=policy)
        )
        assert_moved(sides)
        assert [iteration.live for iteration in result.iterations] == [True, True, True, False]
        assert [iteration.dirty_pages for iteration in result.iterations] == [3, 1, 2, 0]
        assert [iteration.sent_pages for iteration in result.iterations] == [200, 3, 1, 3]
        assert (result.skipped_free_pages, result.reclaimed_pages, result.hints) == (312, 0, "used")


async def test_a_write_that_no_kernel_logs_is_found(tmp_path: Path) -> None:
    """W13: pwrite through the descriptor; with the kernel's log a verification voids that attempt."""
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:

        def smuggle() -> None:
            guest.smuggle(17)  # sent
            guest.smuggle(500)  # a hole

        sides.at_source.at[S.PAUSING] = smuggle
        result = await sides.migrate(SourceOptions(hints=False, dirty_log=DirtyLogChoice.COMPARE))
        assert_moved(sides)
        assert (result.resent_pages, result.hole_pages) == (1, PAGES - 201)


async def test_the_same_bytes_are_no_write(tmp_path: Path) -> None:
    """Unlike the kernel's log: what is at the destination already need not go again."""
    guest = ScriptedGuest()
    guest.at_pause = lambda: [guest.touch(page) for page in range(100)]
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate(COMPARE)
        assert_moved(sides)
        assert result.resent_pages == 0


async def test_pages_that_become_zero_and_zero_pages_that_do_not_stay_so(tmp_path: Path) -> None:
    guest = ScriptedGuest()
    guest.clear(250)
    guest.clear(251)

    def change() -> None:
        guest.clear(5)
        guest.write(250)

    guest.at_pause = change
    async with joined(guest, tmp_path) as sides:
        await sides.migrate(SourceOptions(hints=False, dirty_log=DirtyLogChoice.COMPARE))
        assert_moved(sides)
        assert sides.arrived.page(5) == bytes(4096)


async def test_w25_bytes_that_come_back_after_others_were_sent(tmp_path: Path) -> None:
    """A at arming, B when it is read, A again: what counts is what was sent."""
    guest = ScriptedGuest()
    before = guest.content(7)
    async with joined(guest, tmp_path) as sides:
        sides.at_source.at[S.BULK] = lambda: guest.write(7)
        take_turns(sides, {1: lambda: guest.store(7, before)})
        result = await sides.migrate(COMPARE)
        assert_moved(sides)
        assert sides.arrived.page(7) == before
        assert result.resent_pages == 1


# -- hints --------------------------------------------------------------------------------------------


class BelievesTheLog(Ledger[PageBitmap]):
    """W24: what is skipped and was not found dirty is taken to be free."""

    def settle(self, free_at_pause: PageBitmap, *, trim: bool) -> int:
        return super().settle(free_at_pause | self.skipped, trim=trim)


@pytest.mark.parametrize("ledger", [Ledger, BelievesTheLog], ids=["right", "naive"])
async def test_w24_a_page_that_was_hinted_and_rewritten_with_the_same_bytes(
    tmp_path: Path, ledger: type[Ledger[PageBitmap]]
) -> None:
    """As a page cache does that reads a file again: nothing has changed, and zeros are at the destination.

    What a naive ledger leaves behind then, the guest's bitmap says to the verification.
    """
    guest = ScriptedGuest()
    guest.write(400)
    content = guest.content(400)
    guest.free(400)
    guest.scripted_hints.on_request = answers(guest)
    async with joined(guest, tmp_path) as sides:
        sides.ledger = ledger(PAGES, PageBitmap)
        take_turns(sides, {1: lambda: guest.store(400, content)})
        result = await sides.migrate(COMPARE)
        if ledger is Ledger:
            assert_moved(sides)
            assert result.reclaimed_pages == 1
        else:
            assert (result.exit_code, result.verification) == (5, "strict: 1 pages differ")
            assert result.states[-3:] == [S.SWITCHOVER, S.ABORTING, S.FAILED]
            assert guest.running


async def test_pages_that_were_sent_and_freed_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both got a FREE record. 10 was taken back before that, 11 after; each with the bytes it had, so that
    nothing but the bitmap says that zeros are wrong there."""
    monkeypatch.setattr(Tracking, "cost_s", 0.0)
    guest = ScriptedGuest()
    ten, eleven = guest.content(10), guest.content(11)

    def second_hint(epoch: int, sink: HintSink) -> None:
        if len(guest.scripted_hints.epochs) == 2:
            guest.free(10, 11)
            free = guest.free_pages
            guest.store(10, ten)
            sink(epoch, free)
        else:
            sink(epoch, guest.free_pages)

    guest.scripted_hints.on_request = second_hint
    async with joined(guest, tmp_path) as sides:
        take_turns(sides, {1: lambda: guest.write(20), 2: lambda: guest.store(11, eleven)})
        policy = Policy(downtime_limit_s=1e-9, max_iterations=2)
        result = await sides.migrate(SourceOptions(dirty_log=DirtyLogChoice.COMPARE, policy=policy))
        assert_moved(sides)
        assert (result.free_records, result.reclaimed_pages) == (2, 2)


async def test_a_hint_in_the_middle_of_a_harvest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is at page 64 when wrong hints for all of RAM come, and the guest writes."""
    monkeypatch.setattr(sent_image, "_SLICE_PAGES", 64)
    guest = ScriptedGuest()
    late: list[Callable[[], object]] = []
    everything = PageBitmap.full(PAGES)
    guest.scripted_hints.on_request = lambda epoch, sink: late.append(lambda: sink(epoch, everything))
    async with joined(guest, tmp_path) as sides:

        def meanwhile() -> None:
            guest.write(1, 100, 199)  # one behind the comparison, two before it
            late[0]()
            guest.write(2, 300)

        take_turns(sides, {2: meanwhile})
        result = await sides.migrate(SourceOptions(streams=1, dirty_log=DirtyLogChoice.COMPARE))
        assert_moved(sides)
        assert result.hints_applied == 0  # all were sent or holes; those sent were compared, and are not free


async def test_a_guest_without_a_bitmap_at_the_pause_is_not_asked_for_hints(tmp_path: Path) -> None:
    guest = ScriptedGuest(bitmap=False)
    guest.scripted_hints.on_request = answers(guest)
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate(COMPARE)
        assert_moved(sides)
        assert (guest.scripted_hints.epochs, result.skipped_free_pages) == ([], 0)
        assert result.hints == "not used: the compare log needs the guest's free pages at the pause"


async def test_a_guest_that_breaks_its_word_about_the_bitmap_stays(tmp_path: Path) -> None:
    guest = ScriptedGuest(bitmap=False)
    guest.reports_free_at_pause = True
    guest.scripted_hints.on_request = answers(guest)
    async with joined(guest, tmp_path) as sides:
        result = await sides.migrate(COMPARE)
        assert result.states[-3:] == [S.PAUSING, S.ABORTING, S.FAILED]
        assert "did not say which pages are free" in result.error
        assert guest.running


# -- ends ---------------------------------------------------------------------------------------------


async def test_a_cancel_in_the_middle_of_a_harvest(tmp_path: Path) -> None:
    guest = ScriptedGuest(contract=FreeContract.ZERO)
    async with joined(guest, tmp_path) as sides:

        def cancel() -> None:
            assert sides.session is not None
            assert sides.session.cancel()

        take_turns(sides, {1: cancel})
        result = await sides.migrate(COMPARE)
        assert (result.outcome, result.states[-3:]) == ("cancelled", [S.BULK, S.ABORTING, S.CANCELLED])
        assert guest.running
        guest.write(1, 2)
        await sides.migrate(COMPARE, migration="a1" * 16)
        assert_moved(sides)


@pytest.mark.parametrize("on_exhausted", Exhausted)
async def test_a_limit_that_comparing_alone_exceeds(tmp_path: Path, on_exhausted: Exhausted) -> None:
    """No iteration can help: forced at once, or given up with the reason."""
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        take_turns(sides, {1: lambda: guest.write(3)})
        policy = Policy(downtime_limit_s=1e-9, on_exhausted=on_exhausted)
        result = await sides.migrate(SourceOptions(dirty_log=DirtyLogChoice.COMPARE, policy=policy))
        if on_exhausted is Exhausted.FORCE:
            assert_moved(sides)
            assert [iteration.live for iteration in result.iterations] == [True, False]
        else:
            assert "comparing the paused guest's memory takes" in result.error
            assert result.states[-3:] == [S.BULK, S.ABORTING, S.FAILED]
            assert guest.running
