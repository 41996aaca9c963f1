"""The kernel's dirty log, for real: a child process arms its own mapping and writes on command.

The parent is the daemon: it holds the RAM and the child's pagemap descriptor (SCM_RIGHTS), and compares
every harvest with what it told the child to write, exactly: nothing lost, nothing invented.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gzip
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migd.errors import GuestError, LiveUnsupported
from migd.ram import linux, soft_dirty
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection
from tests.support.placing import put_pages

COUNT = struct.Struct("<cI")
"""Command, and how many u32 page numbers follow; W: an iteration number comes first."""


def serve(sock: socket.socket, ram_fd: int, pages: int) -> None:
    """The child: a guest without a mind of its own."""
    mapping = mmap.mmap(ram_fd, pages * PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    protection: WriteProtection | None = None
    while head := sock.recv(COUNT.size, socket.MSG_WAITALL):
        command, count = COUNT.unpack(head)
        numbers = struct.unpack(f"<{count}I", sock.recv(4 * count, socket.MSG_WAITALL)) if count else ()
        if command == b"A":
            protection = WriteProtection([(address, pages * PAGE_BYTES)])
            socket.send_fds(sock, [struct.pack("<Q", address)], [protection.pagemap_fd])
            continue
        if command == b"D":
            assert protection is not None
            protection.close()
        elif command == b"W":
            for page in numbers[1:]:
                struct.pack_into("<I", mapping, page * PAGE_BYTES, numbers[0])
        elif command == b"R":
            for page in numbers:
                mapping[page * PAGE_BYTES]
        elif command == b"Z":  # the kernel writes, through the armed mapping
            with open("/dev/zero", "rb", buffering=0) as zeros:
                for page in numbers:
                    zeros.readinto(memoryview(mapping)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
        sock.sendall(b"k")


class Child:
    """The guest process and what the daemon knows of it."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.ram = RamBlock.create(BlockShape("ram", pages))
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(20)
        code = (
            "import socket, sys; from tests.ram.test_dirty_log import serve;"
            f"serve(socket.socket(fileno={theirs.fileno()}), {self.ram.fd}, {pages})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(), self.ram.fd),
            cwd=Path(__file__).resolve().parents[2],
        )
        theirs.close()
        self.address = 0
        self.log: KernelDirtyLog | None = None

    def arm(self) -> KernelDirtyLog:
        """Arm; and one harvest, since it is the first scan that protects what was written before."""
        self._send(b"A", ())
        data, fds, _, _ = socket.recv_fds(self._sock, 8, 1)
        assert data, "the child could not arm: its kernel lacks asynchronous write-protection"
        (self.address,) = struct.unpack("<Q", data)
        if self.log is not None:
            self.log.close()
        self.log = KernelDirtyLog(fds[0], [ArmedRange(self.address, self.pages, 0)], self.pages)
        self.log.collect()
        return self.log

    def write(self, pages: Iterable[int], value: int = 1) -> None:
        self.do(b"W", [value, *pages])

    def do(self, command: bytes, numbers: Iterable[int] = ()) -> None:
        self._send(command, numbers)
        assert self._sock.recv(1) == b"k"

    def _send(self, command: bytes, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        self._sock.sendall(COUNT.pack(command, len(numbers)) + struct.pack(f"<{len(numbers)}I", *numbers))

    def harvest(self) -> set[int]:
        assert self.log is not None
        return set(self.log.collect().indices().tolist())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        self._sock.close()
        self.kill()
        if self.log is not None:
            self.log.close()
        self.ram.close()


@pytest.fixture(autouse=True)
def _platform() -> None:
    """No userfaultfd at all is a reason to skip; one that lacks a feature is a failure."""
    try:
        os.close(linux.userfaultfd())
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip(f"this platform has no userfaultfd for us: {error.strerror}")
        raise


def children(pages: int) -> Iterator[Child]:
    child = Child(pages)
    yield child
    child.close()


@pytest.fixture
def child() -> Iterator[Child]:
    yield from children(2048)


def test_a_harvest_is_exactly_what_was_written(child: Child) -> None:
    child.arm()
    chance = random.Random(1)
    for number in range(30):
        written = {chance.randrange(child.pages) for _ in range(chance.randrange(200))}
        child.write(written, number)
        assert child.harvest() == written
        assert child.harvest() == set()  # get *and* clear


def test_the_first_harvest_after_arming_protects_what_was_written_before(child: Child) -> None:
    child.write(range(100, 200))
    child.arm()
    assert child.harvest() == set()
    child.write([150, 250])
    assert child.harvest() == {150, 250}


def test_pages_never_touched_before_arming_are_seen(child: Child) -> None:
    """WP_UNPOPULATED: without it the first write to a hole goes unseen."""
    child.arm()
    assert not child.ram.touched(0, child.pages)
    child.write([0, child.pages - 1])
    assert child.harvest() == {0, child.pages - 1}


def test_reading_is_not_writing(child: Child) -> None:
    child.write([5])
    child.arm()
    child.do(b"R", [5, 6])
    assert child.harvest() == set()
    child.write([5, 6])
    assert child.harvest() == {5, 6}


def test_writing_the_same_bytes_is_a_write(child: Child) -> None:
    child.write([5], 7)
    child.arm()
    child.write([5], 7)
    assert child.harvest() == {5}


def test_system_calls_that_write_through_the_mapping_are_seen(child: Child) -> None:
    child.arm()
    child.do(b"Z", [3, 4, 900])
    assert child.harvest() == {3, 4, 900}


def test_pwrite_on_the_memfd_is_not_seen_which_is_why_nobody_may_do_it(child: Child) -> None:
    child.arm()
    put_pages(child.ram, np.array([8]), np.ones((1, PAGE_BYTES), np.uint8))
    assert child.harvest() == set()


def test_clean_means_unchanged_and_dirty_means_written_since(child: Child) -> None:
    """After KVM's dirty_log_test: each round writes its number; the log must explain every page of RAM."""
    child.arm()
    chance = random.Random(2)
    copy = np.zeros(child.pages, np.uint32)
    for number in range(1, 40):
        child.write([chance.randrange(child.pages) for _ in range(chance.randrange(400))], number)
        dirty = child.harvest()
        now = np.frombuffer(os.pread(child.ram.fd, child.ram.bytes, 0), np.uint32)[:: PAGE_BYTES // 4]
        for page in range(child.pages):
            assert (now[page] == number) == (page in dirty), f"page {page} in round {number}"
            assert page in dirty or now[page] == copy[page]
        copy = now.copy()


def test_a_writer_that_does_not_wait_for_the_harvest_loses_nothing(child: Child) -> None:
    """Get-and-clear is atomic: a write belongs to this harvest or to the next, and every copy ends right."""
    log = child.arm()
    chance = random.Random(3)
    copy = np.zeros(child.pages, np.uint32)

    def collect() -> None:
        for page in log.collect().indices().tolist():  # the mark is cleared, then the page is read (R8)
            copy[page] = struct.unpack("<I", os.pread(child.ram.fd, 4, page * PAGE_BYTES))[0]

    for number in range(1, 30):
        pages = [chance.randrange(child.pages) for _ in range(2000)]
        child._send(b"W", [number, *pages])
        for _ in range(5):
            collect()  # while the child writes
        assert child._sock.recv(1) == b"k"
    collect()
    now = np.frombuffer(os.pread(child.ram.fd, child.ram.bytes, 0), np.uint32)[:: PAGE_BYTES // 4]
    assert np.array_equal(copy, now)


def test_more_runs_than_one_scan_returns() -> None:
    """Every second page: the kernel stops after 4096 regions and the harvest walks on."""
    for child in children(2 * linux._MAX_REGIONS * 2 + 100):
        child.arm()
        written = set(range(1, child.pages, 2))
        child.write(written)
        assert child.harvest() == written
        assert child.harvest() == set()


def test_two_ranges_land_at_their_places_in_the_layout(child: Child) -> None:
    log = child.arm()
    half = child.pages // 2
    swapped = KernelDirtyLog(
        os.dup(log._fd),
        [
            ArmedRange(child.address + half * PAGE_BYTES, half, 0),
            ArmedRange(child.address, half, half),
        ],
        child.pages,
    )
    child.write([0, half - 1, half, child.pages - 1])
    assert swapped.collect().indices().tolist() == [0, half - 1, half, child.pages - 1]
    child.write([1, half + 2])
    assert swapped.collect().indices().tolist() == [2, half + 1]
    swapped.close()
    swapped.close()


def test_disarm_and_arm_again(child: Child) -> None:
    log = child.arm()
    child.write([1, 2])
    child.do(b"D")
    with pytest.raises(GuestError, match="the guest died or disarmed"):
        log.collect()
    child.write([3])  # in between nothing is logged: R2 sends everything again
    child.arm()
    assert child.harvest() == set()
    child.write([2, 4])
    assert child.harvest() == {2, 4}


def test_the_log_of_a_dead_guest_never_invents_pages(child: Child) -> None:
    """It may fail or be empty; either way its caller knows from the control channel that the guest died."""
    log = child.arm()
    child.write([1])
    child.kill()
    with contextlib.suppress(GuestError):
        assert not log.collect()


@pytest.mark.parametrize("offset", [1, 1 << 46])
def test_a_guest_that_lies_about_its_addresses_is_a_guest_error(child: Child, offset: int) -> None:
    log = child.arm()
    lying = KernelDirtyLog(os.dup(log._fd), [ArmedRange(child.address + offset, 16, 0)], child.pages)
    with pytest.raises(GuestError):
        lying.collect()
    lying.close()


def test_where_nothing_is_mapped_nothing_is_ever_dirty(child: Child) -> None:
    """The kernel checks that mappings are armed, not that there are any: a guest that armed one address and
    announces another, or unmaps its RAM, looks clean. Only the tracking verification notices that."""
    log = child.arm()
    lying = KernelDirtyLog(
        os.dup(log._fd), [ArmedRange(child.address - PAGE_BYTES * (1 << 20), 16, 0)], child.pages
    )
    child.write([1, 2])
    assert not lying.collect()
    lying.close()


@pytest.mark.parametrize("address", [-4096, 1 << 64, (1 << 64) - 4096])
def test_an_address_that_is_none_is_a_guest_error(child: Child, address: int) -> None:
    log = child.arm()
    lying = KernelDirtyLog(os.dup(log._fd), [ArmedRange(address, 16, 0)], child.pages)
    with pytest.raises(GuestError):
        lying.collect()
    lying.close()


def test_a_descriptor_that_is_no_pagemap_is_a_guest_error() -> None:
    log = KernelDirtyLog(os.open("/dev/null", os.O_RDONLY), [ArmedRange(0x10000, 1, 0)], 1)
    with pytest.raises(GuestError):
        log.collect()
    log.close()


def test_arming_what_is_no_mapping_is_refused_and_leaks_nothing() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(LiveUnsupported, match="arming write tracking failed"):
        WriteProtection([(0x1000, PAGE_BYTES)])
    assert set(os.listdir("/proc/self/fd")) == before


def test_arming_and_disarming_leaks_nothing() -> None:
    with mmap.mmap(-1, 16 * PAGE_BYTES) as mapping:
        pointer = ctypes.c_char.from_buffer(mapping)
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(5):
            WriteProtection([(ctypes.addressof(pointer), 16 * PAGE_BYTES)]).close()
        assert set(os.listdir("/proc/self/fd")) == before
        del pointer


def test_this_kernel_marks_pages_as_soft_dirty_if_it_was_built_to() -> None:
    """Found out by writing a page, and nothing is left open; the kernel's configuration says the same."""
    before = set(os.listdir("/proc/self/fd"))
    found = soft_dirty.supported()
    assert set(os.listdir("/proc/self/fd")) == before
    try:
        built = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except OSError:
        pytest.skip("this kernel does not tell its configuration")
    assert found is ("CONFIG_MEM_SOFT_DIRTY=y" in built)
