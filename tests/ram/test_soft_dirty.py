"""The soft-dirty log, for real where there are marks: in a guest, whose kernel is Debian's.

It boots once. There a script, over the very file that the companion uses, forks a writer, tells it what to
do, looks, and prints what it found; the tests judge it here. What needs no marks is tried on this host.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migd.lab import emulators
from migd.lab.debian import LabUnavailable
from migd.lab.image import image
from migd.ram import soft_dirty
from migd.ram.block import PAGE_BYTES
from migd.ram.soft_dirty import SoftDirty

ROUNDS = 20
BOOT_S = 240.0
"""It takes 12 s here; this only ends a test that hangs."""

SWAP_BYTES = 64 << 20
MARK = "FOUND "

GUEST = """
import ctypes, json, mmap, os, random, subprocess, sys
import soft_dirty

libc = ctypes.CDLL(None)
REMOVE, DONTNEED, PAGEOUT = 9, 4, 21

class Writer:
    def __init__(self, files):
        (self.commands, ours), (theirs, self.answers) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.serve(files)
            finally:
                os._exit(1)
        self.to, self.back = os.fdopen(ours, "w"), os.fdopen(theirs)
        addresses = json.loads(self.back.readline())
        self.log = soft_dirty.SoftDirty(self.pid, [(a, pages) for a, (_, pages) in zip(addresses, files)])

    def serve(self, files):
        maps = [mmap.mmap(fd, pages * 4096) for fd, pages in files]
        addresses = [ctypes.addressof(ctypes.c_char.from_buffer(memory)) for memory in maps]
        pages = [(memory, page) for memory, (_, count) in zip(maps, files) for page in range(count)]
        answers = os.fdopen(self.answers, "w")
        print(json.dumps(addresses), file=answers, flush=True)
        for line in os.fdopen(self.commands):
            do, numbers = json.loads(line)
            for number in numbers:
                memory, page = pages[number]
                at = page * 4096 + number % 4096
                if do == "write":
                    memory[at] = (memory[at] + 1) & 255
                elif do == "same":
                    memory[at] = memory[at]
                elif do == "read":
                    memory[at]
                else:
                    memory.madvise(do, page * 4096, 4096)
            if do == "lock":
                for memory, address in zip(maps, addresses):
                    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))):
                        raise OSError("mlock")
            print(file=answers, flush=True)

    def do(self, do, numbers=()):
        print(json.dumps([do, list(numbers)]), file=self.to, flush=True)
        assert self.back.readline(), "the writer died"

    def written(self):
        bits = self.log.written()
        return [8 * at + bit for at, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1]

    def harvest(self):
        found = self.written()
        self.log.clear()
        return found

def file(path, pages):
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, pages * 4096)
    return fd, pages

def memfd(pages):
    fd = os.memfd_create("ram")
    os.ftruncate(fd, pages * 4096)
    return fd, pages

def found(**what):
    print("FOUND " + json.dumps(what), flush=True)

def busybox(*command):
    subprocess.run(["/bin/busybox", *command], check=True, stdout=subprocess.DEVNULL)

files = [file("/tmp/a", 1), file("/tmp/b", 5000), file("/tmp/c", 20003), memfd(777)]
total = sum(pages for _, pages in files)
writer = Writer(files)
found(kernel=os.uname().release, supported=soft_dirty.supported())
found(obstacles=[writer.log.obstacle(fd) for fd, _ in files])
found(before_the_first_clear=len(writer.harvest()) == total)

rounds = []
for _ in range(ROUNDS):
    pages = set(random.sample(range(total), random.choice((0, 1, 17, 999, 9000, total))))
    if random.random() < 0.5:
        first = random.randrange(total)
        pages.update(range(first, min(total, first + random.randrange(3000))))
    writer.do("read", random.sample(range(total), 2000))
    writer.do("write", pages)
    writer.do("read", random.sample(range(total), 2000))
    seen = set(writer.harvest())
    rounds.append([len(pages), sorted(pages - seen)[:20], sorted(seen - pages)[:20]])
found(rounds=rounds)

def alone(name, *steps):
    writer.harvest()
    for step in steps:
        writer.do(*step)
    found(**{name: writer.harvest()})

alone("nothing")
alone("same", ["same", [3]])
alone("dropped", ["write", [4]], [DONTNEED, [4]])
alone("clean_and_dropped", [DONTNEED, [6]])
alone("punched", [REMOVE, [5]])
alone("dropped_and_read", ["write", [4, 9]], [DONTNEED, [4]], ["read", [4]])
writer.do("write", [11, 12])
found(twice=[writer.written(), writer.written()])
writer.do(DONTNEED, [13])
found(dropped_later=[writer.written(), writer.written()])
writer.log.clear()
writer.written()
writer.do("write", [7])
writer.log.clear()
found(written_between_look_and_clear=writer.harvest())

fresh = file("/tmp/filled", 100)
os.pwrite(fresh[0], b"x" * 409600, 0)
other = Writer([fresh])
other.log.clear()
other.do("write", [50])
found(of_a_file_that_somebody_else_filled=other.harvest())

busybox("mkswap", "/dev/vda")
busybox("swapon", "/dev/vda")
found(swap=[writer.log.obstacle(fd) for fd, _ in files])
alone("swapped_out", ["write", range(100, 200)], [PAGEOUT, range(100, 200)])
some = range(100, 200)
alone("swapped_out_and_read", ["write", some], [PAGEOUT, some], ["read", some])
writer.do("lock")
found(locked=[writer.log.obstacle(fd) for fd, _ in files])
busybox("swapoff", "/dev/vda")

os.mkdir("/tmp/huge")
busybox("mount", "-t", "tmpfs", "-o", "huge=within_size", "huge", "/tmp/huge")
huge = file("/tmp/huge/ram", 1024)
found(huge=Writer([huge]).log.obstacle(huge[0]))
found(not_in_memory=writer.log.obstacle(os.open("/proc/version", os.O_RDONLY)))

os.kill(writer.pid, 9)
os.waitpid(writer.pid, 0)
ended = []
for call in (writer.log.written, writer.log.clear):
    try:
        call()
    except ProcessLookupError:
        ended.append(True)
found(ended=ended)
"""


# -- in a guest -------------------------------------------------------------------------------------------

in_a_guest = pytest.mark.timeout(900)  # the first one downloads packages


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that the script in the guest printed."""
    script = GUEST.replace("ROUNDS", str(ROUNDS)).encode()
    extra = {"migd/workload.py": script, "migd/soft_dirty.py": Path(soft_dirty.__file__).read_bytes()}
    try:
        guest, emulator = image(extra), emulators.installed()
    except LabUnavailable as error:
        pytest.skip(f"no guest to try it in: {error}")
    directory = tmp_path_factory.mktemp("guest")
    console, swap = directory / "console", directory / "swap"
    with swap.open("wb") as file:
        file.truncate(SWAP_BYTES)
    subprocess.run(
        [
            *("setpriv", "--pdeathsig", "KILL", *emulator.command),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=single", "-cpu", "max", "-m", "512M"),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd)),
            *("-append", "console=ttyS0 panic=-1 quiet migd.agent=off"),
            *("-drive", f"if=virtio,format=raw,cache=unsafe,file={swap}"),
            *("-serial", f"file:{console}"),
        ],
        env={**os.environ, **emulator.environment},
        stdin=subprocess.DEVNULL,
        timeout=BOOT_S,
        check=True,
    )
    said = console.read_text(errors="replace")
    results: dict[str, Any] = {}
    for line in said.splitlines():
        if line.startswith(MARK):
            results |= json.loads(line.removeprefix(MARK))
    assert "ended" in results, said[-4000:]
    return results


@in_a_guest
def test_debians_kernel_has_the_marks_and_shared_memory_no_obstacle(found: dict[str, Any]) -> None:
    assert found["supported"] is True
    assert found["obstacles"] == [None] * 4
    assert found["before_the_first_clear"] is True


@in_a_guest
def test_every_look_has_exactly_what_was_written(found: dict[str, Any]) -> None:
    assert len(found["rounds"]) == ROUNDS
    for number, (_, missed, invented) in enumerate(found["rounds"]):
        assert (missed, invented) == ([], []), f"round {number} of {found['rounds']}"
    assert sum(count for count, _, _ in found["rounds"]) > 0
    assert found["nothing"] == []


@in_a_guest
def test_writing_what_is_there_already_is_a_write(found: dict[str, Any]) -> None:
    assert found["same"] == [3]


@in_a_guest
def test_a_page_that_the_process_drops_counts_as_written(found: dict[str, Any]) -> None:
    assert (found["dropped"], found["clean_and_dropped"], found["punched"]) == ([4], [6], [5])


@in_a_guest
def test_looking_twice_finds_the_same_and_more(found: dict[str, Any]) -> None:
    assert found["twice"] == [[11, 12], [11, 12]]
    assert found["dropped_later"] == [[11, 12, 13], [11, 12, 13]]


@in_a_guest
def test_what_somebody_else_filled_is_not_sent_again_and_again(found: dict[str, Any]) -> None:
    assert found["of_a_file_that_somebody_else_filled"] == [50]


@in_a_guest
def test_what_the_docstring_says_is_lost_is_lost(found: dict[str, Any]) -> None:
    """Not wanted, but why the process must hold still, and why there are obstacles."""
    assert found["written_between_look_and_clear"] == []
    assert found["dropped_and_read"] == [9]
    # Nearly all: the kernel may read a page in again of its own accord, and then it is lost as well.
    assert set(found["swapped_out"]) <= set(range(100, 200))
    assert len(found["swapped_out"]) > 90
    assert set(found["swapped_out_and_read"]) < set(range(100, 200))


@in_a_guest
def test_swap_is_an_obstacle_unless_the_memory_is_locked(found: dict[str, Any]) -> None:
    for reason in found["swap"]:
        assert "swap is on" in reason
        assert "-overcommit mem-lock=on" in reason
    assert found["locked"] == [None] * 4


@in_a_guest
def test_pages_that_may_become_huge_and_other_files_are_obstacles(found: dict[str, Any]) -> None:
    assert "merged into huge ones" in found["huge"]
    assert "not in memory" in found["not_in_memory"]


@in_a_guest
def test_a_process_that_has_ended_is_no_clean_one(found: dict[str, Any]) -> None:
    assert found["ended"] == [True, True]


# -- here -------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """32 MiB that are shared, and all there."""
    with mmap.mmap(-1, 32 << 20) as memory:
        memory[::PAGE_BYTES] = bytes(len(memory) // PAGE_BYTES)
        yield memory


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def pages_of(bits: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize("slice_pages", [1, 7, 1 << 10, 1 << 17])
@pytest.mark.parametrize(
    "shares",
    [[(0, 8192)], [(0, 1)], [(5, 3), (100, 1), (17, 8), (4000, 2051)], [(0, 0), (8, 9), (30, 0)], []],
)
def test_ranges_are_counted_through(
    memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch, shares: list[tuple[int, int]], slice_pages: int
) -> None:
    """A page that is dropped counts as written on any kernel, so the order of the bits shows here, too."""
    monkeypatch.setattr(soft_dirty, "_SLICE_PAGES", slice_pages)
    log = SoftDirty(
        os.getpid(), [(address_of(memory) + first * PAGE_BYTES, pages) for first, pages in shares]
    )
    log.clear()
    assert pages_of(log.written()) == set()
    numbers = [first + page for first, pages in shares for page in range(pages)]
    dropped = set(random.sample(range(len(numbers)), len(numbers) // 3))
    for number in dropped:
        memory.madvise(mmap.MADV_DONTNEED, numbers[number] * PAGE_BYTES, PAGE_BYTES)
    bits = log.written()
    assert len(bits) == (len(numbers) + 7) // 8
    assert pages_of(bits) == dropped
    log.clear()
    assert pages_of(log.written()) == set()
    log.close()


def test_without_marks_it_must_not_be_used() -> None:
    fd = os.memfd_create("ram")
    log = SoftDirty(os.getpid(), [])
    if soft_dirty.supported():
        assert log.obstacle(fd) is None or "swap is on" in (log.obstacle(fd) or "")
    else:
        assert log.obstacle(fd) == "this kernel has no soft-dirty marks"
    log.close()
    os.close(fd)


def test_no_process_of_that_number() -> None:
    with pytest.raises(FileNotFoundError):
        SoftDirty(2**22 + 1, [])


def test_a_process_that_ends_is_an_error_and_no_clean_page(memory: mmap.mmap) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        log = SoftDirty(process.pid, [(address_of(memory), 1)])
        process.kill()
    for call in (log.written, log.clear):
        with pytest.raises(ProcessLookupError) as caught:
            call()
        assert caught.value.errno == errno.ESRCH
    log.close()
    log.close()


def test_addresses_that_no_process_has_are_an_error() -> None:
    log = SoftDirty(os.getpid(), [(1 << 62, 4)])
    with pytest.raises(OSError, match="page table"):
        log.written()
    log.close()
