"""RamMapping: several files as one stretch of memory, each still a mapping that the kernel tracks."""

from __future__ import annotations

import mmap
import os
import random
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from migd.errors import GuestError
from migd.guest.control import Block
from migd.guest.machine import Machine
from migd.guest.mapping import RamMapping
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.contract import FreeContract
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection

SIZES = [7, 1, 130]
BLOCKS = [Block(f"ram{number}", pages) for number, pages in enumerate(SIZES)]
PAGES = sum(SIZES)


def memfd(pages: int) -> int:
    return RamBlock.create(BlockShape("ram", pages)).fd


def tmpfs_file(pages: int) -> int:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, pages * PAGE_BYTES)
    return fd


@pytest.fixture
def mapping() -> Iterator[RamMapping]:
    made = RamMapping(BLOCKS, [memfd(pages) for pages in SIZES])
    yield made
    made.close()


def content_of(mapping: RamMapping) -> bytes:
    return b"".join(os.pread(fd, pages * PAGE_BYTES, 0) for fd, pages in zip(mapping.fds, SIZES, strict=True))


def test_it_is_one_stretch_and_every_block_lies_in_it(mapping: RamMapping) -> None:
    assert len(mapping.memory) == PAGES * PAGE_BYTES
    places = mapping.places()
    assert [length for _, length in places] == [pages * PAGE_BYTES for pages in SIZES]
    for (address, length), (following, _) in pairwise(places):
        assert address + length == following


def test_a_forked_child_does_not_inherit_it(mapping: RamMapping) -> None:
    """The kernel logs no write of a child to the same pages (W13)."""
    places = [f"{address:x}-" for address, _ in mapping.places()]
    assert all(place in Path("/proc/self/maps").read_text() for place in places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it does nothing that a thread could hold up
        pid = os.fork()
    if not pid:
        maps = Path("/proc/self/maps").read_text()
        os._exit(any(place in maps for place in places))
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_write_across_two_borders_is_one_slice(mapping: RamMapping) -> None:
    data = random.Random(1).randbytes(4 * PAGE_BYTES)
    mapping.memory[6 * PAGE_BYTES : 10 * PAGE_BYTES] = data
    expected = bytes(6 * PAGE_BYTES) + data + bytes((PAGES - 10) * PAGE_BYTES)
    assert content_of(mapping) == expected == mapping.memory[:]


def test_what_others_write_to_a_file_is_there(mapping: RamMapping) -> None:
    os.pwrite(mapping.fds[1], b"one", 0)
    assert mapping.memory[7 * PAGE_BYTES : 7 * PAGE_BYTES + 3] == b"one"


def test_a_machine_works_over_the_borders(mapping: RamMapping) -> None:
    machine = Machine(mapping.memory, FreeContract.ZERO)
    run = machine.allocate(64, 0)
    assert run == (0, 64)
    data = bytearray(random.Random(2).randbytes(64 * PAGE_BYTES))
    machine.write(0, memoryview(data), stamp=True)
    assert content_of(mapping)[: 64 * PAGE_BYTES] == data
    machine.free(0, 64)
    assert machine.allocate(64, 0) == (0, 64)
    assert machine.wrong_pages == 0


@pytest.mark.parametrize("make", [memfd, tmpfs_file], ids=["memfd", "tmpfs"])
def test_the_dirty_log_of_several_blocks_is_exactly_what_was_written(make: object) -> None:
    assert callable(make)
    mapping = RamMapping(BLOCKS, [make(pages) for pages in SIZES])
    places = mapping.places()
    protection = WriteProtection(places)
    firsts = [0, *(sum(SIZES[: number + 1]) for number in range(len(SIZES) - 1))]
    ranges = [
        ArmedRange(address, length // PAGE_BYTES, first)
        for (address, length), first in zip(places, firsts, strict=True)
    ]
    log = KernelDirtyLog(os.dup(protection.pagemap_fd), ranges, PAGES)
    log.begin()
    rng = random.Random(3)
    for _ in range(100):
        start = rng.randrange(PAGES)
        stop = rng.randrange(start, min(PAGES, start + 12)) + 1
        mapping.memory[start * PAGE_BYTES : stop * PAGE_BYTES] = b"x" * ((stop - start) * PAGE_BYTES)
        assert list(log.collect().runs()) == [(start, stop)]
    log.close()
    protection.close()
    mapping.close()


def test_a_file_on_disk_is_tracked_too(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 64 * PAGE_BYTES)
    mapping = RamMapping([Block("ram", 64)], [os.open(path, os.O_RDWR)])
    protection = WriteProtection(mapping.places())
    log = KernelDirtyLog(os.dup(protection.pagemap_fd), [ArmedRange(mapping.places()[0][0], 64, 0)], 64)
    log.begin()
    for page in (0, 63, 5):
        mapping.memory[page * PAGE_BYTES] = 1
        os.fsync(mapping.fds[0])  # writing back cleans the page, and must not clean the log
        assert list(log.collect().runs()) == [(page, page + 1)]
    log.close()
    protection.close()
    mapping.close()


@pytest.mark.parametrize("wrong", range(3))
def test_a_file_of_another_size_is_refused_and_stays_its_owner_s(wrong: int) -> None:
    fds = [memfd(pages + (number == wrong)) for number, pages in enumerate(SIZES)]
    before = Path("/proc/self/maps").read_text().count("migd-ram")
    with pytest.raises(GuestError, match=f"'ram{wrong}': {SIZES[wrong]} pages announced"):
        RamMapping(BLOCKS, fds)
    assert Path("/proc/self/maps").read_text().count("migd-ram") == before
    for fd in fds:
        os.close(fd)


def test_a_descriptor_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(8 * PAGE_BYTES))
    fds = [memfd(7), os.open(path, os.O_WRONLY)]
    with pytest.raises(GuestError, match=r"cannot be mapped: .*Permission denied"):
        RamMapping([Block("a", 7), Block("b", 8)], fds)
    for fd in fds:
        os.close(fd)


def test_closing_lets_go_of_addresses_and_descriptors() -> None:
    mapping = RamMapping(BLOCKS, [memfd(pages) for pages in SIZES])
    fds = mapping.fds
    address = mapping.places()[2][0]
    mapping.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_what_is_read_only_cannot_be_stored_to() -> None:
    fd = memfd(8)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    mapping = RamMapping([Block("ram", 8)], [again], read_only=True)
    os.pwrite(fd, b"there", 0)
    assert mapping.memory[:5] == b"there"
    with pytest.raises(TypeError):
        mapping.memory[0] = 1
    assert isinstance(mapping.memory, mmap.mmap)
    mapping.close()
    os.close(fd)
