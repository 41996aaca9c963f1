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
from migd.ram.backing import Backing
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.layout import RamLayout
from tests.support.placing import put_pages

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
    put_pages(block, np.array([(1 << 27) - 1]), content(7))
    assert block.touched(0, block.pages) == [((1 << 27) - 1, 1 << 27)]
    assert allocated_pages(block) == 1
    block.close()


def test_a_block_handed_back_is_the_same_memory(block: RamBlock) -> None:
    put_pages(block, np.array([5]), content(9))
    again = RamBlock.adopt(block.shape, os.dup(block.fd))
    assert again.view[5].tobytes() == content(9).tobytes()
    assert again.shape == block.shape
    again.close()


def _file(tmp_path: Path, flags: int = os.O_RDWR, pages: int = SHAPE.pages) -> int:
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, pages * PAGE_BYTES)
    return os.open(path, flags)


def _reopened(flags: int) -> int:
    fd = memfd(SHAPE.pages)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


REFUSED: list[tuple[str, Callable[[Path], int], str]] = [
    ("a page short", lambda _: memfd(SHAPE.pages - 1), "8 pages announced, the file has 28672 bytes"),
    ("a page long", lambda _: memfd(SHAPE.pages + 1), "8 pages announced, the file has 36864 bytes"),
    ("write-sealed", lambda _: memfd(SHAPE.pages, SEALS | fcntl.F_SEAL_WRITE), "read and written through"),
    ("write-sealed for later", lambda _: memfd(SHAPE.pages, SEALS | 0x10), "read and written through"),
    ("read-only", lambda _: _reopened(os.O_RDONLY), "cannot be read and written through"),
    ("write-only", lambda path: _file(path, os.O_WRONLY), "cannot be read and written through"),
    ("appended to", lambda path: _file(path, os.O_RDWR | os.O_APPEND), "O_APPEND"),
    ("direct", lambda path: _file(path, os.O_RDWR | os.O_DIRECT), "O_DIRECT"),
    ("a mere path", lambda path: _file(path, os.O_PATH), "O_PATH"),
    ("a device", lambda _: os.open("/dev/zero", os.O_RDWR), "no regular file"),
    ("a directory", lambda path: os.open(path, os.O_RDONLY), "no regular file"),
    ("a pipe", lambda _: os.pipe()[0], "no regular file"),
    ("an eventfd", lambda _: os.eventfd(0), "no regular file"),
]


@pytest.mark.parametrize(("name", "make", "why"), REFUSED, ids=[row[0] for row in REFUSED])
def test_adopt_refuses_and_leaves_the_descriptor_to_its_owner(
    name: str, make: Callable[[Path], int], why: str, tmp_path: Path
) -> None:
    fd = make(tmp_path)
    with pytest.raises(GuestError, match=f"RAM block 'ram': .*{why}"):
        RamBlock.adopt(SHAPE, fd)
    os.close(fd)  # still open


UNSEALED: list[tuple[str, Callable[[Path], int]]] = [
    ("no seals", lambda _: memfd(SHAPE.pages, 0)),
    ("seals not allowed", lambda _: memfd(SHAPE.pages, 0, 0)),
    ("later seals possible", lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)),
    ("may grow", lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)),
    ("may shrink", lambda _: memfd(SHAPE.pages, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)),
    ("a file on disk", _file),
    ("a file on tmpfs", lambda _: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)),
]


@pytest.mark.parametrize(("name", "make"), UNSEALED, ids=[row[0] for row in UNSEALED])
def test_what_others_may_resize_is_adopted_as_a_file_and_never_mapped(
    name: str, make: Callable[[Path], int], tmp_path: Path
) -> None:
    fd = make(tmp_path)
    if not os.fstat(fd).st_size:
        os.ftruncate(fd, SHAPE.bytes)
    block = RamBlock.adopt(SHAPE, fd)
    assert block.backing is Backing.FILE
    put_pages(block, np.array([2, 3, 7]), content(1, 2, 3))
    out = np.empty((8, PAGE_BYTES), np.uint8)
    assert block.read(np.arange(8), out)[:, 9].tolist() == [0, 0, 1, 2, 0, 0, 0, 3]
    assert block.touched(0, 8) == [(2, 4), (7, 8)]
    with pytest.raises(AssertionError, match="never mapped"):
        _ = block.view
    maps = Path("/proc/self/maps").read_text()
    assert str(os.fstat(fd).st_ino) not in {line.split()[4] for line in maps.splitlines()}
    block.close()


@pytest.mark.parametrize("name", ["memfd", "disk"])
def test_ram_that_is_only_read(name: str, tmp_path: Path) -> None:
    fd = _reopened(os.O_RDONLY) if name == "memfd" else _file(tmp_path, os.O_RDONLY)
    block = RamBlock.adopt(SHAPE, fd, read_only=True)
    assert not block.read(np.array([0, 5]), np.ones((2, PAGE_BYTES), np.uint8)).any()
    for change in (
        lambda: put_pages(block, np.array([1]), content(1)),
        lambda: block.zero(0, 1),
    ):
        with pytest.raises(GuestError, match="'ram' was brought to be read only"):
            change()
    assert block.promised_bytes == 0
    block.close()


def test_ram_that_is_only_read_must_come_without_a_way_to_write_it(tmp_path: Path) -> None:
    for fd in (_file(tmp_path), memfd(SHAPE.pages)):
        with pytest.raises(GuestError, match="said never to be written, but"):
            RamBlock.adopt(SHAPE, fd, read_only=True)
        os.close(fd)


def test_a_file_that_shrinks_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """Not zeros and not holes either: nothing would say that content was lost."""
    fd = _file(tmp_path)
    block = RamBlock.adopt(SHAPE, fd)
    put_pages(block, np.arange(8), content(*range(1, 9)))
    out = np.empty((8, PAGE_BYTES), np.uint8)
    os.ftruncate(fd, 5 * PAGE_BYTES + 100)
    assert block.read(np.arange(5), out)[4, 0] == 5
    for pages in ([5], [6], [4, 5], [0, 7]):
        with pytest.raises(GuestError, match="'ram': the file has shrunk below 8 pages"):
            block.read(np.array(pages), out)
    for start in (0, 5, 6):
        with pytest.raises(GuestError, match="has shrunk below 8 pages"):
            block.touched(start, 8)
    block.close()


def test_what_a_new_file_cannot_be_made_of_is_an_error_that_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match="RAM block 'ram' of 8 pages: Bad file descriptor"):
        RamBlock.create_in(SHAPE, lambda: os.dup(-1))
    with pytest.raises(ResourceError, match="RAM block 'ram' of 8 pages: Invalid argument"):
        RamBlock.create_in(SHAPE, lambda: os.eventfd(0))
    assert len(os.listdir("/proc/self/fd")) == before


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
    put_pages(block, np.array([0, 1, 5, 40, 63]), content(1, 2, 0, 4, 5))
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
    put_pages(block, np.arange(64), content(*range(1, 65)))
    block.zero(3, 10)
    assert allocated_pages(block) == 64 - 7
    assert block.touched(0, block.pages) == [(0, 3), (10, 64)]
    with mmap.mmap(block.fd, block.bytes) as guest:
        assert guest[3 * PAGE_BYTES : 10 * PAGE_BYTES] == bytes(7 * PAGE_BYTES)
        assert guest[2 * PAGE_BYTES] == 3
        assert guest[10 * PAGE_BYTES] == 11


# -- reading and writing --------------------------------------------------------------------------------


def test_read_is_a_private_copy(block: RamBlock) -> None:
    put_pages(block, np.array([4]), content(1))
    out = np.empty((3, PAGE_BYTES), np.uint8)
    rows = block.read(np.array([4]), out)
    assert rows.shape == (1, PAGE_BYTES)
    put_pages(block, np.array([4]), content(2))
    assert rows.tobytes() == content(1).tobytes()


def test_write_goes_exactly_where_it_should(block: RamBlock) -> None:
    indices = np.array([0, 1, 2, 7, 9, 10, 63])
    put_pages(block, indices, content(*range(1, 8)))
    expected = np.zeros((64, PAGE_BYTES), np.uint8)
    expected[indices] = content(*range(1, 8))
    assert os.pread(block.fd, block.bytes, 0) == expected.tobytes()


def test_write_takes_rows_of_a_larger_buffer(block: RamBlock) -> None:
    scratch = content(1, 2, 3, 4)
    put_pages(block, np.array([8, 20]), scratch)
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
    put_pages(layout, at, pages)
    expected = np.zeros((80, PAGE_BYTES), np.uint8)
    expected[at] = pages
    low, high = layout.blocks
    assert os.pread(low.fd, low.bytes, 0) == expected[:10].tobytes()
    assert os.pread(high.fd, high.bytes, 0) == expected[10:].tobytes()
    assert layout.touched().indices().tolist() == indices
    assert np.array_equal(layout.read(at, np.full((80, PAGE_BYTES), 255, np.uint8)), pages)


class CountedSeeks(RamBlock):
    """How often the kernel is asked where an extent ends: it walks there, page by page."""

    seeks = 0

    def _seek(self, offset: int, whence: int) -> int | None:
        self.seeks += 1
        return super()._seek(offset, whence)


def test_touched_pages_of_a_scattered_set_are_found_in_one_pass() -> None:
    # Run by run, a guest of 2 GiB that was hinted in 60000 pieces had its RAM walked through 60000 times.
    block = CountedSeeks.create(BlockShape("ram", 256))
    put_pages(block, np.arange(8, 250), content(*([1] * 242)))
    layout = RamLayout([block])
    within = PageBitmap.of(256, range(1, 256, 2))
    assert layout.touched(within) == PageBitmap.of(256, range(9, 250, 2))
    assert block.seeks <= 4
    assert not layout.touched(PageBitmap(256))
    layout.close()


def test_zero_crosses_the_border_between_blocks(layout: RamLayout) -> None:
    put_pages(layout, np.arange(80), content(*range(1, 81)))
    layout.zero([(0, 1), (8, 12), (79, 80)])
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


@pytest.mark.parametrize("runs", [[(0, 20)], [(0, 1), (2, 3), (9, 20)], [(7, 9)], []])
@pytest.mark.parametrize("sealed", [True, False])
def test_looking_at_runs_shows_all_of_their_pages_in_order(runs: list[tuple[int, int]], sealed: bool) -> None:
    """Over the border between two blocks, mapped or read."""
    blocks = []
    for shape in (BlockShape("low", 8), BlockShape("high", 12)):
        if sealed:
            blocks.append(RamBlock.create(shape))
            continue
        fd = os.memfd_create("unsealed")
        os.ftruncate(fd, shape.bytes)
        blocks.append(RamBlock.adopt(shape, fd))
    layout = RamLayout(blocks)
    pages = np.random.default_rng(5).integers(0, 256, (20, 4096), np.uint8)
    put_pages(layout, np.arange(20), pages)
    seen = np.concatenate([np.zeros((0, 4096), np.uint8), *layout.look(runs)])
    assert (seen == pages[[page for run in runs for page in range(*run)]]).all()
    with pytest.raises(IndexError):
        list(layout.look([(19, 21)]))
    layout.close()
