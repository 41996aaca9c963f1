"""The guests of the bench as the daemon sees them: their RAM really is in the state that their row names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.block
import numpy as np
import pytest

from migd import api
from migd.bench.cases import CASES, DEFAULT_WRITE_RATES, Contender, binaries, contenders
from migd.errors import ConfigError
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.zero import zero_pages

PAGES = 16 << 8
ALL = contenders(CASES, DEFAULT_WRITE_RATES)


class GuestRam:
    """RAM of a guest process, read through a descriptor of our own that never allocates."""

    def __init__(self, fd: int, owned_pages: int) -> None:
        self.live = owned_pages / PAGES
        """The share that the guest says it owns, which nobody can see from outside."""
        self.touched = PageBitmap.from_runs(PAGES, RamBlock(BlockShape("ram", PAGES), fd).touched(0, PAGES))
        self.content = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        assert os.preadv(fd, [self.content.data], 0) == PAGES * PAGE_BYTES
        self.zero_pages = int(zero_pages(self.content).sum())

    @property
    def lz4_ratio(self) -> float:
        return self.content.nbytes / len(lz4.block.compress(self.content.data, store_size=False))


@pytest.fixture(scope="module")
def daemon() -> Iterator[api.Daemon]:
    with api.start_daemon("source") as daemon:
        yield daemon


@contextmanager
def ram_of(daemon: api.OwnedDaemon, contender: Contender) -> Iterator[GuestRam]:
    """Of such a guest, once it is ready."""
    guest = daemon.start_guest(contender.case, ram=PAGES * PAGE_BYTES, **contender.guest)
    try:
        _, _, words = guest.ready().log.partition(" ready: ")
        fds = [path for path in Path(f"/proc/{guest.pid}/fd").iterdir() if "migd-ram" in os.readlink(path)]
        ram = os.open(fds[0], os.O_RDONLY)  # the others are of its mapping
        try:
            yield GuestRam(ram, int(words.split()[2]))
        finally:
            os.close(ram)
    finally:
        guest.end()


def of_case(case: str) -> Contender:
    return next(contender for contender in ALL if contender.case == case)


def test_idle_never_touched_what_is_not_live(daemon: api.OwnedDaemon) -> None:
    with ram_of(daemon, of_case("idle")) as ram:
        assert ram.live == pytest.approx(0.05, abs=0.001)
        assert ram.touched.count() == int(PAGES * 0.05)


def test_zeroed_touched_everything_and_left_zero(daemon: api.OwnedDaemon) -> None:
    with ram_of(daemon, of_case("zeroed")) as ram:
        assert ram.live == pytest.approx(0.05, abs=0.001)
        assert ram.touched == PageBitmap.full(PAGES)
        assert PAGES * 0.95 <= ram.zero_pages < PAGES * 0.96


@pytest.mark.parametrize(("case", "live"), [("freed", 0.05), ("fragmented", 0.3), ("live-writer", 0.2)])
def test_old_data_is_everywhere_beside_the_live_pages(
    daemon: api.OwnedDaemon, case: str, live: float
) -> None:
    with ram_of(daemon, of_case(case)) as ram:
        assert ram.live == pytest.approx(live, abs=0.02)  # a writer already writes on
        assert ram.touched == PageBitmap.full(PAGES)
        assert ram.zero_pages < PAGES * 0.05  # some pages of files are zero


def test_full_compressible_holds_programs(daemon: api.OwnedDaemon) -> None:
    with ram_of(daemon, of_case("full-compressible")) as ram:
        assert ram.live == 1
        assert ram.touched == PageBitmap.full(PAGES)
        assert 1.3 < ram.lz4_ratio < 3.5


def test_full_random_does_not_compress(daemon: api.OwnedDaemon) -> None:
    with ram_of(daemon, of_case("full-random")) as ram:
        assert ram.live == 1
        assert ram.touched == PageBitmap.full(PAGES)
        assert ram.zero_pages == 0
        assert ram.lz4_ratio < 1.001


def test_rows_are_chosen_by_case_in_the_order_of_the_table() -> None:
    assert [found.label for found in contenders(["freed", "idle"], [])] == [
        "idle", "idle, no hints", "freed", "freed, no hints",
    ]  # fmt: skip
    assert {found.case for found in ALL} == set(CASES)
    assert len({found.label for found in ALL}) == len(ALL)


def test_the_live_writer_has_a_row_for_each_rate() -> None:
    found = contenders(["live-writer"], [1_500_000, 100_000_000])
    assert [(one.label, one.guest["rate"]) for one in found] == [
        ("live-writer, 1.5 MB/s", 1_500_000), ("live-writer, 100 MB/s", 100_000_000),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "rates", "says"), [(["nope"], [1], "--case: 'nope'"), ([], [0], "--write-rate")]
)
def test_what_cannot_be_measured_is_named(cases: list[str], rates: list[int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        contenders(cases, rates)


def test_binaries_are_programs_and_enough_of_them() -> None:
    found = binaries(4 << 20)
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in found)
    assert sum(path.stat().st_size for path in found) >= 4 << 20
    assert len(set(found)) == len(found)
    assert len(binaries(1)) == 1
