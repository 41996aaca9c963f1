"""What the lab's guest does all day, and what it answers about it: a program of its own, run in the guest.

It rewrites memory whose content it can tell, forks, reads files back and counts. The host asks over the
virtio port ``org.migd.lab.0``, a JSON object a line, and gets a line for each::

    {"id": 7, "do": "rate", "bytes_s": 4000000}
    {"id": 7, "ok": true}   or   {"id": 7, "ok": false, "error": "..."}

Lines are lost, or half lost, when the guest moves; so each begins with a newline, too, and what is no JSON is
passed over. The standard library is all that there is in the guest, and this file all of migd.

On any Linux: ``workload.py --socket PATH`` listens at a Unix socket instead. Modules that only this needs, or
that are slow to import (pathlib, argparse: half a second under TCG), are not imported in the guest.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import select
import signal
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from socket import socket

PORT = "org.migd.lab.0"
PAGE_BYTES = 4096
_PORTS = "/sys/class/virtio-ports"
MIB = 1 << 20

_DIGEST_BYTES = 32
_BUFFER_BYTES = 8 * MIB
_RATE_BYTES_S = 2_000_000
_STRIDE = 769  # prime, so that all pages get their turn, and none beside the one before

_TICK_S = 0.02
_CATCH_UP_S = 0.25  # after a pause the writer does not make up for more than this
_FORK_S = 0.5
_FORK_LIMIT_S = 60.0
_FORK_BYTES = MIB
_FORK_PAGES = 64
_FILE_S = 0.1
_FILES = 48
_LINE_LIMIT = 64 << 10
_SEND_S = 1.0
_KERNEL_LINES = 400
_AGENT = b"/migd/agent.py"

_COMPLAINT = re.compile(
    r"BUG:|BUG at|Oops|Kernel panic|[Bb]ad page|segfault|general protection|Corrupted|Call Trace"
    r"|Out of memory"
)


class Buffers:
    """Pages of anonymous memory, each a function of its number and of how often it was written."""

    def __init__(self, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._generations = array("Q", bytes(8 * (size_bytes // PAGE_BYTES)))
        self._next = 0
        self._owed_bytes = 0.0
        self.rate_bytes_s = float(_RATE_BYTES_S)
        for page in range(self.pages):
            self._write(page)

    @property
    def pages(self) -> int:
        return len(self._generations)

    def step(self, elapsed_s: float) -> None:
        """Writes as many pages as the rate allows."""
        self._owed_bytes += self.rate_bytes_s * min(elapsed_s, _CATCH_UP_S)
        while self._owed_bytes >= PAGE_BYTES:
            self._owed_bytes -= PAGE_BYTES
            self._generations[self._next] += 1
            self._write(self._next)
            self._next = (self._next + _STRIDE) % self.pages

    def wrong(self, first: int, pages: int) -> list[int]:
        """Those of the pages from ``first`` on, around the end, that do not hold what was written to them."""
        some = [(first + offset) % self.pages for offset in range(min(pages, self.pages))]
        return [
            page
            for page in some
            if self._memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] != self._content(page)
        ]

    def corrupt(self, page: int) -> None:
        """Makes one byte of the page wrong, so that a check can be checked."""
        if not 0 <= page < self.pages:
            raise ValueError(f"there are {self.pages} pages, and none is {page}")
        self._memory[page * PAGE_BYTES + 1234] ^= 0xFF

    def _write(self, page: int) -> None:
        self._memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = self._content(page)

    def _content(self, page: int) -> bytes:
        state = struct.pack("<QQ", page, self._generations[page])
        return blake2b(state, digest_size=_DIGEST_BYTES).digest() * (PAGE_BYTES // _DIGEST_BYTES)


class Forks:
    """A child every now and then, which takes memory of its own and looks at that of its parent."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._child = 0
        self._due_s = 0.0
        self._limit_s = 0.0
        self._first = 0
        self.done = 0
        self.failures = 0

    def step(self, now_s: float) -> None:
        if self._child:
            self._reap(now_s)
        elif now_s >= self._due_s and self._buffers.rate_bytes_s > 0:
            self._due_s = now_s + _FORK_S
            self._limit_s = now_s + _FORK_LIMIT_S
            self._first = (self._first + _FORK_PAGES) % self._buffers.pages
            self._child = child_of(self._inspect)

    def _reap(self, now_s: float) -> None:
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if pid:
            self._child = 0
            self.done += 1
            self.failures += status != 0
        elif now_s > self._limit_s:
            os.kill(self._child, signal.SIGKILL)

    def _inspect(self) -> bool:
        own = mmap.mmap(-1, _FORK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mark = struct.pack("<Q", os.getpid())
        for start in range(0, _FORK_BYTES, PAGE_BYTES):
            own[start : start + 8] = mark
        wrong = self._buffers.wrong(self._first, _FORK_PAGES)
        return not wrong and own[::PAGE_BYTES] == mark[:1] * (_FORK_BYTES // PAGE_BYTES)


class Files:
    """A small tree of files whose content was known when they were written."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._digests: dict[str, bytes] = {}
        self._due_s = 0.0
        self._turn = 0
        self.read = 0
        self.failures = 0
        for number in range(_FILES):
            path = f"{directory}/{number % 4}/{number}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            content = os.urandom(2048) * (1 + number % 16)
            with open(path, "xb") as file:
                file.write(content)
            self._digests[path] = blake2b(content).digest()

    def remove(self) -> None:
        """The tree, and the directory it is in."""
        for directory, _, names in os.walk(self._directory, topdown=False):
            for name in names:
                os.unlink(f"{directory}/{name}")
            os.rmdir(directory)

    def step(self, now_s: float) -> None:
        """Reads the next one, if it is time."""
        if now_s < self._due_s:
            return
        self._due_s = now_s + _FILE_S
        path = list(self._digests)[self._turn % _FILES]
        self._turn += 1
        self._read_back(path)

    def _read_back(self, path: str) -> None:
        self.read += 1
        try:
            self.failures += blake2b(read_file(path)).digest() != self._digests[path]
        except OSError:
            self.failures += 1


class Hoard:
    """Memory that a child has filled and keeps; it looks at the content before it gives it back."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        ready, self._ready = os.pipe()
        self._ending, self._end = os.pipe()
        self.pid = child_of(self._hold)
        os.close(self._ready)
        os.close(self._ending)
        os.set_blocking(ready, False)
        self._filled_fd = ready

    def _hold(self) -> bool:
        noise = os.urandom(MIB)
        memory = filled(self.size_bytes, noise)
        os.write(self._ready, b".")
        os.read(self._ending, 1)
        return all(
            memory[start : start + len(piece)] == piece for start, piece in pieces(self.size_bytes, noise)
        )

    def is_filled(self) -> bool:
        """OSError if the child has ended instead."""
        try:
            if os.read(self._filled_fd, 1):
                return True
        except BlockingIOError:
            return False
        raise OSError("the child ended: not enough memory?")

    def end(self) -> None:
        """Have it look, and end, if it has not ended already."""
        with suppress(OSError):
            os.write(self._end, b".")
        for fd in (self._filled_fd, self._end):
            os.close(fd)


class KernelLog:
    """What the kernel has said; the last lines, and how many of all were complaints."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_KERNEL_LINES)
        self.complaints: list[str] = []
        self._fd = -1
        with suppress(OSError):  # a container, or not root
            self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def read(self) -> None:
        """Takes in what was said since the last time."""
        while self._fd >= 0:
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:  # overtaken: older records are gone, the next read goes on
                continue
            except OSError:  # no more
                return
            line = record.decode(errors="replace").split("\n", 1)[0].partition(";")[2]
            self.lines.append(line)
            if _COMPLAINT.search(line) and len(self.complaints) < _KERNEL_LINES:
                self.complaints.append(line)


class Workload:
    """All that goes on in the guest, in one thread: so nothing is ever looked at while it is written."""

    def __init__(self, files: Files) -> None:
        self._buffers = Buffers(_BUFFER_BYTES)
        self._forks = Forks(self._buffers)
        self._files = files
        self._kernel = KernelLog()
        self._began_s = self._last_s = time.monotonic()
        self._counter = 0
        self._clock_failures = 0
        self._hoard: Hoard | None = None
        self._hoard_wrong = False

    def step(self) -> None:
        """A little of everything that is due."""
        now_s = time.monotonic()
        self._counter += 1
        self._clock_failures += now_s < self._last_s
        self._buffers.step(max(0.0, now_s - self._last_s))
        self._forks.step(now_s)
        self._files.step(now_s)
        self._last_s = now_s

    def answer(self, line: bytes) -> bytes | None:
        """The answer to a line, which is a request or the rest of one; None to what is none."""
        try:
            request = json.loads(line)
        except ValueError:
            return None
        if not isinstance(request, dict):
            return None
        try:
            found = {"ok": True, **self._do(request)}
        except (KeyError, TypeError, ValueError, OSError) as error:
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        return b"\n" + json.dumps({"id": request.get("id"), **found}).encode() + b"\n"

    def _do(self, request: dict[str, Any]) -> dict[str, object]:
        match request.get("do"):
            case "ping":
                return {}
            case "status":
                return self._status()
            case "check":
                wrong = self._buffers.wrong(0, self._buffers.pages)
                first = wrong[0] if wrong else None
                return {"pages": self._buffers.pages, "wrong": len(wrong), "first_wrong": first}
            case "rate":
                self._buffers.rate_bytes_s = max(0.0, float(request["bytes_s"]))
                return {}
            case "hog":
                return self._hog(int(request["bytes"]))
            case "grab":
                return self._grab(int(request["bytes"]))
            case "release":
                return self._release()
            case "agent":
                return self._signal_agent(int(request["signal"]))
            case "drop":
                os.sync()
                write_file("/proc/sys/vm/drop_caches", b"3")
                return {}
            case "dmesg":
                self._kernel.read()
                return {"lines": list(self._kernel.lines)[-int(request.get("lines", 50)) :]}
            case "corrupt":
                self._buffers.corrupt(int(request["page"]))
                return {}
            case unknown:
                raise ValueError(f"nothing here is called {unknown!r}")

    def _status(self) -> dict[str, object]:
        self._kernel.read()
        memory = dict(re.findall(r"^(\w+): +(\d+) kB", read_file("/proc/meminfo").decode(), re.MULTILINE))
        return {
            "counter": self._counter,
            "uptime_s": round(time.monotonic() - self._began_s, 3),
            "clock_failures": self._clock_failures,
            "rate_bytes_s": self._buffers.rate_bytes_s,
            "forks": self._forks.done,
            "fork_failures": self._forks.failures,
            "files_read": self._files.read,
            "file_failures": self._files.failures,
            "mem_free_bytes": int(memory["MemFree"]) << 10,
            "mem_total_bytes": int(memory["MemTotal"]) << 10,
            "kernel_complaints": len(self._kernel.complaints),
            "first_complaint": self._kernel.complaints[0] if self._kernel.complaints else None,
        }

    def _hog(self, size_bytes: int) -> dict[str, object]:
        """Free pages full of old data: a child writes so much memory and ends. The rest goes on meanwhile."""
        status = self._reap(child_of(lambda: scribble(size_bytes)))
        if status:
            raise OSError(f"the child ended with status {status}: not enough memory?")
        return {"bytes": size_bytes}

    def _grab(self, size_bytes: int) -> dict[str, object]:
        """A child writes so much memory, and keeps it until ``release``. Asked again it changes nothing."""
        if self._hoard is None:
            self._hoard = Hoard(size_bytes)
            try:
                while not self._hoard.is_filled():
                    self.step()
                    time.sleep(_TICK_S)
            except OSError:
                self._release()
                raise
        return {"bytes": self._hoard.size_bytes}

    def _release(self) -> dict[str, object]:
        """The child looks whether its memory is what it has written, and ends. Again: the same answer."""
        if self._hoard is not None:
            hoard, self._hoard = self._hoard, None
            hoard.end()
            self._hoard_wrong = self._reap(hoard.pid) != 0
        return {"wrong": self._hoard_wrong}

    def _reap(self, pid: int) -> int:
        """The status of a child, once it has ended. The rest goes on meanwhile."""
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return status
            self.step()
            time.sleep(_TICK_S)

    def _signal_agent(self, number: int) -> dict[str, object]:
        """To the agent beside us, if there is one; when it ends process 1 starts it again a second later."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal() and _AGENT in words_of(name)]
        for pid in pids:
            os.kill(pid, number)
        return {"agents": len(pids)}


def read_file(path: str) -> bytes:
    """All of it."""
    with open(path, "rb") as file:
        return file.read()


def write_file(path: str, content: bytes) -> None:
    """Over what is there: for the kernel's settings."""
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def words_of(pid: str) -> list[bytes]:
    """The command line of a process; nothing if it has ended."""
    with suppress(OSError):
        return read_file(f"/proc/{pid}/cmdline").split(b"\0")
    return []


def scribble(size_bytes: int) -> bool:
    """Fills so much memory, for no longer than this process lives."""
    filled(size_bytes, os.urandom(MIB))
    return True


def filled(size_bytes: int, noise: bytes) -> mmap.mmap:
    """So much memory, with content that is nowhere zero and of which no two pages are the same."""
    with suppress(OSError):  # if memory does not suffice it is this child that should go
        write_file("/proc/self/oom_score_adj", b"1000")
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start, piece in pieces(size_bytes, noise):
        memory[start : start + len(piece)] = piece
    return memory


def pieces(size_bytes: int, noise: bytes) -> Iterator[tuple[int, bytes]]:
    """That content by where it begins: a MiB of noise, each time turned a little further."""
    for number, start in enumerate(range(0, size_bytes, MIB)):
        turn = number * 17 % MIB
        piece = noise[turn:] + noise[:turn]
        yield start, piece[: min(MIB, size_bytes - start)]


def child_of(work: Callable[[], bool]) -> int:
    """The process id of a child that does the work, and whose exit status is 0 if it succeeded."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = 0 if work() else 1
    finally:
        os._exit(status)


class Port(Protocol):
    """Where requests come from."""

    def receive(self, wait_s: float) -> bytes:
        """What there is, after so long at most; nothing, too, if nobody is there."""

    def send(self, data: bytes) -> None:
        """As much of it as somebody takes in time."""


class VirtioPort:
    """The virtio-serial port of that name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd = -1

    def receive(self, wait_s: float) -> bytes:
        if self._fd < 0 and not self._open():
            time.sleep(wait_s)
            return b""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        events = poll.poll(wait_s * 1000)
        try:
            data = os.read(self._fd, _LINE_LIMIT) if events else b""
        except BlockingIOError:
            data = b""
        except OSError:
            self._close()
            data = b""
        if events and not data:  # the host is not connected: poll returns at once, too
            time.sleep(wait_s)
        return data

    def send(self, data: bytes) -> None:
        deadline_s = time.monotonic() + _SEND_S
        while data and time.monotonic() < deadline_s:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # nobody there, or not reading
                time.sleep(_TICK_S)
            except OSError:
                self._close()
                return

    def _open(self) -> bool:
        with suppress(OSError):  # there is none yet
            for port in os.listdir(_PORTS):
                if read_file(f"{_PORTS}/{port}/name").decode().strip() == self._name:
                    self._fd = os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return self._fd >= 0

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class SocketPort:
    """A Unix socket in its place; whoever connected last is the host."""

    def __init__(self, listener: socket) -> None:
        self._listener = listener
        self._host: socket | None = None

    def receive(self, wait_s: float) -> bytes:
        hosts = [self._host] if self._host else []
        ready, _, _ = select.select([self._listener, *hosts], [], [], wait_s)
        if self._listener in ready:
            self._drop()
            self._host, _ = self._listener.accept()
            self._host.settimeout(_SEND_S)
        elif ready and self._host:
            try:
                data = self._host.recv(_LINE_LIMIT)
            except OSError:
                data = b""
            if not data:
                self._drop()
            return data
        return b""

    def send(self, data: bytes) -> None:
        try:
            if self._host:
                self._host.sendall(data)
        except OSError:
            self._drop()

    def _drop(self) -> None:
        if self._host:
            self._host.close()
        self._host = None


def serve(port: Port, workload: Workload) -> None:
    """Works and answers, for ever."""
    pending = b""
    while True:
        workload.step()
        *lines, pending = (pending + port.receive(_TICK_S)).split(b"\n")
        pending = pending[-_LINE_LIMIT:]
        for line in lines:
            answer = workload.answer(line)
            if answer is not None:
                port.send(answer)


def listening(path: str) -> SocketPort:
    """The port at a new socket of that name."""
    import socket

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return SocketPort(listener)


def main(arguments: list[str]) -> None:
    """Ends at SIGTERM, leaving no files behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    match arguments:
        case []:
            port: Port = VirtioPort(PORT)
        case ["--socket", path]:
            port = listening(path)
        case _:
            sys.exit("usage: workload.py [--socket PATH]")
    files = Files(f"{os.environ.get('TMPDIR', '/tmp')}/migd-lab-{os.urandom(4).hex()}")
    try:
        serve(port, Workload(files))
    finally:
        files.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
