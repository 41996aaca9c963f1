"""What guest memory holds once a guest is ready: each state that the bench measures is really there."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.block
import numpy as np
import pytest

from migd.errors import ConfigError
from migd.guest.content import PAGE_BYTES, PYTHON_INSTALLATION, RANDOM_DEVICE, FileContent
from migd.guest.machine import Machine
from migd.guest.workload import HOG_FRACTION, Phase, Rest, Workload, WorkloadKind, WorkloadPlan
from migd.ram.bitmap import PageBitmap
from migd.ram.block import BlockShape, RamBlock
from migd.ram.contract import FreeContract
from migd.ram.layout import RamLayout
from migd.ram.zero import zero_pages

PAGES = (16 << 8) + 3  # 16 MiB, and not a multiple of 8 pages


class Filled:
    """A guest that is ready, and its RAM as the daemon would see it."""

    def __init__(self, block: RamBlock, plan: WorkloadPlan) -> None:
        self.block = block
        self.machine = Machine(mmap.mmap(block.fd, block.bytes), plan.contract)
        self.workload = Workload(self.machine, FileContent(plan.fill), plan)
        self.phases = [self.workload.progress.phase]
        while not self.workload.ready:
            self.workload.step(0.0)
            if self.workload.progress.phase is not self.phases[-1]:
                self.phases.append(self.workload.progress.phase)

    @property
    def live(self) -> PageBitmap:
        return PageBitmap.from_runs(PAGES, self.machine.allocator.owned_runs())

    @property
    def touched(self) -> PageBitmap:
        return RamLayout([self.block]).touched()

    @property
    def zero(self) -> PageBitmap:
        """Pages that read as zero. To look is to allocate, so ask for ``touched`` first."""
        return PageBitmap.of(PAGES, np.flatnonzero(zero_pages(self.block.view)))


@contextmanager
def filled(
    kind: WorkloadKind = WorkloadKind.IDLE,
    live: float = 0.05,
    rest: Rest = Rest.UNTOUCHED,
    run_pages: int = 0,
    fill: str = PYTHON_INSTALLATION,
    contract: FreeContract = FreeContract.ANYTHING,
) -> Iterator[Filled]:
    block = RamBlock.create(BlockShape("ram", PAGES))
    plan = WorkloadPlan(
        kind=kind, rate_bytes_s=0, live_fraction=live, seed=3, contract=contract, fill=(fill,), rest=rest,
        run_pages=run_pages,
    )  # fmt: skip
    try:
        yield Filled(block, plan)
    finally:
        block.close()


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """Content without a zero byte."""
    path = tmp_path / "letters"
    path.write_bytes(bytes(range(1, 256)) * 8000)
    return str(path)


def test_untouched_the_rest_was_never_written(letters: str) -> None:
    with filled(fill=letters) as guest:
        assert guest.phases == [Phase.FILL_LIVE, Phase.STEADY]
        assert guest.live.count() == int(PAGES * 0.05)
        assert guest.touched == guest.live
        assert guest.zero == PageBitmap.full(PAGES) - guest.live


def test_zeroed_the_rest_was_written_and_is_zero(letters: str) -> None:
    with filled(rest=Rest.ZEROED, fill=letters) as guest:
        assert guest.phases == [Phase.FILL_LIVE, Phase.FILL_HOG, Phase.FREE_HOG, Phase.STEADY]
        assert guest.live.count() == int(PAGES * 0.05)
        assert guest.touched == PageBitmap.full(PAGES)
        assert guest.zero == PageBitmap.full(PAGES) - guest.live


def test_freed_the_rest_holds_old_data(letters: str) -> None:
    with filled(rest=Rest.FREED, fill=letters) as guest:
        assert guest.live.count() == int(PAGES * 0.05)
        assert guest.touched == PageBitmap.full(PAGES)
        assert not guest.zero


def test_a_guest_that_cleans_what_it_frees_leaves_zero(letters: str) -> None:
    with filled(rest=Rest.FREED, fill=letters, contract=FreeContract.ZERO) as guest:
        assert guest.zero == PageBitmap.full(PAGES) - guest.live
        assert guest.machine.wrong_pages == 0


@pytest.mark.parametrize("rest", [Rest.UNTOUCHED, Rest.ZEROED])
def test_a_hog_leaves_a_little_untouched_whatever_the_rest_is(letters: str, rest: Rest) -> None:
    with filled(WorkloadKind.HOG, rest=rest, fill=letters) as guest:
        assert guest.touched.count() == int(PAGES * HOG_FRACTION)


@pytest.mark.parametrize("live", [0.95, 1.0])
def test_a_full_guest_owns_its_pages_from_the_first_to_the_last(letters: str, live: float) -> None:
    with filled(live=live, fill=letters) as guest:
        assert list(guest.live.runs()) == [(0, int(PAGES * live))]
        assert guest.touched == guest.live
        assert guest.zero == PageBitmap.full(PAGES) - guest.live


def test_a_guest_without_a_free_page_rewrites_what_it_has(letters: str) -> None:
    with filled(WorkloadKind.CHURN, live=1.0, fill=letters) as guest:
        for _ in range(50):
            guest.workload.step(0.0)
        assert guest.workload.progress.rewritten_pages > 0
        assert guest.workload.progress.fresh_pages == 0


def test_fragmented_live_runs_have_one_to_four_pages_in_old_data(letters: str) -> None:
    with filled(live=0.3, rest=Rest.FREED, run_pages=4, fill=letters) as guest:
        runs = list(guest.live.runs())  # maximal ones: two that touch would be one of up to eight
        lengths = Counter(stop - start for start, stop in runs)
        assert set(lengths) == {1, 2, 3, 4}
        assert min(lengths.values()) > len(runs) // 8
        assert guest.live.count() == int(PAGES * 0.3)
        assert min(runs)[0] < PAGES // 20
        assert max(runs)[1] > PAGES * 19 // 20
        assert not guest.zero


def test_runs_stay_apart_while_the_guest_churns(letters: str) -> None:
    with filled(WorkloadKind.CHURN, live=0.3, run_pages=4, fill=letters) as guest:
        before = guest.live
        for _ in range(2000):
            guest.workload.step(0.0)
        assert guest.live != before
        assert {stop - start for start, stop in guest.live.runs()} == {1, 2, 3, 4}


@pytest.mark.parametrize("run_pages", [1, 2, 62])
def test_the_largest_share_that_is_allowed_finds_room_to_be_apart(letters: str, run_pages: int) -> None:
    with filled(live=0.4, run_pages=run_pages, fill=letters) as guest:
        assert guest.live.count() == int(PAGES * 0.4)
        assert max(stop - start for start, stop in guest.live.runs()) <= run_pages


def test_random_content_does_not_compress_and_no_two_pages_are_equal() -> None:
    with filled(live=1.0, fill=RANDOM_DEVICE) as guest:
        view = guest.block.view
        assert len(lz4.block.compress(view[:2048].tobytes())) > 2048 * PAGE_BYTES
        assert len(np.unique(view[:, :16], axis=0)) == PAGES


def test_no_device_but_that_of_random_numbers_is_ever_opened() -> None:
    with pytest.raises(ConfigError, match="no readable file"):
        FileContent(("/dev/zero",))
