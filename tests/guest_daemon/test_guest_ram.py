"""The RAM of guests at their daemon: brought in every allowed form, made in several blocks, files that go."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migd.errors import GuestError, Refused, ResourceError
from migd.guest import control
from migd.guest.control import Block, GuestState
from migd.ram.backing import Backing
from migd.ram.block import PAGE_BYTES, BlockShape
from tests.guest_daemon.scripted import MIGRATION, PAGES, attach, house, open_fds, ram_fd, until
from tests.support.huge_pages import hugetlbfs, reserved
from tests.support.placing import put_pages

SHAPES = (BlockShape("ram", PAGES),)
TWO = (BlockShape("ram0", 3), BlockShape("ram1", 5))

GUEST = """
import os, sys
from migd.guest import control
sock = control.new_socket()
sock.connect(sys.argv[1])
block = control.Block("ram", 256)
attach = control.Attach(version=1, name="vm1", pid=1, state="running", blocks=(block,))
fds = [int(sys.argv[2])] if len(sys.argv) > 2 else []
control.send(sock, attach, fds)
message, fds = control.receive_from_daemon(sock)
print(type(message).__name__, len(fds), flush=True)
while control.receive_from_daemon(sock):
    pass
print("daemon gone", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-") as directory:
        yield Path(directory)


def names(directory: Path) -> list[str]:
    return os.listdir(directory)


def guest_process(path: Path, *fds: int) -> subprocess.Popen[str]:
    """A guest as a process of its own."""
    command = [sys.executable, "-c", GUEST, str(path), *map(str, fds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=fds)


async def said(guest: subprocess.Popen[str]) -> str:
    assert guest.stdout is not None
    return (await asyncio.to_thread(guest.stdout.readline)).strip()


def end(guest: subprocess.Popen[str]) -> None:
    guest.kill()
    guest.communicate()


# -- what a guest may bring -------------------------------------------------------------------------------


def on_disk(path: Path) -> int:
    return os.open(path, os.O_TMPFILE | os.O_RDWR)


def on_tmpfs(_path: Path) -> int:
    return os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)


def unsealed(_path: Path) -> int:
    return os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)


@pytest.mark.parametrize("make", [on_disk, on_tmpfs, unsealed], ids=["disk", "tmpfs", "unsealed memfd"])
async def test_a_guest_may_bring_a_file_that_is_its_ram(tmp_path: Path, make: Callable[[Path], int]) -> None:
    fd = make(tmp_path)
    os.ftruncate(fd, PAGES * PAGE_BYTES)
    os.pwrite(fd, b"mine", 7 * PAGE_BYTES)
    async with house(tmp_path) as home:
        hosted, _ = await home.attached(fds=[fd])
        (block,) = hosted.ram.blocks
        assert (block.backing, block.path, block.read_only) == (Backing.FILE, None, False)
        out = np.empty((1, PAGE_BYTES), np.uint8)
        assert bytes(hosted.ram.read(np.array([7]), out)[0, :4]) == b"mine"
    os.close(fd)


async def test_a_guest_may_bring_a_file_of_huge_pages(tmp_path: Path) -> None:
    with reserved(1), hugetlbfs(tmp_path, 1) as place:
        fd = os.open(place / "ram", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 2 << 20)
        async with house(tmp_path) as home:
            hosted, _ = await home.attached(attach(blocks=(Block("ram", 512),)), [fd])
            assert hosted.ram.blocks[0].backing is Backing.HUGETLB
        os.close(fd)


async def test_a_guest_that_never_writes_is_not_armed(tmp_path: Path) -> None:
    """Its log is empty, and it is not even asked."""
    (tmp_path / "image").write_bytes(bytes(PAGES * PAGE_BYTES))
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    async with house(tmp_path, guest_s=0.05) as home:
        hosted, _ = await home.attached(attach(read_only=True), [fd])
        assert hosted.ram.read_only
        log = await hosted.arm()
        assert log.name == "none (image)"
        assert not await log.harvest()
        log.close()
    os.close(fd)


async def test_a_guest_that_comes_back_from_a_daemon_of_before_is_understood(tmp_path: Path) -> None:
    """Its ATTACH has no word about writing."""
    assert b"read_only" not in control._encoder.encode(attach())
    assert b"read_only" in control._encoder.encode(attach(read_only=True))
    fd = ram_fd()
    async with house(tmp_path) as home:
        hosted, _ = await home.attached(fds=[fd])
        assert not hosted.ram.read_only
    os.close(fd)


# -- several blocks -----------------------------------------------------------------------------------------


async def test_blocks_are_given_in_their_order_and_come_back_in_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        blocks = tuple(Block(shape.name, shape.pages) for shape in TWO)
        hosted, guest = await home.attached(attach(blocks=blocks))
        *fds, _hints = guest.fds
        assert [os.fstat(fd).st_size // PAGE_BYTES for fd in fds] == [3, 5]
        put_pages(hosted.ram, np.array([2, 3]), np.repeat(np.uint8([1, 2]), PAGE_BYTES).reshape(2, -1))
        assert (os.pread(fds[0], 1, 2 * PAGE_BYTES), os.pread(fds[1], 1, 0)) == (b"\1", b"\2")
        kept = [os.dup(fd) for fd in fds]
        guest.close()
        await until(lambda: not home.registry.guests)
        again, guest = await home.attached(attach(blocks=blocks), kept)
        assert again.ram.shapes == TWO
        assert again.ram.touched().indices().tolist() == [2, 3]
        control.close_all(kept)


async def test_every_block_is_armed_where_the_guest_says(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        blocks = tuple(Block(shape.name, shape.pages) for shape in TWO)
        hosted, guest = await home.attached(attach(blocks=blocks))
        arming = asyncio.create_task(hosted.arm())
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        await guest.answer(control.Armed(addresses=(4096,)), [pagemap])
        os.close(pagemap)
        with pytest.raises(GuestError, match="armed 1 blocks with 1 descriptors"):
            await arming


# -- files that go with their guest -----------------------------------------------------------------------


async def test_a_file_goes_when_the_guest_ends_and_not_before(tmp_path: Path, directory: Path) -> None:
    async with house(tmp_path, ram=str(directory)) as home:
        guest = guest_process(home.path)
        assert await said(guest) == "Attached 2"
        (file,) = names(directory)
        assert file.startswith("migd-vm1-ram-")
        end(guest)
        await until(lambda: not names(directory))
        assert not home.registry.guests


async def test_a_file_stays_when_the_daemon_goes_first_and_goes_from_the_next(
    tmp_path: Path, directory: Path
) -> None:
    async with house(tmp_path, ram=str(directory)) as home:
        guest = guest_process(home.path)
        assert await said(guest) == "Attached 2"
        (block,) = home.registry.get("vm1").ram.blocks
        kept = os.dup(block.fd)
    assert await said(guest) == "daemon gone"
    (file,) = names(directory)
    async with house(tmp_path, ram=str(directory)) as home:
        again = guest_process(home.path, kept)
        assert await said(again) == "Attached 1"
        os.close(kept)
        end(guest)
        assert names(directory) == [file]
        end(again)
        await until(lambda: not names(directory))


async def test_the_file_of_an_incoming_guest_goes_with_its_process(tmp_path: Path, directory: Path) -> None:
    async with house(tmp_path, ram=str(directory)) as home:
        hosted = home.registry.create("vm1", MIGRATION, TWO)
        assert len(names(directory)) == 2
        await hosted.discard()
        await until(lambda: not names(directory))


async def test_what_could_not_be_started_leaves_no_file(tmp_path: Path, directory: Path) -> None:
    async with house(tmp_path, ["/no/such/program"], ram=str(directory)) as home:
        before = open_fds()
        with pytest.raises(ResourceError, match="starting /no/such/program"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        gone = home.dial()
        gone.say(attach(state=GuestState.PAUSED))
        assert isinstance(await gone.hear(), control.Declined)
        gone.close()
        assert names(directory) == []
        await until(lambda: open_fds() == before)


async def test_ram_of_huge_pages_is_refused_without_any(tmp_path: Path) -> None:
    async with house(tmp_path, ram="hugetlb") as home:
        with pytest.raises(ResourceError, match=r"can be given in huge pages: .*/proc/sys/vm/nr_hugepages"):
            home.registry.create("vm1", MIGRATION, (BlockShape("ram", 512 << 20),))
        with reserved(1), pytest.raises(Refused, match="'ram': 256 pages are not a multiple"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        assert home.registry.guests == {}


async def test_huge_pages_that_are_set_aside_are_not_given_twice(tmp_path: Path) -> None:
    with reserved(3):
        async with house(tmp_path, ram="hugetlb") as home:
            first = home.registry.create("vm1", MIGRATION, (BlockShape("ram", 1024),))
            assert home.registry.free_bytes() == 2 << 20
            with pytest.raises(ResourceError, match="4 MiB of guest RAM wanted, 2 MiB can be given"):
                home.registry.create("vm2", MIGRATION, (BlockShape("ram", 1024),))
            await first.discard()
