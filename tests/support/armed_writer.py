"""ArmedWriter: a process that maps RAM, arms it, and writes as told; the guest in tests of the dirty log.

Its commands are lines of JSON over a socket. In a *race* its threads write by themselves, as fast as they
can, the number that the host has published last to random pages, until the host publishes 0.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from migd.guest.control import Block
from migd.guest.mapping import RamMapping
from migd.ram.block import PAGE_BYTES, RamBlock
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection

WAIT_S = 30.0
"""No assertion is about time: this only ends a test that hangs."""

_THREADS = 4
_BURST = 200
"""Writes of a thread between two looks at the number."""

_libc = ctypes.CDLL(None)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


class Manner(StrEnum):
    """How the process writes to pages of its own."""

    STORE = "eight bytes"
    BYTE = "one byte"
    WHOLE = "the whole page"
    ZERO = "zeros"
    SAME = "what is there already"
    ACROSS = "eight bytes across the border to the next page"
    RECEIVE = "recv_into"
    READ = "a read from /dev/zero"
    THREADS = "four threads at once"


class Pace:
    """A page that writer and host share: the number to write, and how far each thread is."""

    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("Q")

    @property
    def number(self) -> int:
        return int(self._words[0])

    def publish(self, number: int) -> None:
        self._words[0] = number

    def acknowledge(self, thread: int, number: int) -> None:
        """From now on this thread writes no other."""
        self._words[1 + thread] = number

    def acknowledged(self, threads: int) -> set[int]:
        return set(self._words[1 : 1 + threads])

    def wrote(self, thread: int, count: int) -> None:
        self._words[100 + thread] += count

    @property
    def writes(self) -> int:
        return sum(self._words[100 : 100 + _THREADS])


# -- the process --------------------------------------------------------------------------------------


class _Process:
    def __init__(self, sock: socket.socket, pace_fd: int, blocks: list[tuple[int, int]]) -> None:
        self._sock = sock
        self._pace = Pace(pace_fd)
        shapes = [Block(f"ram{number}", pages) for number, (_, pages) in enumerate(blocks)]
        self._mapping = RamMapping(shapes, [fd for fd, _ in blocks])
        self._memory = memoryview(self._mapping.memory)
        self._address = self._mapping.places()[0][0]
        self._pages = sum(pages for _, pages in blocks)
        self._protection: WriteProtection | None = None
        self._racers: list[threading.Thread] = []

    def serve(self) -> None:
        with self._sock.makefile("r") as commands:
            for line in commands:
                command, *arguments = json.loads(line)
                getattr(self, command)(*arguments)
                self._sock.sendall(b"k")

    def arm(self) -> None:
        places = self._mapping.places()
        self._protection = WriteProtection(places)
        addresses = struct.pack(f"<{len(places)}Q", *(address for address, _ in places))
        socket.send_fds(self._sock, [addresses], [self._protection.pagemap_fd])

    def disarm(self) -> None:
        assert self._protection is not None
        self._protection.close()

    def write(self, manner: str, pages: list[int], number: int) -> None:
        {
            Manner.STORE: self._store,
            Manner.BYTE: self._byte,
            Manner.WHOLE: self._whole,
            Manner.ZERO: self._zero,
            Manner.SAME: self._same,
            Manner.ACROSS: self._across,
            Manner.RECEIVE: self._receive,
            Manner.READ: self._read,
            Manner.THREADS: self._by_threads,
        }[Manner(manner)](pages, number)

    def _store(self, pages: list[int], number: int) -> None:
        for page in pages:
            struct.pack_into("<Q", self._memory, page * PAGE_BYTES + 8 * random.randrange(512), number)

    def _byte(self, pages: list[int], number: int) -> None:
        for page in pages:
            self._memory[page * PAGE_BYTES + random.randrange(PAGE_BYTES)] = number & 0xFF

    def _whole(self, pages: list[int], number: int) -> None:
        for page in pages:
            _libc.memset(self._address + page * PAGE_BYTES, number & 0xFF, PAGE_BYTES)

    def _zero(self, pages: list[int], _number: int) -> None:
        self._whole(pages, 0)

    def _same(self, pages: list[int], _number: int) -> None:
        for page in pages:
            at = page * PAGE_BYTES + random.randrange(PAGE_BYTES)
            self._memory[at] = self._memory[at]

    def _across(self, pages: list[int], number: int) -> None:
        for page in pages:
            struct.pack_into("<Q", self._memory, (page + 1) * PAGE_BYTES - 3, number)

    def _receive(self, pages: list[int], number: int) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for page in pages:
                ours.sendall(bytes([number & 0xFF]) * 100)
                at = page * PAGE_BYTES + random.randrange(PAGE_BYTES - 100)
                theirs.recv_into(self._memory[at : at + 100], 100, socket.MSG_WAITALL)

    def _read(self, pages: list[int], _number: int) -> None:
        with open("/dev/zero", "rb", buffering=0) as zeros:
            for page in pages:
                zeros.readinto(self._memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])

    def _by_threads(self, pages: list[int], number: int) -> None:
        shares = [pages[at::_THREADS] for at in range(_THREADS)]
        threads = [threading.Thread(target=self._whole, args=(share, number)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # -- the race -------------------------------------------------------------------------------------

    def race(self, threads: int, seed: int) -> None:
        """Returns at once; over when the number is 0."""
        self._racers = [
            threading.Thread(target=self._run, args=(thread, random.Random(seed + thread)))
            for thread in range(threads)
        ]
        for racer in self._racers:
            racer.start()

    def join(self) -> None:
        for racer in self._racers:
            racer.join()

    def _run(self, thread: int, chance: random.Random) -> None:
        while number := self._pace.number:
            self._pace.acknowledge(thread, number)
            for _ in range(_BURST):
                self._race_once(chance, number)
            self._pace.wrote(thread, _BURST)

    def _race_once(self, chance: random.Random, number: int) -> None:
        """At the page's first byte, at its last, in both, or over the border to the next."""
        at = self._address + chance.randrange(self._pages - 1) * PAGE_BYTES
        offset, size = chance.choice(((0, 1), (PAGE_BYTES - 1, 1), (0, PAGE_BYTES), (PAGE_BYTES - 1, 2)))
        _libc.memset(at + offset, number, size)


def serve(sock_fd: int, pace_fd: int, blocks: list[tuple[int, int]]) -> None:
    """The process's whole life."""
    _Process(socket.socket(fileno=sock_fd), pace_fd, blocks).serve()


# -- as the host has it -------------------------------------------------------------------------------


class ArmedWriter:
    """The process, and the host's ends of its RAM, which stays its caller's."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self.pages = sum(block.pages for block in blocks)
        self._blocks = blocks
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(WAIT_S)
        pace_fd = os.memfd_create("pace")
        os.ftruncate(pace_fd, PAGE_BYTES)
        self.pace = Pace(pace_fd)
        shapes = [(block.fd, block.pages) for block in blocks]
        code = f"from tests.support.armed_writer import serve;serve({theirs.fileno()}, {pace_fd}, {shapes})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(theirs.fileno(), pace_fd, *(block.fd for block in blocks)),
            cwd=Path(__file__).resolve().parents[2],
        )
        theirs.close()
        os.close(pace_fd)
        self.addresses: tuple[int, ...] = ()
        self.pagemap_fd = -1

    @property
    def pid(self) -> int:
        return self._process.pid

    def arm(self) -> KernelDirtyLog:
        """Armed, and the log begun; it is the caller's."""
        self._send("arm")
        data, fds, _, _ = socket.recv_fds(self._sock, 8 * len(self._blocks), 1)
        assert fds, "the process could not arm: its kernel lacks asynchronous write-protection"
        self.addresses = struct.unpack(f"<{len(data) // 8}Q", data)
        self._await()
        first, ranges = 0, []
        for address, block in zip(self.addresses, self._blocks, strict=True):
            ranges.append(ArmedRange(address, block.pages, first))
            first += block.pages
        log = KernelDirtyLog(fds[0], ranges, self.pages)
        log.begin()
        return log

    def disarm(self) -> None:
        self._ask("disarm")

    def write(self, manner: Manner, pages: Sequence[int], number: int) -> None:
        """Returns when it is done."""
        self._ask("write", manner, list(pages), number)

    def race(self, threads: int, seed: int) -> None:
        """Its threads begin to write number 1."""
        self.pace.publish(1)
        self._ask("race", threads, seed)

    def turn(self, number: int, threads: int) -> None:
        """Publish a number, and wait until no thread writes another."""
        self.pace.publish(number)
        self._until(lambda: self.pace.acknowledged(threads) == {number}, f"all threads to write {number}")

    def more_writes(self, count: int) -> None:
        """Wait until that many more were made."""
        enough = self.pace.writes + count
        self._until(lambda: self.pace.writes >= enough, f"{count} more writes")

    def stop(self) -> None:
        """End a race."""
        self.pace.publish(0)
        self._ask("join")

    def _until(self, look: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not look():
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}"
            time.sleep(0.0005)

    def _ask(self, command: str, *arguments: object) -> None:
        self._send(command, *arguments)
        self._await()

    def _send(self, command: str, *arguments: object) -> None:
        self._sock.sendall(json.dumps([command, *arguments]).encode() + b"\n")

    def _await(self) -> None:
        assert self._sock.recv(1) == b"k", "the process ended"

    def close(self) -> None:
        self.pace.publish(0)
        self._sock.close()
        self._process.kill()
        self._process.wait(WAIT_S)
