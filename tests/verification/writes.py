"""The ways to write to guest RAM: whether the kernel's dirty log sees each, and what migd does about it.

Everything here is done for real, to a page of a sealed memfd that is mapped and armed in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from migd.ram import linux
from migd.ram.block import PAGE_BYTES
from tests.support.io_uring import Ring

CONTENT = b"new " * (PAGE_BYTES // 4)
"""What is written, as far as a way can write anything but zeros."""
ZEROS = bytes(PAGE_BYTES)

_MADV_PAGEOUT, _MADV_POPULATE_WRITE = 21, 23
_MAP_FIXED = 0x10
_ZERO_RANGE = 0x10 | 1
"""Keeping the file's size."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)


class Handling(StrEnum):
    """What becomes of such a write during a migration."""

    LOGGED = "sent again; after the pause, by the harvest behind the device state (R13)"
    FOUND = "found by the tracking verification, and by the compare log"
    HARMLESS = "no harm: nothing changes, and what is written there next is logged"
    REFUSED = "refused by the kernel"
    ENDS = "the log is lost with it: the attempt ends, and the guest runs on"


@dataclass(frozen=True)
class Target:
    """RAM that a guest has armed, a directory for files, and what a device has held since before."""

    fd: int
    memory: mmap.mmap
    directory: Path
    device: Ring | None
    """It has pinned all of RAM; None where there is no io_uring."""

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def room(self, page: int) -> memoryview:
        """The page, through the armed mapping."""
        return memoryview(self.memory)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]


Act = Callable[[Target, int], object]


@dataclass(frozen=True)
class Way:
    """One way to change a page. ``leaves`` is what it holds then; None if it is as before."""

    name: str
    act: Act
    handling: Handling
    leaves: bytes | None = CONTENT
    needs: str = ""
    """What some machines lack: io_uring, or direct reads."""

    @property
    def seen(self) -> bool:
        """By the kernel's log."""
        return self.handling is Handling.LOGGED

    def do(self, target: Target, page: int) -> None:
        """Do it, or have it refused."""
        if self.handling is Handling.REFUSED:
            with pytest.raises(OSError, match=r"not permitted|not supported"):
                self.act(target, page)
        else:
            self.act(target, page)

    def __str__(self) -> str:
        return self.name


@contextlib.contextmanager
def pinned(address: int, length: int) -> Iterator[Ring | None]:
    """A device that has pinned this memory, if there can be one here."""
    try:
        ring = Ring()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        yield None
        return
    with ring:
        ring.pin(address, length)
        yield ring


def skip_if_lacking(way: Way, target: Target) -> None:
    if way.needs == "io_uring" and target.device is None:
        pytest.skip("there is no io_uring here")
    if way.needs == "O_DIRECT":
        path = target.directory / "whether"
        path.touch()
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            pytest.skip(f"no direct reads from here: {error.strerror}")


def _source() -> BinaryIO:
    """A file to read the content from."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # its callers enter it
    file.write(CONTENT)
    return file


# -- through the armed mapping ------------------------------------------------------------------------


def _store(target: Target, page: int) -> None:
    target.room(page)[:] = CONTENT


def _receive(target: Target, page: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(CONTENT)
        assert theirs.recv_into(target.room(page), PAGE_BYTES, socket.MSG_WAITALL) == PAGE_BYTES


def _proc_mem(target: Target, page: int) -> None:
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(target.address + page * PAGE_BYTES)
        assert memory.write(CONTENT) == PAGE_BYTES


def _process_vm_writev(target: Target, page: int) -> None:
    linux.store(target.address + page * PAGE_BYTES, np.frombuffer(CONTENT, np.uint8))


def _direct_read(target: Target, page: int) -> None:
    path = target.directory / "direct"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.preadv(fd, [target.room(page)], 0) == PAGE_BYTES
    finally:
        os.close(fd)


def _io_uring(target: Target, page: int) -> None:
    with _source() as source, Ring() as ring:
        assert ring.read(source.fileno(), target.address + page * PAGE_BYTES, PAGE_BYTES) == PAGE_BYTES


def _populate(target: Target, page: int) -> None:
    target.memory.madvise(_MADV_POPULATE_WRITE, page * PAGE_BYTES, PAGE_BYTES)


# -- past it ------------------------------------------------------------------------------------------


def _pwrite(target: Target, page: int) -> None:
    assert os.pwrite(target.fd, CONTENT, page * PAGE_BYTES) == PAGE_BYTES


def _splice(target: Target, page: int) -> None:
    out, into = os.pipe()
    try:
        os.write(into, CONTENT)
        assert os.splice(out, target.fd, PAGE_BYTES, offset_dst=page * PAGE_BYTES) == PAGE_BYTES
    finally:
        os.close(out)
        os.close(into)


def _sendfile(target: Target, page: int) -> None:
    fd = os.open(f"/proc/self/fd/{target.fd}", os.O_RDWR)
    try:
        os.lseek(fd, page * PAGE_BYTES, os.SEEK_SET)
        with _source() as source:
            assert os.sendfile(fd, source.fileno(), 0, PAGE_BYTES) == PAGE_BYTES
    finally:
        os.close(fd)


def _second_mapping(target: Target, page: int) -> None:
    with mmap.mmap(target.fd, len(target.memory)) as second:
        second[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = CONTENT


def _other_process(target: Target, page: int) -> None:
    at = page * PAGE_BYTES
    code = (
        f"import mmap; memory = mmap.mmap({target.fd}, {len(target.memory)});"
        f"memory[{at}:{at + PAGE_BYTES}] = {CONTENT[:4]!r} * {PAGE_BYTES // 4}"
    )
    subprocess.run([sys.executable, "-c", code], pass_fds=[target.fd], check=True)


def _forked_child(target: Target, page: int) -> None:
    """It inherits the mapping, and the kernel does not arm it there."""
    room = target.room(page)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it does nothing that a thread could hold up
        pid = os.fork()
    if not pid:
        room[:] = CONTENT
        os._exit(0)
    assert os.waitpid(pid, 0) == (pid, 0)


def _pinned(target: Target, page: int) -> None:
    """As a device does that writes to memory itself: into a page it had pinned before it was protected."""
    assert target.device is not None
    with _source() as source:
        address = target.address + page * PAGE_BYTES
        assert target.device.read(source.fileno(), address, PAGE_BYTES, pinned=True) == PAGE_BYTES


def _punch(target: Target, page: int) -> None:
    linux.punch_hole(target.fd, page * PAGE_BYTES, PAGE_BYTES)


def _remove(target: Target, page: int) -> None:
    target.memory.madvise(mmap.MADV_REMOVE, page * PAGE_BYTES, PAGE_BYTES)


# -- what changes nothing, what the kernel refuses, and what ends the log ------------------------------


def _drop(target: Target, page: int) -> None:
    target.memory.madvise(mmap.MADV_DONTNEED, page * PAGE_BYTES, PAGE_BYTES)


def _page_out(target: Target, page: int) -> None:
    target.memory.madvise(_MADV_PAGEOUT, page * PAGE_BYTES, PAGE_BYTES)


def _truncate(target: Target, page: int) -> None:
    os.ftruncate(target.fd, page * PAGE_BYTES)


def _zero_range(target: Target, page: int) -> None:
    if _libc.fallocate(target.fd, _ZERO_RANGE, page * PAGE_BYTES, PAGE_BYTES):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _map_anew(target: Target, page: int) -> None:
    """The same RAM at the same place, by a mapping that is not armed."""
    access, shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    assert _libc.mmap(target.address, len(target.memory), access, shared, target.fd, 0) == target.address
    _store(target, page)


WAYS = (
    Way("a store through the armed mapping", _store, Handling.LOGGED),
    Way("recv() into the mapping", _receive, Handling.LOGGED),
    Way("process_vm_writev()", _process_vm_writev, Handling.LOGGED),
    Way("/proc/PID/mem", _proc_mem, Handling.LOGGED),
    Way("an O_DIRECT read into the mapping", _direct_read, Handling.LOGGED, needs="O_DIRECT"),
    Way("io_uring, a read into the mapping", _io_uring, Handling.LOGGED, needs="io_uring"),
    Way("madvise(MADV_POPULATE_WRITE)", _populate, Handling.LOGGED, None),
    Way("pwrite() on the memfd", _pwrite, Handling.FOUND),
    Way("splice() into the memfd", _splice, Handling.FOUND),
    Way("sendfile() into the memfd, opened anew", _sendfile, Handling.FOUND),
    Way("a second mapping", _second_mapping, Handling.FOUND),
    Way("another process's mapping", _other_process, Handling.FOUND),
    Way("a forked child", _forked_child, Handling.FOUND),
    Way(
        "a device with pinned pages (io_uring, registered buffer)", _pinned, Handling.FOUND, needs="io_uring"
    ),
    Way("fallocate(PUNCH_HOLE)", _punch, Handling.FOUND, ZEROS),
    Way("madvise(MADV_REMOVE)", _remove, Handling.FOUND, ZEROS),
    Way("madvise(MADV_DONTNEED)", _drop, Handling.HARMLESS, None),
    Way("madvise(MADV_PAGEOUT)", _page_out, Handling.HARMLESS, None),
    Way("ftruncate(), the memfd is sealed", _truncate, Handling.REFUSED, None),
    Way("fallocate(ZERO_RANGE)", _zero_range, Handling.REFUSED, None),
    Way("the guest maps its RAM anew", _map_anew, Handling.ENDS),
)
