"""RamBlock and RamLayout over real memfds: seals, holes that stay holes, the border between two blocks."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migd.errors import GuestError, ResourceError
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock, RamLayout

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SHAPE = BlockShape("ram", 8)


@pytest.fixture
def block() -> Iterator[RamBlock]:
    made = RamBlock.create(BlockShape("ram", 64))
    yield made
    made.close()


@pytest.fixture
def layout() -> Iterator[RamLayout]:
    made = RamLayout([RamBlock.create(BlockShape("low", 10)), RamBlock.create(BlockShape("high", 70))])
    yield made
    made.close()


def content(*numbers: int) -> np.ndarray:
    """One page per number, filled with it."""
    return np.repeat(np.array(numbers, np.uint8), PAGE_BYTES).reshape(-1, PAGE_BYTES)


def allocated_pages(block: RamBlock) -> int:
    return os.fstat(block.fd).st_blocks * 512 // PAGE_BYTES


def memfd(pages: int, seals: int = SEALS, flags: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, pages * PAGE_BYTES)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# -- creation and adoption ------------------------------------------------------------------------------


def test_a_new_block_is_zero_untouched_sealed_and_not_inherited(block: RamBlock) -> None:
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    assert not os.get_inheritable(block.fd)
    assert block.bytes == os.fstat(block.fd).st_size == 64 * PAGE_BYTES
    assert allocated_pages(block) == 0
    for size in (0, 63 * PAGE_BYTES, 65 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(block.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(block.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.pread(block.fd, block.bytes, 0) == bytes(block.bytes)


@pytest.mark.parametrize("pages", [0, -1, (1 << 32) + 1])
def test_a_block_of_an_impossible_size_is_refused(pages: int) -> None:
    with pytest.raises(ResourceError, match=f"'ram': {pages} pages"):
        RamBlock.create(BlockShape("ram", pages))


def test_hundreds_of_gib_cost_nothing_until_touched() -> None:
    block = RamBlock.create(BlockShape("huge", 1 << 27))  # 512 GiB
    block.write(np.array([(1 << 27) - 1]), content(7))
    assert block.touched(0, block.pages) == [((1 << 27) - 1, 1 << 27)]
    assert allocated_pages(block) == 1
    block.close()


def test_a_block_handed_back_is_the_same_memory(block: RamBlock) -> None:
    block.write(np.array([5]), content(9))
    again = RamBlock.adopt(block.shape, os.dup(block.fd))
    assert again.view[5].tobytes() == content(9).tobytes()
    assert again.shape == block.shape
    again.close()


def _file(tmp_path: Path, flags: int = os.O_RDWR) -> int:
    path = tmp_path / "ram"
    path.write_bytes(bytes(SHAPE.pages * PAGE_BYTES))
    return os.open(path, flags)


def _reopened(flags: int) -> int:
    fd = memfd(SHAPE.pages)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda _: memfd(SHAPE.pages - 1), "8 pages announced, the file has 28672 bytes"),
        (lambda _: memfd(SHAPE.pages + 1), "8 pages announced, the file has 36864 bytes"),
        (lambda _: memfd(SHAPE.pages, 0), "not sealed"),
        (lambda _: memfd(SHAPE.pages, 0, 0), "not sealed"),
        (lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW), "not sealed"),
        (lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL), "not sealed"),
        (lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), "not sealed"),
        (lambda _: memfd(SHAPE.pages, SEALS | fcntl.F_SEAL_WRITE), "cannot be written"),
        (lambda _: _reopened(os.O_RDONLY), "cannot be written"),
        (_file, "memfd"),
        (lambda _: os.open("/dev/zero", os.O_RDWR), "the file has 0 bytes"),
        (lambda _: os.eventfd(0), "the file has 0 bytes"),
    ],
    ids=[
        "a page short", "a page long", "no seals", "seals not allowed", "later seals possible", "may grow",
        "may shrink", "write-sealed", "read-only", "a file on disk", "a device", "an eventfd",
    ],
)  # fmt: skip
def test_adopt_refuses_and_leaves_the_descriptor_to_its_owner(
    make: Callable[[Path], int], why: str, tmp_path: Path
) -> None:
    fd = make(tmp_path)
    with pytest.raises(GuestError, match=why):
        RamBlock.adopt(SHAPE, fd)
    os.close(fd)  # still open


@pytest.mark.parametrize("pages", [0, -1, (1 << 32) + 1])
def test_adopt_refuses_an_impossible_size_though_the_file_may_have_it(pages: int) -> None:
    fd = memfd(max(0, pages))
    with pytest.raises(GuestError, match="is not between"):
        RamBlock.adopt(BlockShape("ram", pages), fd)
    os.close(fd)


def test_close_is_idempotent_and_gives_the_descriptor_back() -> None:
    block = RamBlock.create(SHAPE)
    fd = block.fd
    view = block.view
    block.close()
    block.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert not view.any()  # who still holds the view keeps the mapping, not the descriptor


# -- touched pages --------------------------------------------------------------------------------------


def test_touched_finds_what_was_written_and_allocates_nothing(block: RamBlock) -> None:
    assert not block.touched(0, block.pages)
    block.write(np.array([0, 1, 5, 40, 63]), content(1, 2, 0, 4, 5))
    before = allocated_pages(block)
    assert block.touched(0, block.pages) == [(0, 2), (5, 6), (40, 41), (63, 64)]
    for _ in range(3):
        block.touched(0, block.pages)
    assert allocated_pages(block) == before == 5


def test_touched_sees_a_store_through_another_mapping_at_once(block: RamBlock) -> None:
    with mmap.mmap(block.fd, block.bytes) as guest:
        guest[17 * PAGE_BYTES + 4095] = 1
    assert block.touched(0, block.pages) == [(17, 18)]


def test_reading_a_hole_through_the_view_allocates_it_which_is_why_touched_comes_first(
    block: RamBlock,
) -> None:
    out = np.empty((1, PAGE_BYTES), np.uint8)
    block.read(np.array([9]), out)
    assert block.touched(0, block.pages) == [(9, 10)]
    assert allocated_pages(block) == 1


def test_zero_gives_memory_back_and_reads_as_zero_in_every_mapping(block: RamBlock) -> None:
    block.write(np.arange(64), content(*range(1, 65)))
    block.zero(3, 10)
    assert allocated_pages(block) == 64 - 7
    assert block.touched(0, block.pages) == [(0, 3), (10, 64)]
    with mmap.mmap(block.fd, block.bytes) as guest:
        assert guest[3 * PAGE_BYTES : 10 * PAGE_BYTES] == bytes(7 * PAGE_BYTES)
        assert guest[2 * PAGE_BYTES] == 3
        assert guest[10 * PAGE_BYTES] == 11


# -- reading and writing --------------------------------------------------------------------------------


def test_read_is_a_private_copy(block: RamBlock) -> None:
    block.write(np.array([4]), content(1))
    out = np.empty((3, PAGE_BYTES), np.uint8)
    rows = block.read(np.array([4]), out)
    assert rows.shape == (1, PAGE_BYTES)
    block.write(np.array([4]), content(2))
    assert rows.tobytes() == content(1).tobytes()


def test_write_goes_exactly_where_it_should(block: RamBlock) -> None:
    indices = np.array([0, 1, 2, 7, 9, 10, 63])
    block.write(indices, content(*range(1, 8)))
    expected = np.zeros((64, PAGE_BYTES), np.uint8)
    expected[indices] = content(*range(1, 8))
    assert os.pread(block.fd, block.bytes, 0) == expected.tobytes()


def test_write_takes_rows_of_a_larger_buffer(block: RamBlock) -> None:
    scratch = content(1, 2, 3, 4)
    block.write(np.array([8, 20]), scratch)
    assert (block.view[8][0], block.view[20][0], allocated_pages(block)) == (1, 2, 2)


def test_a_layout_is_one_page_space(layout: RamLayout) -> None:
    assert (layout.pages, layout.bytes) == (80, 80 * PAGE_BYTES)
    assert layout.first_pages == (0, 10)
    assert layout.shapes == (BlockShape("low", 10), BlockShape("high", 70))


@pytest.mark.parametrize(
    "indices", [[9, 10], [0, 9, 10, 79], list(range(80)), [9], [10], [79], [], [3, 5, 11, 12, 13, 40]]
)
def test_pages_cross_the_border_between_blocks(layout: RamLayout, indices: list[int]) -> None:
    at = np.array(indices, np.int64)
    pages = content(*(index + 1 for index in indices))
    layout.write(at, pages)
    expected = np.zeros((80, PAGE_BYTES), np.uint8)
    expected[at] = pages
    low, high = layout.blocks
    assert os.pread(low.fd, low.bytes, 0) == expected[:10].tobytes()
    assert os.pread(high.fd, high.bytes, 0) == expected[10:].tobytes()
    assert layout.touched().indices().tolist() == indices
    assert np.array_equal(layout.read(at, np.full((80, PAGE_BYTES), 255, np.uint8)), pages)


def test_zero_crosses_the_border_between_blocks(layout: RamLayout) -> None:
    layout.write(np.arange(80), content(*range(1, 81)))
    layout.zero(np.array([0, 8, 9, 10, 11, 79]))
    assert list(layout.touched().runs()) == [(1, 8), (12, 79)]
    pages = layout.read(np.arange(80), np.empty((80, PAGE_BYTES), np.uint8))
    assert [int(page[0]) for page in pages] == [
        0 if index in {0, 8, 9, 10, 11, 79} else index + 1 for index in range(80)
    ]


def test_closing_a_layout_closes_every_block(layout: RamLayout) -> None:
    fds = [block.fd for block in layout.blocks]
    layout.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
