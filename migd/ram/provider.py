"""RamProvider: where a daemon takes the RAM of new and incoming guests from, as ``daemon.ram`` says."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from migd.errors import ConfigError, Refused, ResourceError
from migd.ram import linux
from migd.ram.backing import HUGE_PAGE_BYTES, HUGE_POOL
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock

_POOLS = Path("/sys/kernel/mm/hugepages")
_MEMINFO = Path("/proc/meminfo")

_RANDOM_BYTES = 4
_FILE = re.compile(r"migd-.+-.+-[0-9a-f]{8}")


class RamProvider(Protocol):
    """Makes fresh, zero RAM (R11) of one kind."""

    def create(self, guest: str, shape: BlockShape) -> RamBlock:
        """RAM for a block. ResourceError without room for it, Refused if it cannot be of this kind at all."""

    def room(self, promised_bytes: int) -> Room:
        """What can still be given, when guests here may touch so many bytes that they have not yet."""

    def recognise(self, block: RamBlock) -> None:
        """A guest brought it: if a daemon made it here before, its name is to go with it again."""


class Room:
    """``free_bytes``, at least 0, and what to say when they do not suffice."""

    def __init__(self, free_bytes: int, remedy: str) -> None:
        self.free_bytes = max(0, free_bytes)
        self._remedy = remedy

    def require(self, wanted_bytes: int) -> None:
        """ResourceError, with figures and remedy, if there is less."""
        if wanted_bytes > self.free_bytes:
            raise ResourceError(
                f"{wanted_bytes >> 20} MiB of guest RAM wanted, {self.free_bytes >> 20} MiB can be given"
                f"{self._remedy}"
            )


def provider(ram: str) -> RamProvider:
    """What ``daemon.ram`` names: memfd, hugetlb or a directory. ConfigError for one that cannot be used."""
    match ram:
        case "memfd":
            return MemfdRam()
        case "hugetlb":
            return HugeRam()
        case _:
            return RamDirectory(Path(ram))


class MemfdRam:
    """Sealed memfds: memory of this host that has no name and that nobody can resize."""

    def create(self, guest: str, shape: BlockShape) -> RamBlock:
        return RamBlock.create(shape)

    def room(self, promised_bytes: int) -> Room:
        return Room(_available_bytes() - promised_bytes, "")

    def recognise(self, block: RamBlock) -> None:
        """There is no name."""


class HugeRam:
    """Sealed memfds of huge pages of 2 MiB, all of a block set aside when it is made."""

    def create(self, guest: str, shape: BlockShape) -> RamBlock:
        _refuse_odd(shape, HUGE_PAGE_BYTES)
        return RamBlock.create(shape, huge=True)

    def room(self, promised_bytes: int) -> Room:
        return _huge_room(HUGE_PAGE_BYTES)

    def recognise(self, block: RamBlock) -> None:
        """There is no name."""


class RamDirectory:
    """Files in a directory on tmpfs or hugetlbfs, such as /dev/shm: RAM that other programs can open.

    A file is called ``migd-GUEST-BLOCK-RANDOM``. Its maker locks it (flock) through the descriptor that the
    guest gets, too: so the lock is held as long as any process has that descriptor or maps the file, and a
    file without it is left over from a crash.
    """

    def __init__(self, directory: Path) -> None:
        """ConfigError unless it is a directory of such a file system that we may write to."""
        self.directory = directory.resolve()
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                kind = linux.filesystem_type(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"daemon.ram: {directory}: {error.strerror}") from error
        if kind not in (linux.TMPFS, linux.HUGETLBFS):
            raise ConfigError(f"daemon.ram: {directory} is neither on tmpfs nor on hugetlbfs")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"daemon.ram: {directory}: files cannot be made there")
        self._huge = kind == linux.HUGETLBFS

    def create(self, guest: str, shape: BlockShape) -> RamBlock:
        if self._huge:
            _refuse_odd(shape, os.statvfs(self.directory).f_bsize)
        path = self._new_path(guest, shape)
        try:
            block = RamBlock.create_in(shape, lambda: _new_file(path))
        except ResourceError as error:
            if not isinstance(error.__cause__, FileExistsError):
                path.unlink(missing_ok=True)
            raise
        block.path = path
        return block

    def _new_path(self, guest: str, shape: BlockShape) -> Path:
        return self.directory / f"migd-{guest}-{shape.name}-{secrets.token_hex(_RANDOM_BYTES)}"

    def room(self, promised_bytes: int) -> Room:
        space = os.statvfs(self.directory)
        limit = space.f_bavail * space.f_frsize if space.f_blocks else None  # none at all: no limit
        if self._huge:
            room = _huge_room(space.f_bsize)
            return room if limit is None else Room(min(room.free_bytes, limit), f" in {self.directory}")
        free = _available_bytes()
        return Room((free if limit is None else min(free, limit)) - promised_bytes, f" in {self.directory}")

    def recognise(self, block: RamBlock) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{block.fd}"))
        if path.parent == self.directory and _FILE.fullmatch(path.name) and _is(path, block.fd):
            block.path = path

    def leftovers(self) -> list[Path]:
        """RAM files that no process has open or maps, in order. Files of other users are passed over."""
        return [path for path in sorted(self.directory.glob("migd-*")) if self._is_left_over(path)]

    def _is_left_over(self, path: Path) -> bool:
        if not _FILE.fullmatch(path.name):
            return False
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # gone, a link, or of somebody else
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
        except OSError:  # locked: in use
            return False
        finally:
            os.close(fd)


def _new_file(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _is(path: Path, fd: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.lstat(), os.fstat(fd))
    return False


def _refuse_odd(shape: BlockShape, huge_bytes: int) -> None:
    if shape.pages * PAGE_BYTES % huge_bytes:
        raise Refused(
            f"RAM block {shape.name!r}: {shape.pages} pages are not a multiple of huge pages of "
            f'{huge_bytes >> 20} MiB, which daemon.ram asks for here; with "memfd" any size goes'
        )


def _huge_room(huge_bytes: int) -> Room:
    """Huge pages that are neither in use nor set aside."""
    pool = _POOLS / f"hugepages-{huge_bytes >> 10}kB"
    try:
        free, reserved = (int((pool / f"{what}_hugepages").read_text()) for what in ("free", "resv"))
    except OSError as error:
        raise ResourceError(f"{pool}: {error.strerror}: this kernel has no such huge pages") from error
    return Room((free - reserved) * huge_bytes, f" in huge pages: allow more in {HUGE_POOL}")


def _available_bytes() -> int:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError as error:
        raise ResourceError(f"{_MEMINFO}: {error.strerror}") from error
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ResourceError(f"{_MEMINFO} has no MemAvailable")
