"""QemuProcess against real processes: what maps a file, how, and what is refused as a guest's RAM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.errors import GuestError
from migd.qemu import preload
from migd.qemu.process import QemuProcess, RamMapping, holder_of
from migd.ram.block import PAGE_BYTES
from tests.qemu.test_preload import (
    MIB,
    WAIT_S,
    Program,
    built,
    log_of,
    memory,
    needs_qemu,
    program,
    qemu,
    ram_file,
)
from tests.support.huge_pages import HUGE_BYTES, hugetlbfs, reserved

__all__ = ["built", "memory"]  # fixtures

SIZE = 4 * MIB


@pytest.fixture
def mapper() -> Iterator[Program]:
    """A process that maps what it is told, untracked."""
    with program(dict(os.environ)) as running:
        yield running


@pytest.fixture
def ram(memory: Path) -> Path:
    return ram_file(memory / "ram", SIZE)


@pytest.fixture
def fd(ram: Path) -> Iterator[int]:
    fd = os.open(ram, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def process(mapper: Program) -> Iterator[QemuProcess]:
    found = QemuProcess(mapper.pid)
    yield found
    found.close()


def areas_of(pid: int, path: Path) -> list[str]:
    """Its lines of /proc/PID/maps, by name: what the code under test does not look at."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if str(path) in line]


# -- where the RAM is -------------------------------------------------------------------------------------


def test_a_whole_shared_mapping_is_found(mapper: Program, process: QemuProcess, ram: Path, fd: int) -> None:
    mapper.do("map", str(ram), SIZE)
    (line,) = areas_of(mapper.pid, ram)
    assert process.mapping_of(fd) == RamMapping(int(line.split("-")[0], 16), SIZE)


def on_a_disk(tmp_path: Path) -> int:
    return os.open(ram_file(tmp_path / "ram", SIZE), os.O_RDWR)


def in_a_memfd(_tmp_path: Path) -> int:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, SIZE)
    return fd


@pytest.mark.parametrize("make", [on_a_disk, in_a_memfd])
def test_it_is_found_on_every_kind_of_file(tmp_path: Path, make: object) -> None:
    assert callable(make)
    fd = make(tmp_path)
    with program(dict(os.environ), pass_fds=(fd,)) as mapper:
        mapper.do("map", fd, SIZE)
        process = QemuProcess(mapper.pid)
        assert process.mapping_of(fd).bytes == SIZE
        assert holder_of(fd) == [mapper.pid]
        process.close()
    os.close(fd)


def test_it_is_found_in_huge_pages_and_takes_none(
    mapper: Program, process: QemuProcess, tmp_path: Path
) -> None:
    with reserved(2), hugetlbfs(tmp_path, 2) as directory:
        fd = os.open(ram_file(directory / "ram", 2 * HUGE_BYTES), os.O_RDWR)
        before = Path("/proc/self/maps").read_text().count("/ram")
        mapper.do("map", str(directory / "ram"), 2 * HUGE_BYTES)
        assert process.mapping_of(fd).bytes == 2 * HUGE_BYTES
        assert process.other_writers(fd) == []
        assert Path("/proc/self/maps").read_text().count("/ram") == before
        assert os.fstat(fd).st_blocks == 0
        os.close(fd)


def test_areas_that_the_kernel_split_are_one_mapping(
    mapper: Program, process: QemuProcess, ram: Path, fd: int
) -> None:
    mapper.do("map", str(ram), SIZE)
    mapper.do("advise", 0, "MADV_DONTFORK", MIB, MIB)
    assert len(areas_of(mapper.pid, ram)) == 3
    assert process.mapping_of(fd).bytes == SIZE


def test_a_deleted_file_is_found(mapper: Program, process: QemuProcess, ram: Path, fd: int) -> None:
    mapper.do("map", str(ram), SIZE)
    ram.unlink()
    assert process.mapping_of(fd).bytes == SIZE


def test_a_file_of_the_same_inode_on_another_file_system_is_another(
    mapper: Program, process: QemuProcess, tmp_path: Path
) -> None:
    """tmpfs counts from 1 in each mount, so this is the common case."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no tmpfs can be mounted here")
    try:
        one, other = (os.open(ram_file(place / "ram", SIZE), os.O_RDWR) for place in places)
        assert os.fstat(one).st_ino == os.fstat(other).st_ino
        mapper.do("map", str(places[1] / "ram"), SIZE)
        assert process.mapping_of(other).bytes == SIZE
        assert holder_of(one) == []
        with pytest.raises(GuestError, match="does not map"):
            process.mapping_of(one)
        os.close(one)
        os.close(other)
    finally:
        for place in places:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


# -- what is refused --------------------------------------------------------------------------------------


def test_a_file_that_is_not_mapped_is_refused(process: QemuProcess, ram: Path, fd: int) -> None:
    with pytest.raises(
        GuestError, match=rf"\(pid {process.pid}\) does not map {ram}: it is not this guest's"
    ):
        process.mapping_of(fd)


def test_a_private_mapping_is_refused(mapper: Program, process: QemuProcess, ram: Path, fd: int) -> None:
    mapper.do("map", str(ram), SIZE, "MAP_PRIVATE")
    with pytest.raises(GuestError, match=r"privately, .*share=on"):
        process.mapping_of(fd)
    assert holder_of(fd) == []


def test_a_private_mapping_beside_a_shared_one_is_refused(
    mapper: Program, process: QemuProcess, ram: Path, fd: int
) -> None:
    mapper.do("map", str(ram), SIZE)
    mapper.do("map", str(ram), SIZE, "MAP_PRIVATE")
    with pytest.raises(GuestError, match="privately"):
        process.mapping_of(fd)


def test_a_mapping_that_cannot_be_written_is_refused(
    mapper: Program, process: QemuProcess, ram: Path, fd: int
) -> None:
    mapper.do("map", str(ram), SIZE, "MAP_SHARED", True)
    with pytest.raises(GuestError, match="read-only: start it without readonly=on"):
        process.mapping_of(fd)


@pytest.mark.parametrize(("offset", "size"), [(0, SIZE), (MIB, MIB), (0, MIB), (SIZE - MIB, MIB)])
def test_a_second_mapping_of_any_part_is_refused(
    mapper: Program, process: QemuProcess, ram: Path, fd: int, offset: int, size: int
) -> None:
    mapper.do("map", str(ram), SIZE)
    mapper.do("map", str(ram), size, "MAP_SHARED", False, offset)
    with pytest.raises(GuestError, match=r"more than once, .*second mapping are not tracked"):
        process.mapping_of(fd)


@pytest.mark.parametrize(("offset", "size"), [(0, MIB), (MIB, MIB), (MIB, SIZE - MIB)])
def test_a_mapping_of_a_part_is_refused(
    mapper: Program, process: QemuProcess, ram: Path, fd: int, offset: int, size: int
) -> None:
    mapper.do("map", str(ram), size, "MAP_SHARED", False, offset)
    mapped = size if offset == 0 else 0
    with pytest.raises(GuestError, match=rf"only in part \(the first {mapped} bytes of {SIZE}\)"):
        process.mapping_of(fd)


def test_two_mappings_that_are_not_adjacent_are_refused(
    mapper: Program, process: QemuProcess, ram: Path, fd: int
) -> None:
    """In the order of the file, but with other memory between."""
    mapper.do("map_apart", str(ram), MIB, SIZE)
    with pytest.raises(GuestError, match="in pieces"):
        process.mapping_of(fd)


def test_a_file_that_nothing_can_be_read_of_is_refused(process: QemuProcess, memory: Path) -> None:
    fd = os.open(memory / "empty", os.O_RDWR | os.O_CREAT)
    with pytest.raises(GuestError, match=r"empty cannot be RAM"):
        process.mapping_of(fd)
    os.close(fd)


# -- who else writes --------------------------------------------------------------------------------------


def test_every_other_writer_is_found(mapper: Program, process: QemuProcess, ram: Path, fd: int) -> None:
    mapper.do("map", str(ram), SIZE)
    assert process.other_writers(fd) == []
    with program(dict(os.environ)) as other, program(dict(os.environ)) as reader:
        other.do("map", str(ram), MIB, "MAP_SHARED", False, MIB)
        reader.do("map", str(ram), SIZE, "MAP_SHARED", True)
        reader.do("map", str(ram), SIZE, "MAP_PRIVATE")
        (writer,) = process.other_writers(fd)
        assert writer.pid == other.pid
        assert writer.command.startswith(f"{sys.executable} -c")
        assert process.other_writers(fd, but=[other.pid]) == []
        assert holder_of(fd) == sorted([mapper.pid, other.pid])
    assert process.other_writers(fd) == []


def test_a_forked_child_is_another_writer(mapper: Program, process: QemuProcess, ram: Path, fd: int) -> None:
    mapper.do("map", str(ram), SIZE)
    child = mapper.do("fork")
    assert [writer.pid for writer in process.other_writers(fd)] == [child]


def test_a_process_that_shares_all_memory_is_no_other_writer(
    mapper: Program, process: QemuProcess, ram: Path, fd: int
) -> None:
    mapper.do("map", str(ram), SIZE)
    fifo = ram.with_name("fifo")
    os.mkfifo(fifo)
    mapper.begin("spawn", str(fifo))
    deadline = time.monotonic() + WAIT_S
    while len(holder_of(fd)) < 2:
        assert time.monotonic() < deadline, "the child has not begun"
    assert process.other_writers(fd) == []
    os.close(os.open(fifo, os.O_WRONLY))
    mapper.answer()


def test_looking_for_writers_takes_next_to_no_time(process: QemuProcess, fd: int) -> None:
    """It is done while a guest stands still. The bound is a hundred times what it takes here."""
    fastest = min(timed(lambda: process.other_writers(fd)) for _ in range(5))
    assert fastest < 0.5


def timed(call: object) -> float:
    assert callable(call)
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


# -- life and permission ----------------------------------------------------------------------------------


def test_it_knows_when_the_process_has_ended(ram: Path, fd: int) -> None:
    with program(dict(os.environ)) as mapper:
        mapper.do("map", str(ram), SIZE)
        process = QemuProcess(mapper.pid)
        mapping = process.mapping_of(fd)
        assert process.alive
        os.kill(mapper.pid, 9)
        while process.alive:  # a zombie already: nobody has waited for it
            time.sleep(0.001)
        for look in (lambda: process.mapping_of(fd), process.open_pagemap, lambda: process.tracked(mapping)):
            with pytest.raises(GuestError, match="has ended"):
                look()
    for look in (lambda: process.mapping_of(fd), process.open_pagemap, lambda: process.tracked(mapping)):
        with pytest.raises(GuestError, match="has ended"):
            look()
    process.close()


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**40])
def test_a_number_that_is_no_process_is_refused(pid: int) -> None:
    with pytest.raises(GuestError, match=f"there is no process {pid}"):
        QemuProcess(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_without_permission_it_says_whose_it_takes(mapper: Program, ram: Path) -> None:
    mapper.do("map", str(ram), SIZE)
    code = f"""
import os
from migd.errors import GuestError
from migd.qemu.process import QemuProcess, holder_of
fd = os.open({str(ram)!r}, os.O_RDWR)
process = QemuProcess({mapper.pid})
os.setresuid(65534, 65534, 65534)
for look in (lambda: process.mapping_of(fd), process.open_pagemap):
    try:
        look()
    except GuestError as error:
        print(error)
print(holder_of(fd))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    maps, pagemap, holders = done.stdout.splitlines()
    for file, said in (("maps", maps), ("pagemap", pagemap)):
        assert said.startswith(f"/proc/{mapper.pid}/{file}: Permission denied: this must run as root, or as")
    assert holders == "[]"


# -- tracked ----------------------------------------------------------------------------------------------


def test_a_mapping_that_is_tracked_only_in_part_is_not_tracked(built: Path, ram: Path, fd: int) -> None:
    with program(preload.environment(os.environ, [ram], preload=built)) as mapper:
        mapper.do("map", str(ram), SIZE)
        process = QemuProcess(mapper.pid)
        mapping = process.mapping_of(fd)
        assert process.tracked(mapping)
        assert not process.tracked(RamMapping(mapping.address - PAGE_BYTES, SIZE))
        assert not process.tracked(RamMapping(mapping.address, SIZE + MIB))
        # The library is made for shared files; a part mapped anew behind its back is not registered.
        mapper.do("map_raw_over", 0, str(ram), MIB)
        assert process.mapping_of(fd) == mapping
        assert not process.tracked(mapping)
        process.close()


def test_looking_changes_nothing(built: Path, ram: Path, fd: int) -> None:
    with program(preload.environment(os.environ, [ram], preload=built)) as mapper:
        mapper.do("map", str(ram), SIZE)
        with log_of(mapper.pid, ram) as harvest:
            process = QemuProcess(mapper.pid)
            mapper.do("write", 0, [3, 5])
            assert process.tracked(process.mapping_of(fd))
            mapper.do("write", 0, [7])
            assert harvest() == {3, 5, 7}
            process.close()


@needs_qemu
def test_a_stock_qemu_with_private_ram_is_refused(memory: Path) -> None:
    ram = ram_file(memory / "ram", 64 * MIB)
    fd = os.open(ram, os.O_RDWR)
    with qemu(ram, 64 * MIB, dict(os.environ), share="off") as guest:
        process = QemuProcess(guest.pid)
        with pytest.raises(GuestError, match=r"privately, .*share=on"):
            process.mapping_of(fd)
        process.close()
    os.close(fd)


@needs_qemu
def test_two_stock_qemus_on_one_file_know_of_each_other(memory: Path) -> None:
    ram = ram_file(memory / "ram", 64 * MIB)
    fd = os.open(ram, os.O_RDWR)
    env = dict(os.environ)
    with qemu(ram, 64 * MIB, env) as guest, qemu(ram, 64 * MIB, env) as second:
        process = QemuProcess(guest.pid)
        assert process.mapping_of(fd).bytes == 64 * MIB
        (writer,) = process.other_writers(fd)
        assert writer.pid == second.pid
        assert writer.command.startswith(shutil.which("qemu-system-x86_64") or "")
        assert holder_of(fd) == sorted([guest.pid, second.pid])
        process.close()
    os.close(fd)
