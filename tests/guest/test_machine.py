"""RAM, journal and self-check of the stub guest, and the device state that carries them."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import struct
import time
from collections.abc import Iterator

import pytest

from migd.errors import GuestError, LiveUnsupported
from migd.guest import device_state
from migd.guest.allocator import runs_in
from migd.guest.content import FileContent
from migd.guest.machine import DIGEST_BYTES, PAGE_BYTES, Machine, page_digest
from migd.guest.workload import Workload, WorkloadKind, WorkloadPlan
from migd.ram.contract import FreeContract
from migd.ram.digest import frame_digest
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection

PAGES = 16 << 8  # 16 MiB


def make_ram(pages: int = PAGES) -> mmap.mmap:
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, pages * PAGE_BYTES)
    ram = mmap.mmap(fd, pages * PAGE_BYTES)
    os.close(fd)
    return ram


def plan(
    kind: WorkloadKind = WorkloadKind.CHURN, contract: FreeContract = FreeContract.ANYTHING
) -> WorkloadPlan:
    fill = (os.path.dirname(json.__file__),)
    return WorkloadPlan(kind=kind, rate_bytes_s=0, live_fraction=0.2, seed=7, contract=contract, fill=fill)


def make_guest(
    kind: WorkloadKind = WorkloadKind.CHURN, contract: FreeContract = FreeContract.ANYTHING
) -> tuple[Machine, Workload]:
    machine = Machine(make_ram(), contract)
    workload = Workload(machine, FileContent(plan().fill), plan(kind, contract))
    while not workload.ready:
        workload.step(0.0)
    return machine, workload


def owned(machine: Machine) -> list[int]:
    return [page for run in machine.allocator.owned_runs() for page in range(*run)]


def checked(machine: Machine) -> tuple[int, int]:
    check = machine.begin_check()
    assert check.run(time.monotonic() + 60, time.monotonic)
    machine.check = None
    return machine.wrong_pages, machine.first_wrong


@pytest.fixture
def guest() -> Iterator[tuple[Machine, Workload]]:
    machine, workload = make_guest()
    yield machine, workload
    machine.ram.close()


def test_the_digest_is_that_of_the_rest_of_migd() -> None:
    assert page_digest is frame_digest


def test_the_journal_is_what_was_written(guest: tuple[Machine, Workload]) -> None:
    machine, workload = guest
    for _ in range(100):
        workload.step(0.0)
    for page in owned(machine):
        at = page * PAGE_BYTES
        assert machine.digest(page) == page_digest(machine.ram[at : at + PAGE_BYTES])
    assert checked(machine) == (0, -1)


def test_the_check_finds_one_wrong_byte_anywhere(guest: tuple[Machine, Workload]) -> None:
    machine, _ = guest
    choice = random.Random(3)
    pages = sorted(choice.sample(owned(machine), 20))
    for page in pages:
        at = page * PAGE_BYTES + choice.choice((0, PAGE_BYTES - 1, choice.randrange(PAGE_BYTES)))
        machine.ram[at] ^= 1
    assert checked(machine) == (20, pages[0])


def test_a_wrong_page_is_found_though_the_workload_overwrites_or_frees_it() -> None:
    machine, workload = make_guest()
    oldest = workload.live[0]
    for start, _ in workload.live:
        machine.ram[start * PAGE_BYTES + 5] ^= 0x80
    check = machine.begin_check()
    wrong = len(workload.live)
    while oldest in workload.live:
        workload.step(0.0)
    assert check.run(time.monotonic() + 60, time.monotonic)
    assert machine.wrong_pages == wrong
    assert check.pages > wrong


def test_a_free_page_is_not_checked(guest: tuple[Machine, Workload]) -> None:
    machine, _ = guest
    start, _ = next(runs_in(machine.allocator.free_bits()))
    machine.ram[start * PAGE_BYTES] ^= 1
    assert checked(machine) == (0, -1)


# -- the contract ZERO ------------------------------------------------------------------------------


def test_freed_pages_are_zero_under_the_contract_zero() -> None:
    machine, workload = make_guest(contract=FreeContract.ZERO)
    for _ in range(300):
        workload.step(0.0)
    for start, stop in runs_in(machine.allocator.free_bits()):
        free = machine.ram[start * PAGE_BYTES : stop * PAGE_BYTES]
        assert free == bytes((stop - start) * PAGE_BYTES)
    assert machine.wrong_pages == 0


@pytest.mark.parametrize(("contract", "wrong"), [(FreeContract.ZERO, 1), (FreeContract.ANYTHING, 0)])
def test_a_page_that_is_not_zero_when_allocated_is_wrong(contract: FreeContract, wrong: int) -> None:
    machine = Machine(make_ram(64), contract)
    machine.ram[17 * PAGE_BYTES + 4095] = 1
    assert machine.allocate(64, 0) == (0, 64)
    assert machine.wrong_pages == wrong
    assert machine.first_wrong == (17 if wrong else -1)


def test_without_the_contract_freed_pages_keep_what_they_held() -> None:
    machine, workload = make_guest()
    start, stop = workload.live[0]
    before = machine.ram[start * PAGE_BYTES : stop * PAGE_BYTES]
    machine.free(start, stop)
    assert machine.ram[start * PAGE_BYTES : stop * PAGE_BYTES] == before


def test_a_fragmented_machine_hands_out_shorter_runs() -> None:
    machine = Machine(make_ram(64), FreeContract.ANYTHING)
    for at in range(0, 64, 8):
        machine.allocator.claim(at, at + 5)
    assert machine.allocate(64, 0) == (5, 7)
    while machine.allocate(64, 0):
        pass
    assert machine.allocator.free_pages == 0


# -- device state -----------------------------------------------------------------------------------


def copy_of(ram: mmap.mmap) -> mmap.mmap:
    copy = make_ram(len(ram) // PAGE_BYTES)
    copy[:] = ram[:]
    return copy


@pytest.mark.parametrize("kind", list(WorkloadKind))
def test_a_loaded_guest_goes_on_as_the_saved_one_would(kind: WorkloadKind) -> None:
    machine, workload = make_guest(kind)
    for _ in range(50):
        if workload.wait_s(0.0) is not None:
            workload.step(0.0)
    state = device_state.parse(device_state.save(machine, workload, 123))
    assert state.stopped_at_ns == 123
    assert state.plan == workload.plan
    twin_machine, twin = state.restore(copy_of(machine.ram), FileContent(plan().fill))
    assert checked(twin_machine) == (0, -1)
    for _ in range(50):
        if workload.wait_s(0.0) is not None:
            workload.step(0.0)
            twin.step(0.0)
    assert twin.live == workload.live
    assert twin.snapshot() == workload.snapshot()
    assert twin_machine.sequence == machine.sequence
    assert twin_machine.allocator.free_bits() == machine.allocator.free_bits()
    assert checked(twin_machine) == (0, -1)


def test_a_guest_saved_while_its_hog_fills_goes_on_filling() -> None:
    machine = Machine(make_ram(), FreeContract.ZERO)
    workload = Workload(machine, FileContent(plan().fill), plan(WorkloadKind.HOG, FreeContract.ZERO))
    while len(workload.hog) < 20:
        workload.step(0.0)
    state = device_state.parse(device_state.save(machine, workload, 0))
    twin_machine, twin = state.restore(copy_of(machine.ram), FileContent(plan().fill))
    while not twin.ready:
        twin.step(0.0)
    assert twin_machine.allocator.owned_pages == int(PAGES * 0.2)
    assert twin_machine.wrong_pages == 0


def test_no_damaged_state_is_loaded(guest: tuple[Machine, Workload]) -> None:
    blob = device_state.save(*guest, 0)
    choice = random.Random(11)
    for at in (0, 7, 8, 24, 28, 60, len(blob) - 1, *(choice.randrange(len(blob)) for _ in range(50))):
        wrong = bytearray(blob)
        wrong[at] ^= 1 << choice.randrange(8)
        with pytest.raises(GuestError, match="device state"):
            device_state.parse(bytes(wrong))
    for length in (0, 5, 27, 28, len(blob) // 2, len(blob) - 1):
        with pytest.raises(GuestError, match="device state"):
            device_state.parse(blob[:length])


def forged(blob: bytes, old: bytes, new: bytes) -> bytes:
    """The state with its header changed and every digest right."""
    (length,) = struct.unpack_from("<I", blob, 24)
    header, rest = blob[28 : 28 + length], blob[28 + length :]
    assert old in header
    header = header.replace(old, new)
    body = struct.pack("<I", len(header)) + header + rest
    return blob[:8] + page_digest(body) + body


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"pages":4096', b'"pages":4095'),
        (b'"pages":4096', b'"pages":-1'),
        (b'"sequence":', b'"surprise":1,"sequence":'),
        (b'"kind":"churn"', b'"kind":"weird"'),
        (b'"contract":1', b'"contract":9'),
        (b'"hog_runs":0', b'"hog_runs":1'),
        (b'"hog_runs":0', b'"hog_runs":99999999999999999999999'),
        (b'"fill":[', b'"fill":[7,'),
    ],
)
def test_no_lying_header_is_loaded(guest: tuple[Machine, Workload], old: bytes, new: bytes) -> None:
    blob = forged(device_state.save(*guest, 0), old, new)
    with pytest.raises(GuestError, match="device state"):
        device_state.parse(blob).restore(make_ram(), FileContent(plan().fill))


@pytest.mark.parametrize("run", [(0, 2), (PAGES - 1, 2), (1 << 63, 2), (0, 0)])
def test_no_impossible_run_is_loaded(guest: tuple[Machine, Workload], run: tuple[int, int]) -> None:
    machine, workload = guest
    machine.allocator.allocate(64, 0)  # page 0 is now in use, one way or the other
    workload.live.appendleft((0, 64))
    blob = device_state.save(machine, workload, 0)
    (length,) = struct.unpack_from("<I", blob, 24)
    wrong = bytearray(blob[24 : len(blob) - (64 - run[1]) * DIGEST_BYTES])
    if run == (0, 2):
        run = (workload.live[1][0], 2)
    struct.pack_into("<QQ", wrong, 4 + length, *run)
    with pytest.raises(GuestError, match="impossible pages"):
        device_state.parse(blob[:8] + page_digest(wrong) + bytes(wrong)).restore(
            make_ram(), FileContent(plan().fill)
        )


# -- the dirty log ----------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", [FreeContract.ANYTHING, FreeContract.ZERO])
def test_every_write_of_churn_is_in_the_dirty_log(contract: FreeContract) -> None:
    machine, workload = make_guest(contract=contract)
    address = ctypes.addressof(ctypes.c_char.from_buffer(machine.ram))
    try:
        protection = WriteProtection([(address, len(machine.ram))])
    except LiveUnsupported as error:
        pytest.skip(str(error))
    log = KernelDirtyLog(os.dup(protection.pagemap_fd), [ArmedRange(address, PAGES, 0)], PAGES)
    log.collect()
    for _ in range(10):
        before, sequence = bytes(machine.journal), machine.sequence
        for _ in range(20):
            workload.step(0.0)
        after = bytes(machine.journal)
        changed = {
            page
            for page in range(PAGES)
            if before[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]
            != after[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES]
        }
        assert machine.sequence > sequence
        assert changed
        assert changed <= set(log.collect().indices().tolist())
    assert log.collect().count() == 0
    log.close()
    protection.close()
