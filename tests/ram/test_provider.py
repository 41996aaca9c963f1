"""RamProvider: what each kind of RAM is, how much of it there is, and whose files lie in a RAM directory."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from migd.errors import ConfigError, ResourceError
from migd.ram.backing import Backing
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.provider import HugeRam, MemfdRam, RamDirectory, provider
from tests.support.placing import put_pages

SHAPE = BlockShape("ram", 64)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-") as directory:
        yield Path(directory)


def test_the_key_names_the_kind(place: Path) -> None:
    assert isinstance(provider("memfd"), MemfdRam)
    assert isinstance(provider("hugetlb"), HugeRam)
    found = provider(str(place))
    assert isinstance(found, RamDirectory)
    assert found.directory == place


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nowhere/at/all", "No such file or directory"),
        ("/etc/passwd", "Not a directory"),
        ("/proc", "neither on tmpfs nor on hugetlbfs"),
    ],
)
def test_a_directory_that_cannot_hold_ram(path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"daemon.ram: {path}:? .*{why}"):
        provider(path)


def test_a_memfd_has_no_name() -> None:
    block = MemfdRam().create("vm1", SHAPE)
    assert (block.backing, block.path) == (Backing.MEMFD, None)
    block.unlink()
    block.close()


def test_a_file_is_private_named_after_its_guest_and_never_mapped_here(place: Path) -> None:
    block = RamDirectory(place).create("vm-1", BlockShape("ram0", 64))
    assert block.path is not None
    assert re.fullmatch(r"migd-vm-1-ram0-[0-9a-f]{8}", block.path.name)
    status = block.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == block.bytes
    assert status.st_blocks == 0
    assert block.backing is Backing.FILE
    assert not os.get_inheritable(block.fd)
    put_pages(block, np.array([3]), np.full((1, PAGE_BYTES), 5, np.uint8))
    assert block.path.read_bytes()[3 * PAGE_BYTES] == 5
    assert block.touched(0, 64) == [(3, 4)]
    assert block.promised_bytes == 63 * PAGE_BYTES
    block.unlink()
    block.unlink()
    assert list(place.iterdir()) == []
    assert os.fstat(block.fd).st_size == block.bytes
    block.close()


def test_a_block_that_cannot_be_made_leaves_no_file(place: Path) -> None:
    with pytest.raises(ResourceError, match="0 pages is not between"):
        RamDirectory(place).create("vm1", BlockShape("ram", 0))
    place.chmod(0o700)
    directory = RamDirectory(place)
    place.rmdir()
    with pytest.raises(ResourceError, match="RAM block 'ram' of 64 pages: No such file"):
        directory.create("vm1", SHAPE)
    place.mkdir()
    assert list(place.iterdir()) == []


def test_the_file_of_another_guest_is_never_taken_nor_removed(place: Path) -> None:
    class Unlucky(RamDirectory):
        def _new_path(self, guest: str, shape: BlockShape) -> Path:
            return self.directory / "migd-vm1-ram-01234567"

    directory = Unlucky(place)
    first = directory.create("vm1", SHAPE)
    assert first.path is not None
    with pytest.raises(ResourceError, match="RAM block 'ram' of 64 pages: File exists"):
        directory.create("vm1", SHAPE)
    assert first.path.exists()
    first.close()


def test_a_guest_that_brings_its_file_back_takes_it_along_in_the_end(place: Path, tmp_path: Path) -> None:
    directory = RamDirectory(place)
    made = directory.create("vm1", SHAPE)
    again = RamBlock.adopt(SHAPE, os.dup(made.fd))
    assert again.path is None
    directory.recognise(again)
    assert again.path == made.path
    again.unlink()
    assert list(place.iterdir()) == []
    # ... but nobody's own file is ever removed: another name, another place, a name that is another file now.
    assert made.path is not None
    made.path.touch()
    for path in (place / "mine", tmp_path / "migd-vm1-ram-01234567"):
        path.write_bytes(bytes(SHAPE.bytes))
        other = RamBlock.adopt(SHAPE, os.open(path, os.O_RDWR))
        directory.recognise(other)
        assert other.path is None
        other.close()
    for block in (made, again):
        block.path = None
        directory.recognise(block)
        assert block.path is None
        block.close()


def test_room_is_what_memory_and_file_system_have_less_what_was_promised(place: Path) -> None:
    for kind in (MemfdRam(), RamDirectory(place)):
        free = kind.room(0).free_bytes
        assert free > 1 << 20
        kind.room(0).require(1 << 20)
        assert kind.room(free + (1 << 40)).free_bytes == 0
        with pytest.raises(ResourceError, match=r"4096 MiB of guest RAM wanted, 0 MiB can be given"):
            kind.room(1 << 60).require(4 << 30)


def test_room_in_a_small_tmpfs(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        directory = RamDirectory(small)
        assert directory.room(0).free_bytes == 1 << 20
        assert directory.room(1 << 19).free_bytes == 1 << 19
        with pytest.raises(ResourceError, match=f"2 MiB of guest RAM wanted, 1 MiB can be given in {small}"):
            directory.room(0).require(2 << 20)
        block = directory.create("vm1", BlockShape("ram", 512))
        with pytest.raises(OSError, match="No space left"):
            put_pages(block, np.arange(512), np.ones((512, PAGE_BYTES), np.uint8))
        block.close()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# -- leftovers ------------------------------------------------------------------------------------------

HOLD = """
import mmap, os, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
_, (fd,), _, _ = socket.recv_fds(sock, 1, 1)
kept = mmap.mmap(fd, 4096) if sys.argv[2] == "maps" else fd
if sys.argv[2] == "maps":
    os.close(fd)
sock.send(b"!")
sock.recv(1)
"""


@pytest.mark.parametrize("how", ["opens", "maps"])
def test_a_file_is_left_over_once_nobody_has_it_open_or_maps_it(place: Path, how: str) -> None:
    import socket

    directory = RamDirectory(place)
    block = directory.create("vm1", SHAPE)
    assert directory.leftovers() == []
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", HOLD, str(theirs.fileno()), how]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as guest:
        theirs.close()
        socket.send_fds(ours, [b"?"], [block.fd])
        assert ours.recv(1) == b"!"
        block.close()  # the daemon is gone, and its guest goes on
        assert directory.leftovers() == []
        guest.kill()
    assert directory.leftovers() == [block.path]
    assert directory.leftovers() == [block.path], "looking changes nothing"


def test_other_files_are_no_leftovers(place: Path) -> None:
    directory = RamDirectory(place)
    (place / "migd-vm1-ram-0123456").touch()
    (place / "migd-vm1-ram-0123456x").touch()
    (place / "other-vm1-ram-01234567").touch()
    (place / "migd-vm1-ram-89abcdef").symlink_to("/etc/passwd")
    (place / "migd-vm1-ram-fedcba98").mkdir()
    os.mkfifo(place / "migd-vm1-ram-00000001")
    mine = place / "migd-vm1-ram-00000002"
    mine.touch()
    assert directory.leftovers() == [mine]
    with mine.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert directory.leftovers() == []
