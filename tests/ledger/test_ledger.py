"""The rules of docs/safety.md that the ledger carries, one named test each; and what each naive ledger loses.

"Loses" is decided by tests/support/world.py from the guest's memory and the destination's, never from the
ledger. Every race is told once, as a function of a World, and run against the real Ledger and a naive one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migd.errors import LedgerError
from migd.ledger.ledger import Balance, Ledger
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from tests.ledger.mutants import (
    AppliesLateHints,
    ForgetsFreeRecordsOfALiar,
    FreesAheadOfTheBarrier,
    KeepsTheEpochOverARetry,
    NeverSendsZeroRecords,
    OwesNoFreeRecords,
    PicksAPageTwiceInAnIteration,
    RetriesWithWhatWasSent,
    ReusesEpochs,
    SkipsWhatIsBeingRead,
    TakesAnOldLookForHoles,
)
from tests.support.int_pages import IntPages
from tests.support.world import BARRIER, CompareWorld, World

ANYTHING, ZERO, NONE = FreeContract.ANYTHING, FreeContract.ZERO, FreeContract.NONE
Pages = PageBitmap


def pages(bitmap: Any) -> list[int]:
    return bitmap.indices().tolist() if isinstance(bitmap, PageBitmap) else list(bitmap)


def armed(count: int = 8, contract: FreeContract = ANYTHING) -> Ledger[Pages]:
    ledger = Ledger(count, PageBitmap)
    ledger.arm(contract)
    return ledger


def of(*indices: int) -> Pages:
    return PageBitmap.of(8, indices)


def send_all(ledger: Ledger[Pages]) -> None:
    while picked := ledger.pick(3):
        ledger.sent_pages(picked)
    ledger.barrier()


# -- the race, told against the real ledger and naive ones ----------------------------------------------


class FinalHarvestDoesNotCount(Ledger[Pages]):
    """W03: as if the last harvest were none of R4's business."""

    def harvest(self, dirty: Pages) -> int:
        before = self._dirty_since_issue.copy()
        count = super().harvest(dirty)
        self._dirty_since_issue = before
        return count


class RescuesNothing(Ledger[Pages]):
    """R14 left out."""

    def settle(self, free_at_pause: Pages, *, trim: bool) -> int:
        self.close_epoch()
        return 0


def page_reused_between_its_hint_and_the_daemon(world: World) -> set[int]:
    """Page 1 is free, is hinted, is allocated and written, is harvested - and then the hint is applied.

    Without R14's bitmap, as with a Linux guest: it would rescue the page even from a naive ledger.
    """
    world.arm()
    world.request()
    answer = world.answer()
    world.write(1)
    world.harvest()
    world.hint(answer)
    world.iterate()
    return world.finish(bitmap=False)


def page_reused_and_the_hint_comes_after_the_final_harvest(world: World) -> set[int]:
    world.arm()
    world.request()
    answer = world.answer()
    world.write(1)
    world.harvest()  # the guest is paused: this was the final one
    world.hint(answer)
    return world.finish(bitmap=False)


def page_reused_after_the_hint_was_applied(world: World) -> set[int]:
    """The harmless order: skipping may be late, the dirty log still has the page."""
    world.arm()
    world.request()
    world.hint(world.answer())
    world.write(1)
    return world.finish(bitmap=False)


def page_reused_and_an_old_answer_meets_the_second_attempt(world: World) -> set[int]:
    world.arm()
    world.request()
    answer = world.answer()
    world.cancel()
    world.write(1)  # nobody logs this
    world.arm()
    world.request()
    world.hint(answer)
    return world.finish(bitmap=False)


def page_reused_and_an_old_answer_meets_a_second_attempt_that_asked_nothing(world: World) -> set[int]:
    world.arm()
    world.request()
    answer = world.answer()
    world.cancel()
    world.write(1)
    world.arm()
    world.hint(answer)
    return world.finish(bitmap=False)


def page_freed_while_a_sender_reads_it(world: World) -> set[int]:
    """The torn copy must not be the last word about a page that counts as skipped (R11)."""
    world.write(1)
    world.arm()
    batch = world.read(world.pick(0, 2))
    world.free(1)
    world.request()
    world.hint(world.answer())
    world.push(batch)
    world.iterate()
    lost = world.finish(bitmap=False)
    return lost | world.stale()


def page_sent_then_freed_by_a_guest_that_counts_on_zeros(world: World) -> set[int]:
    world.write(1)
    world.arm()
    world.iterate()
    world.free(1)
    world.harvest()
    world.request()
    world.hint(world.answer())
    return world.finish(bitmap=False)


def free_record_overtakes_the_content(world: World) -> set[int]:
    """The content goes over stream 0, the FREE over stream 1, and stream 1 is faster."""
    world.write(1)
    world.arm()
    batch = world.read(world.pick(0))
    world.push(batch)
    world.free(1)
    world.request()
    world.hint(world.answer())
    early = world.pick_free(1)
    if early.pages:
        world.push(world.read(early))
    world.drain(first=1)
    world.barrier()
    lost = world.finish(bitmap=False)
    return lost | world.stale()


def page_zeroed_after_it_was_sent(world: World) -> set[int]:
    world.arm()
    world.iterate()
    world.write(0, content=0)
    world.harvest()
    return world.finish()


def page_written_between_two_attempts(world: World) -> set[int]:
    world.arm()
    world.iterate()
    world.cancel()
    world.write(0)
    world.arm()
    return world.finish()


def page_sent_twice_in_an_iteration(world: World) -> set[int]:
    """Both copies are under way at once, and the older one is slower."""
    world.arm()
    world.push(world.read(world.pick(0)))
    world.write(0)
    world.harvest()
    world.push(world.read(world.pick(1)))
    world.drain(first=1)
    world.barrier()
    return world.finish()


def page_hinted_by_mistake(world: World) -> set[int]:
    """The guest owns page 0 all the time; R14's bitmap knows better than the hint."""
    world.arm()
    epoch = world.request()
    world.hint((epoch, world.set(0)))
    world.iterate()
    return world.finish()


def hints_distrusted_while_a_free_record_is_on_its_way(world: World) -> set[int]:
    """The guest hints page 0, which it owns; the FREE is being sent when its lies are noticed."""
    world.arm()
    world.iterate()
    epoch = world.request()
    world.hint((epoch, world.set(0)))
    batch = world.read(world.pick_free(0))
    world.ledger.distrust_hints()
    world.push(batch)
    world.barrier()
    return world.finish(bitmap=False)


def page_written_between_the_look_for_holes_and_its_use(world: World) -> set[int]:
    """Nothing was touched when the daemon looked; page 2 was, and was harvested, when it used what it saw."""
    world.source = [0] * world.pages
    world.arm()
    untouched = world.ledger.to_send.copy()
    world.write(2)
    world.harvest()
    world.ledger.mark_holes(untouched)
    return world.finish()


Race = Callable[[World], set[int]]
RACES: list[tuple[Race, type[Ledger[Pages]], FreeContract]] = [
    (page_reused_between_its_hint_and_the_daemon, AppliesLateHints, ANYTHING),
    (page_reused_between_its_hint_and_the_daemon, AppliesLateHints, ZERO),
    (page_reused_and_the_hint_comes_after_the_final_harvest, FinalHarvestDoesNotCount, ANYTHING),
    (page_reused_and_an_old_answer_meets_the_second_attempt, ReusesEpochs, ANYTHING),
    (
        page_reused_and_an_old_answer_meets_a_second_attempt_that_asked_nothing,
        KeepsTheEpochOverARetry,
        ANYTHING,
    ),
    (page_freed_while_a_sender_reads_it, SkipsWhatIsBeingRead, ANYTHING),
    (page_sent_then_freed_by_a_guest_that_counts_on_zeros, OwesNoFreeRecords, ZERO),
    (free_record_overtakes_the_content, FreesAheadOfTheBarrier, ANYTHING),
    (page_zeroed_after_it_was_sent, NeverSendsZeroRecords, ANYTHING),
    (page_written_between_two_attempts, RetriesWithWhatWasSent, ANYTHING),
    (page_hinted_by_mistake, RescuesNothing, ANYTHING),
    (hints_distrusted_while_a_free_record_is_on_its_way, ForgetsFreeRecordsOfALiar, ANYTHING),
    (page_written_between_the_look_for_holes_and_its_use, TakesAnOldLookForHoles, ANYTHING),
]


@pytest.mark.parametrize(
    ("race", "naive", "contract"),
    RACES,
    ids=[f"{race.__name__}-{naive.__name__}-{c.name}" for race, naive, c in RACES],
)
def test_a_race_loses_no_page_and_a_naive_ledger_loses_one(
    race: Race, naive: type[Ledger[Pages]], contract: FreeContract
) -> None:
    assert race(World(contract=contract, free={1})) == set()
    assert race(World(naive, contract=contract, free={1})) != set()


def test_a_guest_that_reuses_a_page_between_its_hint_and_the_daemon_loses_nothing() -> None:
    """The race that shipped implementations argue about, with its figures."""
    world = World(free={1})
    assert page_reused_between_its_hint_and_the_daemon(world) == set()
    assert world.destination[1] == world.source[1]
    assert (world.ledger.tally.hints_late, world.ledger.tally.hints_applied) == (1, 0)
    naive = World(AppliesLateHints, free={1})
    assert page_reused_between_its_hint_and_the_daemon(naive) == {1}


def test_r14_the_guests_bitmap_at_pause_rescues_the_page_even_from_a_naive_ledger_and_says_so() -> None:
    naive = World(AppliesLateHints, free={1})
    naive.arm()
    naive.request()
    answer = naive.answer()
    naive.write(1)
    naive.harvest()
    naive.hint(answer)
    assert naive.finish(bitmap=True) == set()
    assert naive.ledger.tally.rescued == 1


def test_a_page_reused_after_its_hint_was_applied_is_sent_because_the_log_has_it() -> None:
    world = World(free={1})
    assert page_reused_after_the_hint_was_applied(world) == set()
    assert (world.ledger.tally.hints_late, world.ledger.tally.hints_applied) == (0, 1)


def test_r9_two_copies_of_a_page_are_never_under_way_at_once() -> None:
    with pytest.raises(LedgerError, match="R9"):
        page_sent_twice_in_an_iteration(World())
    assert page_sent_twice_in_an_iteration(World(PicksAPageTwiceInAnIteration)) == {0}


# -- the rules, one by one ------------------------------------------------------------------------------


def test_r1_no_hint_is_asked_for_before_arming_or_after_a_cancel() -> None:
    ledger = Ledger(8, PageBitmap)
    with pytest.raises(LedgerError, match="R1"):
        ledger.issue()
    ledger.arm(ANYTHING)
    epoch = ledger.issue()
    ledger.cancel()
    with pytest.raises(LedgerError, match="R1"):
        ledger.issue()
    assert ledger.hint(epoch, of(1)) == 0


def test_r1_arming_again_voids_older_epochs() -> None:
    ledger = armed()
    epoch = ledger.issue()
    ledger.arm(ANYTHING)
    assert ledger.hint(epoch, of(1, 2)) == 0
    assert ledger.tally.hints_stale == 2


def test_r2_every_attempt_begins_with_all_pages_to_send() -> None:
    ledger = armed()
    for _ in range(3):
        assert ledger.to_send == PageBitmap.full(8)
        ledger.hint(ledger.issue(), of(7))
        send_all(ledger)
        ledger.arm(ANYTHING)


def test_r4_a_page_harvested_since_the_request_is_not_skipped_but_one_harvested_before_it_is() -> None:
    ledger = armed()
    ledger.harvest(of(1))
    epoch = ledger.issue()
    ledger.harvest(of(2))
    ledger.harvest(of(3))
    assert ledger.hint(epoch, of(1, 2, 3, 4)) == 2
    assert pages(ledger.skipped) == [1, 4]
    assert (ledger.tally.hints_late, ledger.tally.hints_applied, ledger.tally.dirtied) == (2, 2, 3)


def test_r4_the_hint_window_ends() -> None:
    ledger = armed()
    epoch = ledger.issue()
    ledger.close_epoch()
    assert ledger.hint(epoch, of(1, 2)) == 0
    assert ledger.tally.hints_stale == 2
    assert not ledger.skipped


def test_r5_epochs_never_repeat_and_only_the_last_is_open() -> None:
    ledger = Ledger(8, PageBitmap, first_epoch=41)
    epochs = []
    for _ in range(3):
        ledger.arm(ANYTHING)
        epochs += [ledger.issue(), ledger.issue()]
        assert ledger.hint(epochs[-2], of(1)) == 0
        assert ledger.hint(epochs[-1], of(1)) == 1
        ledger.cancel()
    assert epochs == [41, 42, 43, 44, 45, 46]
    assert ledger.hint(47, of(1)) == 0  # nobody asked


def test_r6_a_hint_moves_a_page_from_to_send_to_skipped_and_nothing_else() -> None:
    ledger = armed()
    epoch = ledger.issue()
    ledger.mark_holes(of(7))
    ledger.sent_pages(ledger.pick(2))  # 0, 1
    ledger.zeroed(ledger.pick(1))  # 2
    flying = ledger.pick(1)  # 3
    assert ledger.hint(epoch, of(0, 2, 3, 4, 7)) == 1
    assert ledger.balance() == Balance(
        total=8, to_send=2, in_flight=1, sent=2, zero=1, skipped_free=1, hole=1, free_pending=2
    )
    assert (pages(ledger.skipped), pages(ledger.free_pending), pages(flying)) == ([4], [0, 3], [3])
    assert ledger.hint(epoch, of(0, 2, 3, 4, 7)) == 0  # the same bytes again
    assert ledger.tally.hints_applied == 1


def test_r7_distrust_sends_everything_skipped_and_closes_the_epoch() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.harvest(of(1, 2))
    epoch = ledger.issue()
    ledger.hint(ledger.issue(), of(0, 1))
    ledger.distrust_hints()
    assert (pages(ledger.to_send), pages(ledger.free_pending), pages(ledger.skipped)) == ([1, 2], [], [])
    assert ledger.hint(epoch + 1, of(2)) == 0
    ledger.check()


def test_r9_a_page_is_picked_once_an_iteration() -> None:
    ledger = armed()
    picked = [pages(ledger.pick(3)) for _ in range(5)]
    assert picked == [[0, 1, 2], [3, 4, 5], [6, 7], [], []]
    ledger.sent_pages(PageBitmap.full(8))
    for refused in (lambda: ledger.harvest(of(1)), lambda: ledger.settle(of(), trim=False)):
        with pytest.raises(LedgerError):
            refused()
    ledger.barrier()
    ledger.harvest(of(5, 1))
    assert pages(ledger.pick(8)) == [1, 5]


def test_r9_a_barrier_waits_for_every_picked_page() -> None:
    ledger = armed()
    picked = ledger.pick(2)
    with pytest.raises(LedgerError, match="R9"):
        ledger.barrier()
    ledger.sent_pages(picked)
    ledger.barrier()


def test_r9_the_free_record_of_a_page_in_flight_waits_for_the_barrier() -> None:
    ledger = armed()
    epoch = ledger.issue()
    flying = ledger.pick(2)
    ledger.hint(epoch, of(1, 3))
    assert not ledger.pick_free(8)
    ledger.sent_pages(flying)
    assert not ledger.pick_free(8)
    send_all(ledger)
    with pytest.raises(LedgerError, match="R11"):
        ledger.finish()
    freeing = ledger.pick_free(8)
    assert pages(freeing) == [1]
    ledger.hint(epoch, of(1))  # again, while its FREE is built: one is enough
    ledger.freed(freeing)
    ledger.barrier()
    assert not ledger.pick_free(8)
    ledger.finish()
    assert pages(ledger.skipped) == [1, 3]


def test_r10_a_zero_page_needs_a_record_only_where_content_may_lie() -> None:
    ledger = armed()
    first = ledger.pick(8)
    assert not ledger.zero_records(first)
    ledger.zeroed(of(4, 5, 6, 7))
    ledger.sent_pages(of(0, 1, 2, 3))
    ledger.barrier()
    ledger.harvest(of(2, 3, 4))
    assert pages(ledger.zero_records(ledger.pick(8))) == [2, 3]


def test_r10_after_a_free_record_the_destination_is_known_zero_again() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.hint(ledger.issue(), of(3))
    ledger.freed(ledger.pick_free(8))
    ledger.barrier()
    ledger.harvest(of(3))
    assert not ledger.zero_records(ledger.pick(8))


def test_r11_a_hinted_page_owes_a_free_record_if_content_was_ever_sent() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.harvest(of(1))
    ledger.hint(ledger.issue(), of(0, 1))  # 0 as sent, 1 to send again
    assert (pages(ledger.free_pending), pages(ledger.skipped)) == ([0, 1], [1])
    freeing = ledger.pick_free(8)
    assert ledger.balance().in_flight == 2
    ledger.freed(freeing)
    ledger.barrier()
    assert (pages(ledger.skipped), ledger.tally.free_records) == ([0, 1], 2)
    ledger.finish()


def test_r11_a_page_dirty_again_owes_content_and_no_free_record() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.hint(ledger.issue(), of(0))
    ledger.harvest(of(0))
    assert (pages(ledger.to_send), pages(ledger.free_pending)) == ([0], [])


@pytest.mark.parametrize("trim", [False, True])
def test_r12_without_a_contract_nothing_is_ever_skipped(trim: bool) -> None:
    ledger = armed(contract=NONE)
    with pytest.raises(LedgerError, match="R12"):
        ledger.issue()
    assert ledger.hint(1, of(1)) == 0
    assert ledger.settle(PageBitmap.full(8), trim=trim) == 0
    assert pages(ledger.to_send) == list(range(8))


def test_r14_what_is_skipped_but_not_free_at_pause_is_sent_and_counted() -> None:
    ledger = armed()
    ledger.hint(ledger.issue(), of(1, 2, 3))
    send_all(ledger)
    assert ledger.settle(of(2), trim=False) == ledger.tally.rescued == 2
    assert (pages(ledger.to_send), pages(ledger.skipped)) == ([1, 3], [2])


def test_r14_a_page_taken_back_before_its_free_record_keeps_its_content() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.harvest(of(2))
    ledger.hint(ledger.issue(), of(1, 2, 3))
    assert ledger.settle(of(3), trim=False) == 2
    assert (pages(ledger.to_send), pages(ledger.free_pending)) == ([2], [3])
    assert pages(ledger.sent) == [0, 1, 3, 4, 5, 6, 7]


def test_r14_trim_skips_what_a_paused_guest_says_is_free() -> None:
    ledger = armed()
    send_all(ledger)
    ledger.harvest(of(1, 2))
    assert ledger.settle(of(2, 3), trim=True) == 0
    assert (pages(ledger.to_send), pages(ledger.skipped), pages(ledger.free_pending)) == ([1], [2], [2])


def test_r14_later_hints_are_stale() -> None:
    ledger = armed()
    epoch = ledger.issue()
    ledger.settle(of(), trim=False)
    assert ledger.hint(epoch, of(1)) == 0


def comparing() -> Ledger[Pages]:
    ledger = Ledger(8, PageBitmap)
    ledger.arm(ANYTHING, sees_writes=False)
    return ledger


def test_r19_what_the_guest_took_into_use_is_reclaimed_at_pause_and_the_guest_is_right() -> None:
    ledger = comparing()
    ledger.hint(ledger.issue(), of(0, 1, 2, 3))
    send_all(ledger)
    ledger.harvest(of())
    assert ledger.settle(of(2, 3), trim=False) == 2
    assert (pages(ledger.to_send), pages(ledger.skipped)) == ([0, 1], [2, 3])
    assert (ledger.tally.reclaimed, ledger.tally.rescued) == (2, 0)


def test_r19_a_page_sent_and_hinted_and_never_rewritten_is_right_as_it_is() -> None:
    """It owes a FREE record, is taken back before that is sent, and was compared: nothing is reclaimed."""
    ledger = comparing()
    epoch = ledger.issue()
    send_all(ledger)
    ledger.hint(epoch, of(5))
    ledger.harvest(of())
    ledger.settle(of(), trim=False)
    assert (pages(ledger.free_pending), pages(ledger.to_send)) == ([], [])
    assert ledger.tally.reclaimed == 0
    ledger.finish()


@pytest.mark.parametrize("hinted", [True, False])
def test_r19_no_end_with_skipped_pages_that_nobody_vouches_for(hinted: bool) -> None:
    ledger = comparing()
    if hinted:
        ledger.hint(ledger.issue(), of(1))
    send_all(ledger)
    ledger.close_epoch()
    if not hinted:
        ledger.finish()  # every page was sent, and compared
        return
    with pytest.raises(LedgerError, match="R19"):
        ledger.finish()
    ledger.settle(of(1), trim=False)
    ledger.finish()


def test_r19_a_comparing_log_does_not_say_which_holes_are_old() -> None:
    ledger = comparing()
    ledger.mark_holes(of(6, 7))
    ledger.harvest(of())
    with pytest.raises(LedgerError, match="R19"):
        ledger.mark_holes(of(5))
    ledger.arm(ANYTHING, sees_writes=False)
    ledger.mark_holes(of(5))


def test_r15_a_cancelled_attempt_leaves_nothing_to_the_next() -> None:
    fresh, used = armed(), armed()
    used.harvest(of(1))
    used.hint(used.issue(), of(1, 2))
    used.sent_pages(used.pick(1))
    used.pick(2)
    used.cancel()
    used.arm(ANYTHING)
    assert _state(used) == _state(fresh)
    assert used._next_epoch == fresh._next_epoch + 1


def test_r17_finish_refuses_while_anything_is_open() -> None:
    ledger = armed()
    with pytest.raises(LedgerError, match="pages to send"):
        ledger.finish()
    picked = ledger.pick(8)
    with pytest.raises(LedgerError, match="in flight"):
        ledger.finish()
    ledger.sent_pages(picked)
    ledger.finish()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda ledger: ledger.sent.__ior__(of(1)),
        lambda ledger: ledger.to_send.__isub__(of(1)),
        lambda ledger: (ledger.to_send.__isub__(of(1)), ledger.sent.__ior__(of(2))),
    ],
    ids=["in two states", "in no state", "the sum is right and two pages are wrong"],
)
def test_r17_check_finds_a_page_in_no_state_or_in_two(break_it: Callable[[Ledger[Pages]], object]) -> None:
    ledger = armed()
    ledger.check()
    break_it(ledger)
    with pytest.raises(LedgerError, match="in no state, or in two"):
        ledger.check()


def test_r17_only_what_was_picked_can_be_reported_and_only_as_what_it_was_picked_for() -> None:
    ledger = armed()
    for report in (ledger.sent_pages, ledger.zeroed, ledger.freed):
        with pytest.raises(LedgerError, match="only a"):
            report(of(0))
    picked = ledger.pick(2)
    with pytest.raises(LedgerError, match="FREE"):
        ledger.freed(picked)  # would skip a live page
    with pytest.raises(LedgerError):
        ledger.sent_pages(of(0, 2))
    send_all_but = ledger.in_flight.copy()
    ledger.sent_pages(send_all_but)
    send_all(ledger)
    ledger.hint(ledger.issue(), of(1))
    freeing = ledger.pick_free(8)
    for report in (ledger.sent_pages, ledger.zeroed):
        with pytest.raises(LedgerError, match="FREE"):
            report(freeing)
    ledger.freed(freeing)
    ledger.check()


def test_r20_holes_are_looked_for_after_arming_and_before_the_first_pick() -> None:
    ledger = Ledger(8, PageBitmap)
    with pytest.raises(LedgerError, match="R20"):
        ledger.mark_holes(of())
    ledger.arm(ANYTHING)
    ledger.mark_holes(of(2, 3, 4, 5, 6, 7))
    assert (pages(ledger.to_send), pages(ledger.hole)) == ([0, 1], [2, 3, 4, 5, 6, 7])
    ledger.harvest(of(5))  # touched after all
    assert pages(ledger.to_send) == [0, 1, 5]
    ledger.hint(ledger.issue(), of(0))
    ledger.mark_holes(of(0, 5))  # a page written since arming is no hole, and a hinted one stays skipped
    assert (pages(ledger.to_send), pages(ledger.skipped)) == ([1, 5], [0])
    other = armed()
    other.sent_pages(other.pick(1))
    with pytest.raises(LedgerError, match="first pick"):
        other.mark_holes(of())


def test_the_tally_counts_pages_and_only_grows() -> None:
    ledger = armed()
    picked = ledger.pick(8)
    ledger.zeroed(of(7))
    ledger.sent_pages(picked - of(7))
    ledger.barrier()
    ledger.harvest(of(0, 1, 7))
    picked = ledger.pick(8)
    ledger.sent_pages(picked)
    ledger.barrier()
    tally = ledger.tally
    assert (tally.sent, tally.resent, tally.zero, tally.dirtied) == (10, 2, 1, 3)
    ledger.hint(ledger.issue(), of(0, 1))
    ledger.freed(ledger.pick_free(1))
    assert (tally.free_records, tally.hints_applied, tally.rescued) == (1, 0, 0)


# -- work per batch -------------------------------------------------------------------------------------


class CountingPages(IntPages):
    """Counts how often the ledger looks for pages."""

    looks = 0

    def lowest(self, limit: int, start: int = 0) -> IntPages:
        CountingPages.looks += 1
        return super().lowest(limit, start)


def test_pages_already_picked_are_not_looked_through_for_every_batch() -> None:
    """All pages are sent and hinted within one iteration: their FREE waits, and asking costs nothing."""
    ledger: Ledger[Any] = Ledger(4096, _Counting)
    ledger.arm(ANYTHING)
    epoch = ledger.issue()
    while picked := ledger.pick(16):
        ledger.sent_pages(picked)
        ledger.hint(epoch, picked)
    ledger.pick_free(16)
    CountingPages.looks = 0
    for _ in range(100):
        assert not ledger.pick_free(16)
        assert not ledger.pick(16)
    assert CountingPages.looks <= 200
    ledger.barrier()
    freed = 0
    while picked := ledger.pick_free(16):
        ledger.freed(picked)
        freed += picked.count()
    assert freed == 4096


class _Counting(CountingPages):
    """Every set of that ledger counts."""

    def __or__(self, other: IntPages) -> IntPages:
        return _Counting(self.pages, self.bits | other.bits)

    def __and__(self, other: IntPages) -> IntPages:
        return _Counting(self.pages, self.bits & other.bits)

    def __sub__(self, other: IntPages) -> IntPages:
        return _Counting(self.pages, self.bits & ~other.bits)

    __ior__, __iand__, __isub__ = __or__, __and__, __sub__


# -- random walks ---------------------------------------------------------------------------------------


def _state(ledger: Ledger[Any]) -> dict[str, Any]:
    """Every attribute as a value, whatever the sets are made of; epochs aside."""
    values = {name: value for name, value in vars(ledger).items() if name not in {"_sets", "_next_epoch"}}
    return {
        name: pages(value) if isinstance(value, (PageBitmap, IntPages)) else str(value)
        for name, value in values.items()
    }


class Walk:
    """One random history of a World; every step is legal for a session, in any order it could come."""

    def __init__(self, world: World) -> None:
        self.world, self.chance = world, world.chance
        self.batches: list[Any] = []
        self.answers: list[Any] = []

    def some(self) -> list[int]:
        start = self.chance.randrange(self.world.pages)
        return list(range(start, min(self.world.pages, start + self.chance.randrange(1, 20))))

    def step(self) -> None:
        world, chance = self.world, self.chance
        match chance.randrange(14):
            case 0 | 1:
                world.write(*self.some(), content=0 if chance.random() < 0.2 else None)
            case 2 | 3:
                world.free(*self.some())
            case 4 if not world.requests and chance.random() < 0.4:
                world.request()
            case 5 if world.requests:
                self.answers.append(world.answer())
            case 6 | 7 if self.answers:
                world.hint(self.answers[-1] if chance.random() < 0.7 else chance.choice(self.answers))
            case 8 | 9 | 10:
                stream, limit = chance.randrange(2), chance.randrange(1, 20)
                self.batches.append((world.pick if chance.random() < 0.7 else world.pick_free)(stream, limit))
            case 11 | 12 if self.batches:
                batch = chance.choice(self.batches)
                if batch.read or not batch.pages:
                    self.batches.remove(batch)
                    world.push(batch)
                else:
                    world.read(batch)
            case 13:
                self.end_iteration(send_the_rest=chance.random() < 0.3)
                if chance.random() < 0.7:
                    world.harvest()
                if chance.random() < 0.15:
                    world.cancel()
                    world.write(*self.some())
                    world.arm()

    def end_iteration(self, *, send_the_rest: bool = True) -> None:
        for batch in self.batches:
            self.world.push(batch if batch.read or not batch.pages else self.world.read(batch))
        self.batches.clear()
        if send_the_rest:
            self.world.iterate()
        else:
            self.world.barrier()


SEEN: Counter[str] = Counter()


@pytest.mark.parametrize("contract", [ANYTHING, ZERO])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_history_loses_no_page(seed: int, contract: FreeContract) -> None:
    world = World(pages=150, contract=contract, free=set(range(60, 120)), seed=seed)
    world.arm()
    walk = Walk(world)
    for _ in range(400):
        walk.step()
    walk.end_iteration()
    for answer in walk.answers:
        world.hint(answer)  # as late as can be
    assert world.finish(bitmap=bool(seed % 2), trim=bool(seed % 4 == 1)) == set()
    assert world.stale() == set()
    tally = world.ledger.tally
    if contract is ANYTHING:  # a guest that counts on zeros may take a page without writing to it
        assert tally.rescued == 0
    SEEN.update({name: count for name, count in vars(tally).items() if count})
    assert not any(record != BARRIER for stream in world.streams for record in stream)


RECLAIMED: list[int] = []


@pytest.mark.parametrize("contract", [ANYTHING, ZERO])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_history_under_a_comparing_log_loses_no_page(seed: int, contract: FreeContract) -> None:
    world = CompareWorld(pages=150, contract=contract, free=set(range(60, 120)), seed=seed)
    world.arm()
    walk = Walk(world)
    for _ in range(400):
        walk.step()
    walk.end_iteration()
    for answer in walk.answers:
        world.hint(answer)
    assert world.finish(trim=bool(seed % 2)) == set()
    assert world.stale() == set()
    assert world.ledger.tally.rescued == 0
    RECLAIMED.append(world.ledger.tally.reclaimed)


def test_the_random_histories_under_a_comparing_log_had_pages_to_reclaim() -> None:
    if not RECLAIMED:
        pytest.skip("they did not run")
    assert sum(RECLAIMED) > 20


def test_the_random_histories_were_about_something() -> None:
    if not SEEN:
        pytest.skip("they did not run")
    assert set(SEEN) == set(vars(Ledger(1, PageBitmap).tally)) - {"rescued", "reclaimed"}
    assert min(SEEN.values()) > 20, SEEN


@pytest.mark.parametrize(
    "naive",
    [
        AppliesLateHints, KeepsTheEpochOverARetry, FreesAheadOfTheBarrier, NeverSendsZeroRecords,
        RetriesWithWhatWasSent,
    ],
)  # fmt: skip
def test_random_histories_find_a_naive_ledger_out(naive: type[Ledger[Pages]]) -> None:
    """The walk above is worth something: with a naive ledger it loses pages too."""
    for seed in range(40):
        world = World(
            naive, pages=60, free=set(range(20, 50)), seed=seed, contract=(ANYTHING, ZERO)[seed % 2]
        )
        world.arm()
        walk = Walk(world)
        try:
            for _ in range(300):
                walk.step()
            walk.end_iteration()
            if world.finish(bitmap=False) or world.stale():
                return
        except LedgerError:
            pass  # found out by its figures: not what is asked here
    pytest.fail("it lost nothing in 40 histories")


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=25, deadline=None)
def test_the_ledger_is_the_same_over_ints_and_over_bitmaps(seed: int) -> None:
    """So what the model check finds over ints holds for the bitmaps of production, aliasing included."""
    worlds = [World(pages=70, free=set(range(30)), sets=kind, seed=seed) for kind in (PageBitmap, IntPages)]
    walks = [Walk(world) for world in worlds]
    for world in worlds:
        world.arm()
    for _ in range(60):
        for walk in walks:
            walk.step()
        assert _state(worlds[0].ledger) == _state(worlds[1].ledger)
