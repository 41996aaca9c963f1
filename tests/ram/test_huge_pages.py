"""RAM in huge pages, a sealed memfd or a file on hugetlbfs: contents, reservations, and tracking by 2 MiB."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migd.errors import GuestError, Refused, ResourceError
from migd.guest.control import Block
from migd.guest.mapping import RamMapping
from migd.ram.backing import Backing
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection
from migd.ram.provider import HugeRam, RamDirectory
from tests.support.huge_pages import HUGE_BYTES, HUGE_PAGES, free_huge_pages, hugetlbfs, reserved
from tests.support.placing import put_pages

COUNT = 6
SHAPE = BlockShape("ram", 4 * HUGE_PAGES)


@pytest.fixture(autouse=True, scope="module")
def _pool() -> Iterator[None]:
    with reserved(COUNT):
        yield


@pytest.fixture(params=["memfd", "hugetlbfs"])
def block(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RamBlock]:
    if request.param == "memfd":
        made = RamBlock.create(SHAPE, huge=True)
        yield made
        made.close()
        return
    with hugetlbfs(tmp_path, COUNT) as directory:
        made = RamDirectory(directory).create("vm1", SHAPE)
        yield made
        made.unlink()
        made.close()


def content(*numbers: int) -> np.ndarray:
    """One page per number, filled with it."""
    return np.repeat(np.array(numbers, np.uint8), PAGE_BYTES).reshape(-1, PAGE_BYTES)


def first_bytes(block: RamBlock, *pages: int) -> list[int]:
    out = np.empty((len(pages), PAGE_BYTES), np.uint8)
    rows = block.read(np.array(pages), out)
    assert (rows == rows[:, :1]).all()
    return [int(row[0]) for row in rows]


def test_a_new_block_is_zero_and_all_of_it_is_set_aside(block: RamBlock) -> None:
    assert block.backing is Backing.HUGETLB
    assert free_huge_pages() == COUNT - 4
    assert block.promised_bytes == 0
    assert os.fstat(block.fd).st_blocks == 0
    assert first_bytes(block, 0, 511, 512, 2047) == [0, 0, 0, 0]
    assert os.fstat(block.fd).st_blocks == 0, "reading takes no memory"


def test_a_memfd_is_sealed_and_has_pages_of_2_mib() -> None:
    block = RamBlock.create(SHAPE, huge=True)
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert os.fstat(block.fd).st_blksize == HUGE_BYTES
    block.close()
    assert free_huge_pages() == COUNT


def test_pages_go_where_they_should_and_nowhere_else(block: RamBlock) -> None:
    """There is no pwrite on hugetlbfs, so this is not the way of other RAM."""
    indices = np.array([0, 1, 5, 511, 512, 513, 2047])
    scratch = content(*range(1, 20))
    put_pages(block, indices, scratch[: len(indices)])
    expected = np.zeros((SHAPE.pages, PAGE_BYTES), np.uint8)
    expected[indices] = scratch[: len(indices)]
    assert os.pread(block.fd, block.bytes, 0) == expected.tobytes()
    with mmap.mmap(block.fd, block.bytes) as guest:
        assert guest[:] == expected.tobytes()


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (5, 6), (3, 512), (0, 512), (510, 1030), (1, 2047), (0, 2048)]
)
def test_zeroed_pages_read_as_zero_and_their_neighbours_stay(block: RamBlock, start: int, stop: int) -> None:
    """A huge page has 512 pages, of which only some are to be zero."""
    put_pages(block, np.arange(SHAPE.pages), np.full((SHAPE.pages, PAGE_BYTES), 7, np.uint8))
    block.zero(start, stop)
    rows = block.read(np.arange(SHAPE.pages), np.empty((SHAPE.pages, PAGE_BYTES), np.uint8))
    zero = np.zeros(SHAPE.pages, bool)
    zero[start:stop] = True
    assert (rows[zero] == 0).all()
    assert (rows[~zero] == 7).all()
    assert free_huge_pages() == COUNT - 4, "a page given back would have lost its reservation"


def test_zeroing_what_was_never_touched_takes_no_memory(block: RamBlock) -> None:
    block.zero(0, SHAPE.pages)
    assert os.fstat(block.fd).st_blocks == 0


def test_every_page_counts_as_touched(block: RamBlock) -> None:
    """SEEK_DATA finds no holes on hugetlbfs: untouched pages are sent as zero pages."""
    assert block.touched(3, 2000) == [(3, 2000)]


def test_a_pool_that_is_too_small_is_refused_with_the_place_to_look(tmp_path: Path) -> None:
    shape = BlockShape("ram", (COUNT + 1) * HUGE_PAGES)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match=r"7 huge pages .* in /proc/sys/vm/nr_hugepages"):
        HugeRam().create("vm1", shape)
    with hugetlbfs(tmp_path, COUNT) as directory:
        provider = RamDirectory(directory)
        with pytest.raises(ResourceError):
            provider.create("vm1", shape)
        assert list(directory.iterdir()) == []
        with pytest.raises(ResourceError, match=r"14 MiB .* wanted, 12 MiB can be given in "):
            provider.room(0).require(shape.bytes)
    with pytest.raises(ResourceError, match=r"14 MiB .* 12 MiB can be given .*/proc/sys/vm/nr_hugepages"):
        HugeRam().room(1 << 40).require(shape.bytes)
    assert len(os.listdir("/proc/self/fd")) == before
    assert free_huge_pages() == COUNT


def test_a_size_that_is_no_multiple_of_a_huge_page_is_refused(tmp_path: Path) -> None:
    with hugetlbfs(tmp_path, COUNT) as directory:
        for provider in (HugeRam(), RamDirectory(directory)):
            with pytest.raises(Refused, match="'odd': 513 pages are not a multiple of huge pages of 2 MiB"):
                provider.create("vm1", BlockShape("odd", HUGE_PAGES + 1))


def test_a_file_that_shrinks_is_an_error_and_no_signal(tmp_path: Path) -> None:
    with hugetlbfs(tmp_path, COUNT) as directory:
        block = RamDirectory(directory).create("vm1", SHAPE)
        put_pages(block, np.array([2047]), content(1))
        assert block.path is not None
        os.truncate(block.path, HUGE_BYTES)
        with pytest.raises(OSError, match="Bad address"):
            put_pages(block, np.array([2047]), content(2))
        with pytest.raises(GuestError, match="has shrunk"):
            block.read(np.array([2047]), np.empty((1, PAGE_BYTES), np.uint8))
        block.close()


def test_it_comes_back_from_its_guest(block: RamBlock) -> None:
    put_pages(block, np.array([600]), content(9))
    again = RamBlock.adopt(SHAPE, os.dup(block.fd))
    assert again.backing is Backing.HUGETLB
    assert first_bytes(again, 600) == [9]
    again.close()


# -- the dirty log --------------------------------------------------------------------------------------


def test_a_written_page_is_always_among_those_harvested(block: RamBlock) -> None:
    """The kernel protects, and reports, 2 MiB at a time: more than was written, never less."""
    mapping = RamMapping([Block("ram", SHAPE.pages)], [os.dup(block.fd)])
    places = mapping.places()
    protection = WriteProtection(places)
    log = KernelDirtyLog(
        os.dup(protection.pagemap_fd), [ArmedRange(places[0][0], SHAPE.pages, 0)], SHAPE.pages
    )
    log.begin()
    assert not log.collect()
    rng = random.Random(5)
    for _ in range(200):
        pages = rng.sample(range(SHAPE.pages), rng.randrange(4))
        for page in pages:
            mapping.memory[page * PAGE_BYTES + rng.randrange(PAGE_BYTES)] = 1
        harvested = set(log.collect().indices().tolist())
        huge = {page // HUGE_PAGES for page in pages}
        assert harvested == {page for page in range(SHAPE.pages) if page // HUGE_PAGES in huge}
    log.close()
    protection.close()
    mapping.close()


def test_several_blocks_of_huge_pages_lie_behind_each_other() -> None:
    shapes = [BlockShape("a", HUGE_PAGES), BlockShape("b", 2 * HUGE_PAGES)]
    blocks = [RamBlock.create(shape, huge=True) for shape in shapes]
    mapping = RamMapping([Block(s.name, s.pages) for s in shapes], [os.dup(block.fd) for block in blocks])
    at = HUGE_BYTES - 3
    mapping.memory[at : at + 6] = b"border"
    assert os.pread(blocks[0].fd, 3, HUGE_BYTES - 3) == b"bor"
    assert os.pread(blocks[1].fd, 3, 0) == b"der"
    protection = WriteProtection(mapping.places())
    protection.close()
    mapping.close()
    for block in blocks:
        block.close()
