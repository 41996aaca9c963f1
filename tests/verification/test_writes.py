"""Every way to write to guest RAM, twice: what the kernel's log sees of it, and what a migration makes of it.

A kernel that sees more, or less, than ``tests.verification.writes`` says fails here.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.errors import GuestError
from migd.migration.state import DestinationState, SourceState
from migd.migration.stats import Result
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.digest import frame_digest
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection
from migd.source.attempt import DirtyLogChoice, SourceOptions, Verify
from tests.support.scripted_guest import Joined, ScriptedGuest, joined
from tests.verification.writes import WAYS, Handling, Target, Way, pinned, skip_if_lacking

PAGE = 17
UNSEEN = [way for way in WAYS if way.handling is Handling.FOUND]


# -- what the kernel sees -----------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """RAM that is full, and mapped."""
    block = RamBlock.create(BlockShape("ram", 64))
    memory = mmap.mmap(block.fd, block.bytes)
    memory[:] = b"old " * (block.bytes // 4)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with pinned(address, block.bytes) as device:
        yield Target(block.fd, memory, tmp_path, device)
    block.close()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_kernel_logs_what_it_is_said_to_log(target: Target, way: Way) -> None:
    skip_if_lacking(way, target)
    pages = len(target.memory) // PAGE_BYTES
    protection = WriteProtection([(target.address, len(target.memory))])
    log = KernelDirtyLog(os.dup(protection.pagemap_fd), [ArmedRange(target.address, pages, 0)], pages)
    log.begin()
    before = os.pread(target.fd, PAGE_BYTES, PAGE * PAGE_BYTES)
    way.do(target, PAGE)
    assert os.pread(target.fd, PAGE_BYTES, PAGE * PAGE_BYTES) == (way.leaves or before)
    if way.handling is Handling.ENDS:
        with pytest.raises(GuestError, match="disarmed"):
            log.collect()
    else:
        assert log.collect().indices().tolist() == ([PAGE] if way.seen else [])
        target.room(PAGE)[:4] = b"next"
        assert log.collect().indices().tolist() == [PAGE]
    log.close()
    protection.close()


# -- what a migration makes of it ------------------------------------------------------------------------


def write_during(sides: Joined, way: Way, target: Target, *, late: bool = False) -> None:
    """Before the pause, or behind the device state; the guest expects what was written then."""
    guest = sides.guest

    def expect() -> None:
        if way.leaves is not None:
            guest.knows[PAGE] = frame_digest(way.leaves).hex()

    def write() -> None:
        way.do(target, PAGE)

    def both() -> None:
        expect()
        write()

    if late:
        guest.at_pause = expect
        guest.at_harvest_after_pause = {2: write}
    else:
        sides.at_source.at[SourceState.PAUSING] = both


@contextlib.contextmanager
def targeted(guest: ScriptedGuest, way: Way, directory: Path) -> Iterator[Target]:
    address = ctypes.addressof(ctypes.c_char.from_buffer(guest.mapping))
    with pinned(address, len(guest.mapping)) as device:
        target = Target(guest.ram.blocks[0].fd, guest.mapping, directory, device)
        skip_if_lacking(way, target)
        yield target


def assert_right(sides: Joined, result: Result) -> None:
    assert (result.outcome, result.wrong_pages) == ("completed", 0)
    assert result.checked_pages == len(sides.guest.knows)
    assert sides.arrived.running


def assert_stayed(sides: Joined, result: Result, error: str) -> None:
    assert error in result.error
    assert result.states[-2:] == [SourceState.ABORTING, SourceState.FAILED]
    assert sides.guest.running
    assert "start" not in sides.arrived.calls


@pytest.mark.parametrize("late", [False, True], ids=["before the pause", "after the device state"])
@pytest.mark.parametrize("way", WAYS, ids=str)
async def test_before_go_each_is_refused_sent_or_found(tmp_path: Path, way: Way, late: bool) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        with targeted(guest, way, tmp_path) as target:
            write_during(sides, way, target, late=late)
            result = await sides.migrate(SourceOptions(hints=False, verify=Verify.STRICT))
        if way.handling is Handling.FOUND:
            assert_stayed(sides, result, "1 pages changed untracked")
        elif way.handling is Handling.ENDS:
            assert_stayed(sides, result, "the dirty log is gone")
        else:
            assert_right(sides, result)
            assert result.verification == "strict: ok"
            assert result.late_dirty_pages == (1 if way.seen and late else 0)


@pytest.mark.parametrize("way", UNSEEN, ids=str)
async def test_what_is_found_late_pauses_the_guest_at_the_destination(tmp_path: Path, way: Way) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        with targeted(guest, way, tmp_path) as target:
            write_during(sides, way, target)
            result = await sides.migrate(SourceOptions(verify=Verify.LATE))
        assert (result.exit_code, result.verification) == (5, "late: 1 pages differ")
        assert sides.arrived.calls[-1] == "pause"
        assert sides.arrival.state is DestinationState.FAILED
        assert "release" not in guest.calls


@pytest.mark.parametrize("way", UNSEEN, ids=str)
async def test_unverified_it_is_lost(tmp_path: Path, way: Way) -> None:
    """What the verification is worth: nothing else looks."""
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        with targeted(guest, way, tmp_path) as target:
            write_during(sides, way, target)
            result = await sides.migrate(SourceOptions(verify=Verify.OFF))
        assert (result.outcome, result.wrong_pages) == ("completed", 1)


@pytest.mark.parametrize("way", UNSEEN, ids=str)
async def test_the_compare_log_sees_what_the_kernel_does_not(tmp_path: Path, way: Way) -> None:
    guest = ScriptedGuest()
    async with joined(guest, tmp_path) as sides:
        with targeted(guest, way, tmp_path) as target:
            write_during(sides, way, target)
            result = await sides.migrate(SourceOptions(dirty_log=DirtyLogChoice.COMPARE))
        assert_right(sides, result)
