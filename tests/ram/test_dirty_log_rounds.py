"""The kernel's dirty log, tested as KVM tests its own (tools/testing/selftests/kvm/dirty_log_test.c).

There a guest writes the number of the round to random pages while the host harvests; a page in the log was
written since the last harvest, one that is not was not. Here the guest is a process that arms its mapping,
and the host has its pagemap descriptor. First in lockstep, where each harvest is known to the page; then
racing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from migd.ram import linux
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from migd.ram.layout import RamLayout
from migd.ram.provider import RamDirectory
from tests.support.armed_writer import ArmedWriter, Manner
from tests.support.huge_pages import HUGE_PAGES, reserved

PAGES = 512
ROUNDS = 60
"""Harvests of each manner on each kind of RAM, in lockstep."""
RACE_ROUNDS = 100
"""Numbers below 256: a page's first and last byte are its value, and no read of a byte can be torn."""

KINDS = ("memfd", "file", "blocks", "huge pages")


@pytest.fixture(scope="module", autouse=True)
def _platform() -> None:
    """No userfaultfd at all is a reason to skip; one that lacks a feature is a failure."""
    try:
        os.close(linux.userfaultfd())
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"this platform has no userfaultfd for us: {error.strerror}")
        raise


@contextlib.contextmanager
def ram_of(kind: str, directory: Path) -> Iterator[list[RamBlock]]:
    """Fresh RAM, never touched."""
    with contextlib.ExitStack() as stack:
        match kind:
            case "memfd":
                blocks = [RamBlock.create(BlockShape("ram", PAGES))]
            case "file":
                blocks = [RamDirectory(directory).create("vm", BlockShape("ram", PAGES))]
                stack.callback(blocks[0].unlink)
            case "blocks":
                shapes = [BlockShape("a", 100), BlockShape("b", 1), BlockShape("c", PAGES - 101)]
                blocks = [RamBlock.create(shape) for shape in shapes]
            case _:
                stack.enter_context(reserved(4))
                blocks = [RamBlock.create(BlockShape("ram", 4 * HUGE_PAGES), huge=True)]
        for block in blocks:
            stack.callback(block.close)
        yield blocks


class Bench:
    """RAM of one kind, and the process that writes it."""

    def __init__(self, kind: str, blocks: list[RamBlock]) -> None:
        self.kind = kind
        self.blocks = blocks
        self.granule_pages = HUGE_PAGES if kind == "huge pages" else 1
        self.writer = ArmedWriter(blocks)
        self.pages = self.writer.pages

    def logged(self, pages: set[int]) -> set[int]:
        """What the log should say of these: a huge page is dirty as a whole."""
        granules = {page // self.granule_pages for page in pages}
        return {page for page in range(self.pages) if page // self.granule_pages in granules}

    def edges(self) -> NDArray[np.uint8]:
        """The first and the last byte of each page, shape (pages, 2); by pread, which touches nothing."""
        content = b"".join(os.pread(block.fd, block.bytes, 0) for block in self.blocks)
        return np.frombuffer(content, np.uint8).reshape(self.pages, PAGE_BYTES)[:, [0, -1]].copy()


@pytest.fixture(scope="module", params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = Path("/dev/shm") if request.param == "file" else tmp_path_factory.mktemp("ram")
    with ram_of(request.param, directory) as blocks:
        bench = Bench(request.param, blocks)
        yield bench
        bench.writer.close()


@pytest.fixture
def log(bench: Bench) -> Iterator[KernelDirtyLog]:
    """Armed for one test."""
    log = bench.writer.arm()
    yield log
    log.close()
    bench.writer.disarm()


def harvested(log: KernelDirtyLog) -> set[int]:
    return set(log.collect().indices().tolist())


# -- in lockstep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", Manner)
def test_each_harvest_is_what_was_written_since_the_last(
    bench: Bench, log: KernelDirtyLog, manner: Manner
) -> None:
    chance = random.Random(manner)
    for number in range(1, ROUNDS + 1):
        pages = {chance.randrange(bench.pages - 1) for _ in range(chance.randrange(40))}
        bench.writer.write(manner, sorted(pages), number)
        if manner is Manner.ACROSS:
            pages |= {page + 1 for page in pages}
        assert harvested(log) == bench.logged(pages)
    assert harvested(log) == set()


def _by_process_vm_writev(pid: int, address: int) -> None:
    data = ctypes.create_string_buffer(b"from outside")
    ours = linux._Iovec(ctypes.addressof(data), len(data))
    theirs = linux._Iovec(address, len(data))
    count = linux._libc.process_vm_writev(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    assert count == len(data), os.strerror(ctypes.get_errno())


def _by_proc_mem(pid: int, address: int) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"from outside")


@pytest.mark.parametrize(
    "write", [_by_process_vm_writev, _by_proc_mem], ids=["process_vm_writev", "/proc/PID/mem"]
)
def test_writes_of_another_process_through_the_armed_mapping(
    bench: Bench, log: KernelDirtyLog, write: Callable[[int, int], None]
) -> None:
    chance = random.Random(7)
    for _ in range(ROUNDS):
        pages = {chance.randrange(bench.pages) for _ in range(chance.randrange(10))}
        for page in pages:
            write(bench.writer.pid, bench.writer.addresses[0] + page * PAGE_BYTES + chance.randrange(4000))
        assert harvested(log) == bench.logged(pages)


def test_first_writes_to_pages_that_nobody_has_touched(tmp_path: Path) -> None:
    """Each page once, zeros or not; in between, reads of the host touch nothing."""
    with ram_of("memfd", tmp_path) as blocks:
        bench = Bench("memfd", blocks)
        log = bench.writer.arm()
        order = random.Random(3).sample(range(PAGES), PAGES)
        for at in range(0, PAGES, 8):
            pages = set(order[at : at + 8])
            assert not pages & set(RamLayout(blocks).touched().indices().tolist())
            bench.writer.write(Manner.ZERO if at % 16 else Manner.STORE, sorted(pages), at + 1)
            assert harvested(log) == pages
            bench.edges()
        log.close()
        bench.writer.close()


def test_a_part_that_is_harvested_leaves_the_rest_in_the_log(bench: Bench, log: KernelDirtyLog) -> None:
    """Random ranges, and the whole at the end. Of huge pages, whole ones."""
    chance = random.Random(11)
    pending: set[int] = set()
    for number in range(1, 5 * ROUNDS):
        pages = {chance.randrange(bench.pages) for _ in range(chance.randrange(20))}
        bench.writer.write(Manner.BYTE, sorted(pages), number)
        pending |= bench.logged(pages)
        granule = bench.granule_pages
        low, high = sorted(granule * cut for cut in chance.sample(range(bench.pages // granule + 1), 2))
        address = bench.writer.addresses[0] + low * PAGE_BYTES
        part = KernelDirtyLog(os.dup(log._fd), [ArmedRange(address, high - low, low)], bench.pages)
        within = {page for page in pending if low <= page < high}
        assert harvested(part) == within
        pending -= within
        part.close()
    assert harvested(log) == pending


def test_arming_again_and_again(bench: Bench) -> None:
    """What is written in between is in no log: the next attempt sends everything (R2)."""
    chance = random.Random(13)
    for number in range(1, ROUNDS + 1):
        pages = sorted(chance.sample(range(bench.pages), 5))
        bench.writer.write(Manner.STORE, pages, number)
        log = bench.writer.arm()
        assert harvested(log) == set()
        bench.writer.write(Manner.STORE, pages[:2], number)
        assert harvested(log) == bench.logged(set(pages[:2]))
        bench.writer.write(Manner.STORE, pages[2:], number)
        log.close()
        bench.writer.disarm()


# -- racing -------------------------------------------------------------------------------------------


class Judge:
    """KVM's rules, for a page's first and last byte; ``verify`` raises AssertionError at the first breach.

    The host publishes number n and waits until all threads write it. So whatever is written between the
    harvests n-1 and n is n-1 or n, and whatever is written from harvest n until the next publication is n.

    - *Dirty in harvest n*: a byte is n or n-1 (of a huge page, in one of its pages). Or a store has faulted,
      which sets the mark, and has not been made: a store over a border has two such pages. It faults again,
      so the next harvest must have them. (KVM's test knows such a page, too: the last of a full dirty ring.)
    - *Clean*: each byte is what it was after the last harvest, or n. If it changed to n, that was behind the
      harvest just made, and the next one must have the page.

    KVM lets any older number pass as clean. Here the host keeps a copy, refreshed from each page found dirty
    after its mark was cleared (R8): so a clean page must be its copy, and at the end RAM is the copy.
    """

    def __init__(self, edges: NDArray[np.uint8], granule_pages: int, threads: int) -> None:
        self.copy = edges
        self._granule_pages = granule_pages
        self._may_have_faulted = 2 * threads * granule_pages
        self._due = np.zeros(len(edges), np.bool_)
        self.dirty_pages = 0
        self.clean_pages = 0

    def verify(self, number: int, harvest: PageBitmap, edges: NDArray[np.uint8]) -> None:
        """One harvest, and the edges read behind it."""
        dirty = np.zeros(len(edges), np.bool_)
        dirty[harvest.indices()] = True
        lost = np.flatnonzero(self._due & ~dirty)
        assert not len(lost), f"round {number}: page {lost[0]} was written, and this harvest lacks it"
        recent = ((edges == number) | (edges == number - 1)).any(axis=1)
        faulted = dirty & ~self._of_granules(recent)
        assert faulted.sum() <= self._may_have_faulted, (
            f"round {number}: {np.flatnonzero(faulted)} are dirty, and nobody wrote them"
        )
        changed = edges != self.copy
        missed = np.flatnonzero(~dirty & (changed & (edges != number)).any(axis=1))
        assert not len(missed), f"round {number}: page {missed[0]} is clean, and has an older number"
        self._due = (~dirty & changed.any(axis=1)) | faulted
        self.copy[dirty] = edges[dirty]
        self.dirty_pages += int(dirty.sum())
        self.clean_pages += int((~dirty).sum())

    def _of_granules(self, pages: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.repeat(pages.reshape(-1, self._granule_pages).any(axis=1), self._granule_pages)


Harvest = Callable[[], PageBitmap]


def race(bench: Bench, harvest: Harvest, threads: int, rounds: int = RACE_ROUNDS) -> Judge:
    """So many rounds, and a last harvest of a writer that stands still."""
    writer = bench.writer
    judge = Judge(bench.edges(), bench.granule_pages, threads)
    writer.race(threads, seed=threads)
    try:
        for number in range(1, rounds + 1):
            writer.turn(number, threads)
            judge.verify(number, harvest(), bench.edges())
    finally:
        writer.stop()
    last = harvest()
    edges = bench.edges()
    judge.verify(rounds, last, edges)
    assert np.array_equal(judge.copy, edges), "a write is in no harvest"
    return judge


def clear(bench: Bench, log: KernelDirtyLog) -> None:
    """No number of an earlier race is left."""
    bench.writer.write(Manner.ZERO, range(bench.pages), 0)
    log.collect()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_race_loses_nothing_and_invents_nothing(bench: Bench, log: KernelDirtyLog, threads: int) -> None:
    clear(bench, log)
    judge = race(bench, log.collect, threads)
    assert judge.dirty_pages > RACE_ROUNDS
    assert judge.dirty_pages + judge.clean_pages == (RACE_ROUNDS + 1) * bench.pages


# -- the judge ----------------------------------------------------------------------------------------


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Bench]:
    with ram_of("memfd", tmp_path) as blocks:
        bench = Bench("memfd", blocks)
        yield bench
        bench.writer.close()


def test_a_log_that_forgets_a_page_is_noticed(quiet: Bench) -> None:
    log = quiet.writer.arm()
    with pytest.raises(AssertionError, match=r"page 17 was written|page 17 is clean|in no harvest"):
        race(quiet, lambda: log.collect() - PageBitmap.of(PAGES, [17]), 1)
    log.close()


def test_a_log_that_invents_a_page_is_noticed(quiet: Bench) -> None:
    """Two could have faulted, and are due then; three could not."""
    log = quiet.writer.arm()
    judge = Judge(quiet.edges(), 1, threads=1)
    quiet.writer.write(Manner.WHOLE, [3], 5)
    judge.verify(5, log.collect(), quiet.edges())
    with pytest.raises(AssertionError, match=r"\[ 9 10 11\] are dirty, and nobody wrote them"):
        judge.verify(7, log.collect() | PageBitmap.of(PAGES, [9, 10, 11]), quiet.edges())
    judge.verify(7, log.collect() | PageBitmap.of(PAGES, [9, 10]), quiet.edges())
    with pytest.raises(AssertionError, match="page 9 was written, and this harvest lacks it"):
        judge.verify(8, log.collect() | PageBitmap.of(PAGES, [10]), quiet.edges())
    log.close()


def test_a_harvest_that_reads_and_then_clears_is_noticed(quiet: Bench) -> None:
    """W06: what is written between the two is lost."""
    log = quiet.writer.arm()

    def read_then_clear() -> PageBitmap:
        found = log.collect()
        if quiet.writer.pace.number:
            quiet.writer.more_writes(1)
        log.collect()
        return found

    with pytest.raises(AssertionError, match=r"was written, and|is clean, and|in no harvest"):
        race(quiet, read_then_clear, 2)
    log.close()
