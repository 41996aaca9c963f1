"""RamImage and its journal: digests from the file itself, whatever is hole, data or free in it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.errors import ConfigError, GuestError
from migd.guest.allocator import PageAllocator
from migd.guest.content import FileContent
from migd.guest.control import Block, GuestState
from migd.guest.guest import Guest
from migd.guest.image import ImageJournal, RamImage, short_runs
from migd.guest.machine import PAGE_BYTES, Machine, page_digest
from migd.guest.mapping import RamMapping
from migd.guest.options import GuestOptions
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract

PAGES = 5003
DATA = [(0, 3), (700, 701), (1200, 2500), (4990, 5003)]
FREE = [(1, 2), (700, 702), (2000, 2100), (3000, 4500), (5002, 5003)]


def page_of(page: int) -> bytes:
    return page.to_bytes(2, "little") * (PAGE_BYTES // 2)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A sparse image, and the bitmap of its free pages."""
    image, bits = tmp_path / "ram.img", tmp_path / "free.bits"
    with image.open("wb") as file:
        file.truncate(PAGES * PAGE_BYTES)
        for start, stop in DATA:
            file.seek(start * PAGE_BYTES)
            file.write(b"".join(page_of(page) for page in range(start, stop)))
    bits.write_bytes(PageBitmap.from_runs(PAGES, FREE).to_bytes())
    return str(image), str(bits)


_mapped: list[RamMapping] = []


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    for mapping in _mapped:
        mapping.close()
    _mapped.clear()


def journal_of(image: RamImage) -> tuple[Machine, ImageJournal]:
    mapping = RamMapping([image.block], [image.fd], read_only=True)
    _mapped.append(mapping)
    allocator = PageAllocator.from_free_bits(image.free_bits, image.pages)
    machine = Machine(mapping.memory, FreeContract.ANYTHING, allocator)
    return machine, ImageJournal(image.fd, machine)


def test_the_digest_of_every_page_in_use_is_that_of_the_file(files: tuple[str, str]) -> None:
    image = RamImage(*files)
    assert image.pages == PAGES
    machine, journal = journal_of(image)
    assert machine.allocator.free_bits() == Path(files[1]).read_bytes()
    assert machine.allocator.free_pages == sum(stop - start for start, stop in FREE)
    allocated = os.stat(files[0]).st_blocks
    journal.run(math.inf, time.monotonic)
    assert journal.complete
    raw = Path(files[0]).read_bytes()
    for start, stop in machine.allocator.owned_runs():
        for page in range(start, stop):
            assert machine.digest(page) == page_digest(raw[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]), page
    assert os.stat(files[0]).st_blocks == allocated, "reading a sparse file does not fill it"


def test_it_is_read_in_slices(files: tuple[str, str]) -> None:
    _, journal = journal_of(RamImage(*files))
    fractions = []
    while not journal.complete:
        journal.run(0.0, time.monotonic)
        fractions.append(journal.fraction)
    assert len(fractions) > 5
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_without_a_bitmap_every_page_is_in_use(files: tuple[str, str]) -> None:
    image = RamImage(files[0])
    machine, _ = journal_of(image)
    assert machine.allocator.owned_pages == PAGES


def test_a_file_that_shrinks_while_it_is_read(files: tuple[str, str]) -> None:
    for size in (PAGES * PAGE_BYTES - 1, 1300 * PAGE_BYTES, 0):
        _, journal = journal_of(RamImage(*files))
        os.truncate(files[0], size)
        with pytest.raises(GuestError, match=f"the image has shrunk below {PAGES} pages"):
            journal.run(math.inf, time.monotonic)
        os.truncate(files[0], PAGES * PAGE_BYTES)


def test_a_guest_pauses_with_all_digests_though_it_had_just_begun(files: tuple[str, str]) -> None:
    options = GuestOptions(daemon="/nowhere", name="vm1", image=files[0], free=files[1])
    plan = options.plan()
    guest = Guest(GuestState.RUNNING, "")
    guest.serve(RamImage(*files), FileContent(plan.fill), plan)
    assert not guest.ready
    state, free = guest.pause("m1")
    assert guest.ready
    assert free == Path(files[1]).read_bytes()
    with pytest.raises(GuestError, match="cannot write its RAM"):
        guest.arm()
    guest.close()
    # ... and at the destination, on RAM with the right pages in it, it finds nothing wrong.
    raw = bytearray(Path(files[0]).read_bytes())
    for start, stop in FREE:
        raw[start * PAGE_BYTES : stop * PAGE_BYTES] = bytes((stop - start) * PAGE_BYTES)
    for lost in ([], [2499]):
        fd = os.memfd_create("ram")
        for page in lost:
            raw[page * PAGE_BYTES] ^= 1
        os.pwrite(fd, raw, 0)
        arrived = Guest(GuestState.INCOMING, "m1")
        arrived.adopt_ram([Block("ram", PAGES)], [fd])
        arrived.load(state)
        arrived.start()
        while (report := arrived.work()) is None:
            pass
        assert report.pages == PAGES - sum(stop - start for start, stop in FREE)
        assert report.wrong == len(lost)
        arrived.close()


def test_an_image_that_is_free_from_end_to_end_arrives(tmp_path: Path) -> None:
    image, bits = tmp_path / "ram", tmp_path / "bits"
    image.write_bytes(bytes(16 * PAGE_BYTES))
    bits.write_bytes(b"\xff\xff")
    plan = GuestOptions(daemon="/nowhere", name="vm1", image=str(image), free=str(bits)).plan()
    guest = Guest(GuestState.RUNNING, "")
    guest.serve(RamImage(str(image), str(bits)), FileContent(plan.fill), plan)
    state, _ = guest.pause("m1")
    guest.close()
    fd = os.memfd_create("ram")
    os.ftruncate(fd, 16 * PAGE_BYTES)
    arrived = Guest(GuestState.INCOMING, "m1")
    arrived.adopt_ram([Block("ram", 16)], [fd])
    arrived.load(state)
    arrived.start()
    assert arrived.machine is not None
    assert arrived.machine.allocator.owned_pages == 0
    arrived.close()


def test_runs_are_cut_to_what_a_workload_keeps() -> None:
    assert list(short_runs(iter([(0, 1), (5, 133)]))) == [(0, 1), (5, 69), (69, 133)]


@pytest.mark.parametrize(
    ("size", "bits", "why"),
    [
        (0, None, "--image .*: 0 bytes are not a positive multiple of 4096"),
        (4097, None, "--image .*: 4097 bytes are not a positive multiple of 4096"),
        (9 * 4096, b"\xff", "--free .*: 1 bytes instead of 2, one bit for each of 9 pages"),
        (9 * 4096, b"\xff\x01\x00", "--free .*: more bytes instead of 2"),
        (9 * 4096, b"\xff\x02", "--free .*: bits are set behind that of the last page, 8"),
        (9 * 4096, b"", "--free .*: 0 bytes instead of 2"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, size: int, bits: bytes | None, why: str) -> None:
    image, free = tmp_path / "ram", tmp_path / "bits"
    image.write_bytes(bytes(size))
    if bits is not None:
        free.write_bytes(bits)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=why):
        RamImage(str(image), "" if bits is None else str(free))
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_not_there(tmp_path: Path) -> None:
    image = tmp_path / "ram"
    with pytest.raises(ConfigError, match=f"--image {image}: No such file"):
        RamImage(str(image))
    with pytest.raises(ConfigError, match=f"--image {tmp_path}: not a regular file"):
        RamImage(str(tmp_path))
    image.write_bytes(bytes(4096))
    with pytest.raises(ConfigError, match=f"--free {tmp_path}/bits: No such file"):
        RamImage(str(image), str(tmp_path / "bits"))
