"""What the workloads do to memory, step by step, and where they take its content from."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import pytest

from migd.errors import ConfigError
from migd.guest.allocator import MAX_RUN_PAGES
from migd.guest.content import PAGE_BYTES, FileContent
from migd.guest.machine import Machine
from migd.guest.workload import Pace, Phase, SeededRandom, Workload, WorkloadKind, WorkloadPlan
from migd.ram.contract import FreeContract

PAGES = 16 << 8  # 16 MiB
LIVE = int(PAGES * 0.1)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("b", "a", "c/d"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name[-1].encode() * 300_000)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def make(files: Path, kind: WorkloadKind, rate_bytes_s: int = 0) -> tuple[Machine, Workload]:
    machine = Machine(mmap.mmap(-1, PAGES * PAGE_BYTES), FreeContract.ANYTHING)
    plan = WorkloadPlan(
        kind=kind,
        rate_bytes_s=rate_bytes_s,
        live_fraction=0.1,
        seed=5,
        contract=FreeContract.ANYTHING,
        fill=(str(files),),
    )
    return machine, Workload(machine, FileContent(plan.fill), plan)


def until_ready(workload: Workload) -> list[Phase]:
    phases = [workload.progress.phase]
    while not workload.ready:
        assert workload.wait_s(0.0) == 0
        workload.step(0.0)
        if workload.progress.phase is not phases[-1]:
            phases.append(workload.progress.phase)
    return phases


@pytest.mark.parametrize("kind", [WorkloadKind.IDLE, WorkloadKind.CHURN, WorkloadKind.WRITE_HEAVY])
def test_the_live_set_is_filled_and_scattered(files: Path, kind: WorkloadKind) -> None:
    machine, workload = make(files, kind)
    assert until_ready(workload) == [Phase.FILL_LIVE, Phase.STEADY]
    assert machine.allocator.owned_pages == LIVE
    starts = [start for start, _ in workload.live]
    assert min(starts) < PAGES // 4
    assert max(starts) > PAGES * 3 // 4
    assert all(machine.ram[start * PAGE_BYTES] in b"abd" for start in starts)


def test_idle_has_nothing_to_do(files: Path) -> None:
    _, workload = make(files, WorkloadKind.IDLE)
    until_ready(workload)
    assert workload.wait_s(0.0) is None


def test_hog_fills_nearly_everything_and_frees_it(files: Path) -> None:
    machine, workload = make(files, WorkloadKind.HOG)
    phases = until_ready(workload)
    assert phases == [Phase.FILL_LIVE, Phase.FILL_HOG, Phase.FREE_HOG, Phase.STEADY]
    assert machine.written_pages == int(PAGES * 0.95)
    assert machine.allocator.owned_pages == LIVE
    used = sum(machine.ram[page * PAGE_BYTES] != 0 for page in range(PAGES))
    assert used == machine.written_pages  # the old data is still there


@pytest.mark.parametrize("kind", [WorkloadKind.CHURN, WorkloadKind.HOG])
def test_churn_writes_fresh_and_old_pages_alike_and_keeps_its_size(files: Path, kind: WorkloadKind) -> None:
    machine, workload = make(files, kind)
    until_ready(workload)
    first = set(workload.live)
    for _ in range(600):
        workload.step(0.0)
        assert LIVE - MAX_RUN_PAGES <= machine.allocator.owned_pages <= LIVE + MAX_RUN_PAGES
    progress = workload.progress
    assert abs(progress.fresh_pages - progress.rewritten_pages) <= MAX_RUN_PAGES
    assert not first & set(workload.live)
    owned = {page for run in machine.allocator.owned_runs() for page in range(*run)}
    assert owned == {page for run in workload.live for page in range(*run)}


def test_write_heavy_keeps_to_its_working_set(files: Path) -> None:
    machine, workload = make(files, WorkloadKind.WRITE_HEAVY)
    until_ready(workload)
    before = list(workload.live)
    for _ in range(100):
        workload.step(0.0)
    assert list(workload.live) == before
    assert machine.sequence == workload.progress.rewritten_pages > 1000


def test_no_two_stamped_pages_are_equal_and_both_ends_carry_the_stamp(files: Path) -> None:
    machine, workload = make(files, WorkloadKind.CHURN)
    until_ready(workload)
    for _ in range(600):
        workload.step(0.0)
    stamps = []
    for start, stop in workload.live:
        for page in range(start, stop):
            (head,) = struct.unpack_from("<Q", machine.ram, page * PAGE_BYTES)
            (tail,) = struct.unpack_from("<Q", machine.ram, (page + 1) * PAGE_BYTES - 8)
            assert head == tail
            stamps.append(head)
    assert len(set(stamps)) == len(stamps)
    assert max(stamps) <= machine.sequence


def test_the_rate_is_kept(files: Path) -> None:
    machine, workload = make(files, WorkloadKind.CHURN, rate_bytes_s=10_000_000)
    until_ready(workload)
    before = machine.written_pages
    now = 100.0
    while now < 110.0:
        wait = workload.wait_s(now)
        assert wait is not None
        now += wait
        workload.step(now)
    written = (machine.written_pages - before) * PAGE_BYTES
    assert written == pytest.approx(100_000_000, rel=0.02)


def test_lost_time_is_made_up_for_only_a_little() -> None:
    pace = Pace(1000)
    pace.spend(1000, 10.0)
    assert pace.wait_s(10.0) == pytest.approx(0.95)
    pace.spend(1, 1000.0)
    assert pace.wait_s(1000.0) == 0
    pace.spend(100, 1000.0)
    assert pace.wait_s(1000.0) == pytest.approx(0.051)


def test_random_numbers_are_seeded_even_and_inside() -> None:
    first, second = SeededRandom(9), SeededRandom(9)
    drawn = [first.below(10) for _ in range(10_000)]
    assert drawn == [second.below(10) for _ in range(10_000)]
    assert all(800 < drawn.count(number) < 1200 for number in range(10))
    assert set(drawn) == set(range(10))
    assert SeededRandom(first.state).below(1 << 60) == first.below(1 << 60)


# -- content ----------------------------------------------------------------------------------------


def test_files_come_in_sorted_order_and_again(files: Path) -> None:
    content = FileContent((str(files),))
    whole = b"".join(bytes(content.take(1)) for _ in range(219))
    assert whole == (b"a" * 300_000 + b"b" * 300_000 + b"d" * 300_000)[: len(whole)]
    assert bytes(content.take(1)) == b"a" * PAGE_BYTES


def test_little_content_is_repeated_up_to_the_longest_run(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"xyz")
    content = FileContent((str(tmp_path / "tiny"),))
    assert bytes(content.take(MAX_RUN_PAGES))[:9] == b"xyzxyzxyz"
    assert bytes(content.take(2)).count(b"x") > 2000


@pytest.mark.parametrize("make_empty", [True, False])
def test_no_content_at_all_is_an_error_that_names_the_option(tmp_path: Path, make_empty: bool) -> None:
    if make_empty:
        (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="--fill"):
        FileContent((str(tmp_path), str(tmp_path / "nowhere")))
