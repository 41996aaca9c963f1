#!/usr/bin/env python3
# ruff: noqa: UP006, UP035, UP045 - this file has to run on the Python 3.6 of old guests.
"""The agent: root's program in a Linux guest under stock QEMU that tells migd's daemon which pages are free.

It is one file, uses the standard library only and imports nothing of migd, because it is copied into guests:
the frames of ``migd/guest/hints.py`` are written a second time here, and a golden test holds both against
each other. It runs on Python 3.6 and later.

Every page the agent writes has to be moved as well. So it reads the kernel's page flags window by window into
one buffer, sends each window before it looks at the next, and is silent while a migration is under way.
"""

import argparse
import errno
import gc
import gzip
import os
import re
import select
import signal
import socket
import struct
import sys
import time
import zlib
from contextlib import suppress
from io import FileIO
from typing import Iterator, List, NamedTuple, Optional, Set, Tuple

AGENT_VERSION = "0.1.0"
"""Of migd, whose part it is."""

PORT_NAME = "org.migd.hints.0"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# -- frames: see migd/guest/hints.py for their meaning ----------------------------------------------------

PROTOCOL_VERSION = 1
GREET, HELLO, REQUEST, RANGES, BITMAP, END, DONE = range(1, 8)
NONE, ANYTHING, ZERO = range(3)
CONTRACT_NAMES = ("NONE", "ANYTHING", "ZERO")
WEAK = 0
"""The flags are read without the allocator's lock."""

MAX_TAKEN_BODY_BYTES = 4096
"""The host's longest frame has a body of 2 bytes; what announces more than this is not from a host."""

_MAGIC = b"fpH1"
_HEADER = struct.Struct("<4sBBHIQII")
_HEADER_CRC_AT = 24
_CRC = struct.Struct("<I")
_GREET = struct.Struct("<H")
_HELLO = struct.Struct("<HBBIQ")
_RANGE = struct.Struct("<QQ")
_BITMAP = struct.Struct("<QI")
_END = struct.Struct("<Q")

Frame = Tuple[int, int, bytes]
"""Type, epoch, body."""


def encode(kind: int, epoch: int, body: bytes = b"") -> bytes:
    """One frame."""
    head = _HEADER.pack(_MAGIC, kind, 0, 0, len(body), epoch, zlib.crc32(body), 0)[:_HEADER_CRC_AT]
    return head + _CRC.pack(zlib.crc32(head)) + body


def hello(contract: int, pages: int) -> bytes:
    """What this guest declares; ``pages``: as many as it may speak of, the last one's number plus one."""
    return encode(HELLO, 0, _HELLO.pack(PROTOCOL_VERSION, contract, WEAK, PAGE_BYTES, pages))


class FrameReader:
    """Bytes in, the host's frames out; what is damaged, or not a frame, is skipped."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> List[Frame]:
        """Every whole, good frame of a host that ``data`` completes."""
        self._buffer += data
        frames: List[Frame] = []
        while True:
            skip, frame = self._next()
            if not skip:
                return frames
            del self._buffer[:skip]
            if frame is not None and _fits(frame):
                frames.append(frame)

    def _next(self) -> Tuple[int, Optional[Frame]]:
        """How many bytes are done with (0: more have to come), and the frame they were, if they were one."""
        at = self._buffer.find(_MAGIC)
        if at != 0:
            # The tail may be the beginning of a magic.
            return (at if at > 0 else max(0, len(self._buffer) - len(_MAGIC) + 1)), None
        if len(self._buffer) < _HEADER.size:
            return 0, None
        _, kind, zero, zero2, length, epoch, body_crc, head_crc = _HEADER.unpack_from(self._buffer)
        sound = zlib.crc32(self._buffer[:_HEADER_CRC_AT]) == head_crc and not zero and not zero2
        if not sound or length > MAX_TAKEN_BODY_BYTES:
            return len(_MAGIC), None
        if len(self._buffer) < _HEADER.size + length:
            return 0, None
        body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        if zlib.crc32(body) != body_crc:
            return len(_MAGIC), None  # a later frame may begin within what was taken for the body
        return _HEADER.size + length, (kind, epoch, body)


def _fits(frame: Frame) -> bool:
    """Whether it is one that a host of this protocol version sends."""
    kind, _, body = frame
    if kind == GREET:
        return body == _GREET.pack(PROTOCOL_VERSION)
    return kind in (REQUEST, DONE) and not body


# -- what free pages hold ---------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the guest expects to read in a page that it had declared free, and what tells so."""

    contract: int
    why: str


def judge(cmdline: str, config: str, kernel_log: str) -> Verdict:
    """The contract of the kernel with this command line, configuration and log (rule R12).

    ``config`` and ``kernel_log`` may be empty, or cut. In doubt about a poison: NONE. In doubt about zeros:
    ZERO, which asks nothing of migd that it does not do for every guest.
    """
    return _poisoned(cmdline, config, kernel_log) or _zeroed(cmdline, config, kernel_log)


def _poisoned(cmdline: str, config: str, kernel_log: str) -> Optional[Verdict]:
    """The verdict on a kernel that writes something into free pages and may look at it again."""
    debug = switched(cmdline, "debug_pagealloc")
    if debug is None:
        debug = configured(config, "DEBUG_PAGEALLOC_ENABLE_DEFAULT")
    if debug and configured(config, "DEBUG_PAGEALLOC") is not False:
        return Verdict(NONE, "debug_pagealloc is on")
    poison = switched(cmdline, "page_poison") and configured(config, "PAGE_POISONING") is not False
    if not poison and "PAGE_POISONING is on" not in kernel_log:
        return None
    if configured(config, "PAGE_POISONING_ZERO"):  # until Linux 5.10
        return Verdict(ZERO, "page_poison is on, and the poison is zero (CONFIG_PAGE_POISONING_ZERO)")
    return Verdict(NONE, "page_poison is on")


def _zeroed(cmdline: str, config: str, kernel_log: str) -> Verdict:
    """Whether free pages have to read as zero: init_on_free."""
    reported = re.findall(r"^mem auto-init: .*heap free:(on|off)", kernel_log, re.MULTILINE)
    if reported:
        on, witness = reported[-1] == "on", "the kernel's log"
    elif switched(cmdline, "init_on_free") is not None:
        on, witness = bool(switched(cmdline, "init_on_free")), "the kernel's command line"
    elif configured(config, "INIT_ON_FREE_DEFAULT_ON") is not None:
        on, witness = bool(configured(config, "INIT_ON_FREE_DEFAULT_ON")), "the kernel's configuration"
    else:
        return Verdict(ZERO, "nothing tells whether init_on_free is on")
    return Verdict(ZERO if on else ANYTHING, "init_on_free is {} ({})".format("on" if on else "off", witness))


def switched(cmdline: str, name: str) -> Optional[bool]:
    """What the last valid ``name=`` of a kernel command line says, in the kernel's own words for yes and no.

    None without one. What follows a lone ``--`` is for init.
    """
    state = None
    for word in re.findall(r'(?:"[^"]*"|[^\s"])+', cmdline):
        if word == "--":
            break
        key, _, value = word.replace('"', "").partition("=")
        if key.replace("-", "_") == name:
            if re.match("[1yYtT]|[oO][nN]", value):
                state = True
            elif re.match("[0nN]|[oO][fF]", value):
                state = False
    return state


def configured(config: str, symbol: str) -> Optional[bool]:
    """Whether CONFIG_``symbol`` is y; None where the configuration does not know it, or is not known."""
    if re.search(rf"^CONFIG_{symbol}=y$", config, re.MULTILINE):
        return True
    return False if f"# CONFIG_{symbol} is not set" in config else None


def judge_this_kernel() -> Verdict:
    """The contract of the kernel this runs on. Its log may have lost its beginning, or be forbidden."""
    return judge(_text("/proc/cmdline"), _kernel_config(), _kernel_log())


def _kernel_config() -> str:
    with suppress(OSError), gzip.open("/proc/config.gz", "rt", encoding="ascii", errors="replace") as file:
        return str(file.read())
    release = os.uname().release
    return _text(f"/boot/config-{release}") or _text(f"/lib/modules/{release}/config")


def _kernel_log() -> str:
    """What the kernel itself, and no program, has said about clearing memory: a few lines."""
    lines = []
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        while True:
            try:
                record = os.read(log, 1 << 13)
            except BrokenPipeError:  # the oldest record was overwritten meanwhile
                continue
            prefix, _, text = record.decode("ascii", "replace").partition(";")
            level = prefix.partition(",")[0]
            of_kernel = level.isdigit() and int(level) < 8  # above the level's 3 bits: the facility, 0
            if of_kernel and text.startswith("mem auto-init:"):
                lines.append(text.partition("\n")[0])
    except OSError:  # BlockingIOError: that was the last record
        pass
    finally:
        os.close(log)
    return "\n".join(lines)


def _text(path: str) -> str:
    """The content of a file; nothing if there is none, or it is not for us."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


# -- which pages are free ---------------------------------------------------------------------------------

WINDOW_PAGES = 1 << 14
"""64 MiB of RAM, 128 KiB of flags. With 16 MiB a GiB takes up to half as long again; with 256 MiB an answer
writes to 350 pages of the agent's own instead of 200, and the host waits longer for the first of it."""

_FLAG_BYTES = 8
_BUDDY_BYTE, _BUDDY_BIT = 1, 1 << 2
"""KPF_BUDDY is bit 10 of a page's flags (include/uapi/linux/kernel-page-flags.h)."""
_AS_DIGIT = bytes(b"01"[bool(flags & _BUDDY_BIT)] for flags in range(256))

_START_PAGES = 64
"""The host takes a bitmap whose first page is a multiple of this."""

_DEFLATE_WINDOW_BITS, _DEFLATE_MEMORY_LEVEL = 11, 4
"""A bitmap has 2 KiB: more history is of no use. zlib takes 16 KiB of memory instead of 268."""


class Run(NamedTuple):
    """Page frames from ``first`` up to, not including, ``stop``."""

    first: int
    stop: int


def system_ram(iomem: str, page_bytes: int = PAGE_BYTES) -> List[Run]:
    """The page frames of RAM by /proc/iomem: whole ones, ascending; none without root's rights."""
    runs = []
    for start, last in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", iomem, re.MULTILINE):
        run = Run(-(-int(start, 16) // page_bytes), (int(last, 16) + 1) // page_bytes)
        if run.first < run.stop:
            runs.append(run)
    return sorted(runs)


def windows(ram: List[Run], window_pages: int = WINDOW_PAGES) -> Iterator[Run]:
    """RAM in pieces that fit into the buffer."""
    for first, stop in ram:
        while first < stop:
            end = min(stop, (first // window_pages + 1) * window_pages)
            yield Run(first, end)
            first = end


class PageFlags:
    """The kernel's flags of every page frame, /proc/kpageflags, and the one buffer they are read into.

    OSError if there is none (CONFIG_PROC_PAGE_MONITOR), or it is not for us.
    """

    def __init__(self, path: str = "/proc/kpageflags", window_pages: int = WINDOW_PAGES) -> None:
        self.window_pages = window_pages
        self._file = FileIO(path)
        self._buffer = bytearray(_FLAG_BYTES * window_pages)
        self._view = memoryview(self._buffer)

    def close(self) -> None:
        self._file.close()

    def free(self, window: Run) -> bytes:
        """A digit for each page, the *last* page first: 1 if it was free at both of two looks.

        Two, because the flags are read without the allocator's lock: a page that is on its way out of the
        free list may still look free, once.
        """
        one, two = self._look(window), self._look(window)
        if one == two:
            return one
        both = int.from_bytes(one, "little") & int.from_bytes(two, "little")  # '0' & '1' == '0'
        return both.to_bytes(len(one), "little")

    def _look(self, window: Run) -> bytes:
        size = _FLAG_BYTES * (window.stop - window.first)
        self._file.seek(_FLAG_BYTES * window.first)
        filled = 0
        while filled < size:
            got = self._file.readinto(self._view[filled:size])
            if not got:  # page frames beyond the last one the kernel knows
                self._view[filled:size] = bytes(size - filled)
                break
            filled += got
        return bytes(self._buffer[size - _FLAG_BYTES + _BUDDY_BYTE :: -_FLAG_BYTES].translate(_AS_DIGIT))


def answer(epoch: int, ram: List[Run], flags: PageFlags) -> Iterator[bytes]:
    """The frames that tell which pages are free: for each window one, or nothing if none of it is.

    A window is looked at when its frame is asked for, and not before.
    """
    free_pages = 0
    for window in windows(ram, flags.window_pages):
        digits = flags.free(window)
        free = digits.count(b"1")
        free_pages += free
        yield _window_frame(epoch, window, digits) if free else b""
    yield encode(END, epoch, _END.pack(free_pages))


def _window_frame(epoch: int, window: Run, digits: bytes) -> bytes:
    """As BITMAP or RANGES, whichever is smaller."""
    ranges_bytes = _RANGE.size * (digits.count(b"01") + digits.startswith(b"1"))
    if ranges_bytes > 2 * _RANGE.size:  # a bitmap has never less than its own header and zlib's
        bitmap = _bitmap(window, digits)
        if len(bitmap) <= ranges_bytes:
            return encode(BITMAP, epoch, bitmap)
    return encode(RANGES, epoch, _ranges(window, digits))


def _bitmap(window: Run, digits: bytes) -> bytes:
    lead = window.first % _START_PAGES
    first, pages = window.first - lead, len(digits) + lead
    bits = (int(digits, 2) << lead).to_bytes(-(-pages // 8), "little")
    squeeze = zlib.compressobj(1, zlib.DEFLATED, _DEFLATE_WINDOW_BITS, _DEFLATE_MEMORY_LEVEL)
    return _BITMAP.pack(first * PAGE_BYTES, pages) + squeeze.compress(bits) + squeeze.flush()


def _ranges(window: Run, digits: bytes) -> bytes:
    return b"".join(
        _RANGE.pack((window.first + run.start()) * PAGE_BYTES, (run.end() - run.start()) * PAGE_BYTES)
        for run in re.finditer(b"1+", digits[::-1])
    )


# -- the guest --------------------------------------------------------------------------------------------

DROP_CACHES = "/proc/sys/vm/drop_caches"
SAME_MIGRATION_S = 30.0
"""A request so long after the one before is another migration's. The page cache is dropped once in each: what
the guest reads again afterwards would be lost once more."""


class Guest:
    """What the agent can tell of the machine it runs on."""

    def __init__(self, drop_caches: bool = False) -> None:
        self.ram: List[Run] = []
        self.flags: Optional[PageFlags] = None
        self.verdict = Verdict(NONE, "not looked at yet")
        self._drop_caches = drop_caches
        self._asked_s: Optional[float] = None
        self.look()

    @property
    def pages(self) -> int:
        """As many as an answer may speak of: the number of the last page of RAM plus one."""
        return self.ram[-1].stop if self.ram else 0

    def look(self) -> None:
        """Where RAM is, which may have changed, and, at first, the rest."""
        self.ram = system_ram(_text("/proc/iomem"))
        if not self.ram:
            self.verdict = Verdict(NONE, "/proc/iomem tells no addresses: the agent has to run as root")
            return
        try:
            if self.flags is None:
                self.flags = PageFlags()
                self.verdict = judge_this_kernel()
            # Nothing shall be declared that cannot be read. And what an emulator has translated once it runs
            # twice as fast: the answer that a host waits for shall not be the first.
            next(answer(0, self.ram, self.flags))
        except OSError as error:
            if self.flags is not None:
                self.flags.close()
                self.flags = None
            self.verdict = Verdict(NONE, f"/proc/kpageflags: {_reason(error)}")

    def answer(self, epoch: int) -> Iterator[bytes]:
        """The frames of an answer. Nothing is looked at before the first one is asked for."""
        if self.flags is None or self.verdict.contract == NONE:
            return iter((encode(END, epoch, _END.pack(0)),))
        return answer(epoch, self.ram, self.flags)

    def free_pages(self) -> int:
        """As many as an answer would tell now."""
        if self.flags is None:
            return 0
        flags = self.flags
        return sum(flags.free(window).count(b"1") for window in windows(self.ram, flags.window_pages))

    def make_room(self) -> None:
        """Drop the page cache, if that was asked for and not done already for this migration."""
        now, before_s = time.monotonic(), self._asked_s
        self._asked_s = now
        if not self._drop_caches or (before_s is not None and now - before_s < SAME_MIGRATION_S):
            return
        before = _free_kib()
        try:
            with open(DROP_CACHES, "w") as file:
                file.write("1")
        except OSError as error:
            say(f"--drop-caches: {_reason(error)}")
            return
        took_ms = 1000 * (time.monotonic() - now)
        after = _free_kib()
        gain = after - before
        say(f"page cache dropped: MemFree {before} -> {after} kB ({gain:+} kB) in {took_ms:.0f} ms")


def _free_kib() -> int:
    found = re.search(r"^MemFree: +(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) if found else 0


# -- the channel ------------------------------------------------------------------------------------------

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.2
"""Between two looks whether the host is there: a virtio-serial port cannot be waited upon for that."""
LONGEST_PAUSE_WITHOUT_PORT_S = 1.0
"""It may be plugged in while the guest runs, but nobody is in a hurry then."""

STALLED_S = 5.0
"""An answer of which the host takes nothing for so long is dropped."""
QUIET_S = 5.0
"""So long after the last answer it is said how many there were: a line in a log dirties pages as well."""
_READ_BYTES = 4096


class Pause:
    """Sleeps longer from time to time, until what was waited for is there."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._next_s = SHORTEST_PAUSE_S

    @property
    def is_long(self) -> bool:
        """It sleeps no longer than it has: there was nothing for a while."""
        return self._next_s == self._longest_s

    def sleep(self) -> None:
        time.sleep(self._next_s)
        self._next_s = min(2 * self._next_s, self._longest_s)

    def reset(self) -> None:
        self._next_s = SHORTEST_PAUSE_S


class Port:
    """An open channel to the host: a virtio-serial port, or a unix socket. OSError once it is of no use."""

    def __init__(self, fd: int, name: str, is_socket: bool) -> None:
        self.fd = fd
        self.name = name
        self._is_socket = is_socket

    @classmethod
    def device(cls, path: str) -> "Port":
        return cls(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), path, is_socket=False)

    @classmethod
    def connect(cls, path: str) -> "Port":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        return cls(sock.detach(), path, is_socket=True)

    def read(self) -> Optional[bytes]:
        """What has arrived; nothing if that is nothing; None if the host is not there."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return b""
        if data:
            return data
        if self._is_socket:
            raise ConnectionResetError(errno.ECONNRESET, "the host closed the socket")
        return None

    def write(self, data: memoryview) -> int:
        """How many bytes were taken."""
        try:
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self.fd)


class PortPlace:
    """Where the port is: a device, a socket, or whichever device has the name that migd gave it."""

    def __init__(self, device: Optional[str], socket_path: Optional[str]) -> None:
        self._device = device
        self._socket = socket_path

    def __str__(self) -> str:
        return self._socket or self._device or "virtio-serial port " + PORT_NAME

    def find(self) -> Optional[str]:
        """The path it has now; None while there is none."""
        path = self._socket or self._device or _named_port()
        return path if path and os.path.exists(path) else None

    def open(self) -> Port:
        """OSError while it cannot be."""
        path = self.find()
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "there is none")
        return Port.connect(path) if self._socket else Port.device(path)


def _named_port() -> Optional[str]:
    """The device by its name, with or without udev."""
    ports = "/sys/class/virtio-ports"
    try:
        for entry in sorted(os.listdir(ports)):
            if _text(os.path.join(ports, entry, "name")).strip() == PORT_NAME:
                return "/dev/" + entry
    except OSError:  # no such bus
        pass
    return "/dev/virtio-ports/" + PORT_NAME


class Conversation:
    """What is said on one open port: frames in, bytes out.

    Output waiting for the host is one frame and a HELLO at most: an answer is built frame by frame as the
    host takes it, and a new REQUEST ends the answer before it. Half a frame is garbage to the host, so that
    one begun is finished unless the host has gone.
    """

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._reader = FrameReader()
        self._hello_due = False
        self._answer: Optional[Iterator[bytes]] = None
        self._output = memoryview(b"")
        self._moved_s = 0.0
        """When the host last took something, or asked for something."""
        self.answers = 0
        """Begun since they were last spoken of."""

    @property
    def speaking(self) -> bool:
        """Something waits for the host to take it, or is about to."""
        return bool(self._output) or self._hello_due or self._answer is not None

    def hear(self, data: bytes) -> None:
        """Take in what has arrived."""
        for kind, epoch, _ in self._reader.feed(data):
            if kind == GREET:
                self._hello_due = True
            elif kind == REQUEST:
                whisper(f"epoch {epoch} asked for")
                self._guest.make_room()
                self._answer = self._guest.answer(epoch)
                self._moved_s = time.monotonic()
                self.answers += 1
            else:
                self._answer = None

    def speak(self, port: Port) -> None:
        """Hand on what the host takes of one frame."""
        if not self._output:
            self._output = memoryview(self._next_frame())
        taken = port.write(self._output) if self._output else 0
        self._output = self._output[taken:]
        if taken:
            self._moved_s = time.monotonic()

    def give_up_if_stalled(self) -> None:
        """Drop an answer of which the host takes nothing."""
        if self._answer is not None and time.monotonic() - self._moved_s > STALLED_S:
            self._answer = None

    def forget(self) -> None:
        """The host has gone: what was on its way to it is lost, and so is what it wanted."""
        self._reader = FrameReader()
        self._hello_due = False
        self._answer = None
        self._output = memoryview(b"")

    def _next_frame(self) -> bytes:
        if self._hello_due:
            self._hello_due = False
            self._guest.look()
            return hello(self._guest.verdict.contract, self._guest.pages)
        frame = next(self._answer, None) if self._answer is not None else None
        if frame is None:
            self._answer = None
        return frame or b""


class Agent:
    """Keeps a port open and answers on it, for ever."""

    def __init__(self, place: PortPlace, guest: Guest) -> None:
        self._place = place
        self._guest = guest
        self._opening = Pause(LONGEST_PAUSE_WITHOUT_PORT_S)
        self._mentioned: Set[str] = set()
        """Since the host was last heard: however often it is tried, a line is written once."""

    def run(self) -> None:
        """Ends by an exception only: SystemExit on a signal."""
        while True:
            try:
                self._serve_once()
            except OSError as error:
                self._mention(f"{self._place}: {_reason(error)}")
            self._opening.sleep()

    def _serve_once(self) -> None:
        """OSError if there is no port, or once it is of no more use."""
        port = self._place.open()
        self._mention(f"listening on {port.name}")
        try:
            self._serve(port)
        finally:
            port.close()

    def _serve(self, port: Port) -> None:
        talk = Conversation(self._guest)
        absence = Pause(LONGEST_PAUSE_S)
        poller = select.poll()
        poller.register(port.fd, select.POLLIN)
        while True:
            poller.modify(port.fd, select.POLLIN | (select.POLLOUT if talk.speaking else 0))
            ready = sum(event for _, event in poller.poll(_wait_ms(talk)))
            if ready & ~select.POLLOUT:
                data = port.read()
                if data is None:
                    # The kernel may hand out what a host says before it has heard that there is one again.
                    if absence.is_long:
                        talk.forget()
                    absence.sleep()
                    continue
                absence.reset()
                self._opening.reset()
                self._mentioned.clear()
                talk.hear(data)
            if ready & select.POLLOUT:
                talk.speak(port)
            elif talk.speaking:
                talk.give_up_if_stalled()
            elif not ready:
                say(f"requests answered: {talk.answers}")
                talk.answers = 0

    def _mention(self, text: str) -> None:
        if text not in self._mentioned:
            self._mentioned.add(text)
            say(text)


def _wait_ms(talk: Conversation) -> Optional[int]:
    """How long at most until there is something to do of which no event tells."""
    if talk.speaking:
        return int(1000 * STALLED_S)
    return int(1000 * QUIET_S) if talk.answers else None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# -- the program ------------------------------------------------------------------------------------------

_verbose = False


def say(text: str) -> None:
    """A line for the operator."""
    with suppress(OSError):  # nobody reads it any more
        sys.stderr.write(f"migd-agent: {text}\n")
        sys.stderr.flush()


def whisper(text: str) -> None:
    """A line for whoever looks for a mistake."""
    if _verbose:
        say(text)


def info(place: PortPlace, guest: Guest) -> str:
    """What the agent would declare here, and why: lines for the operator."""
    begun_s = time.monotonic()
    free = guest.free_pages()
    took_ms = 1000 * (time.monotonic() - begun_s)
    ram = ", ".join(f"{run.first * PAGE_BYTES:#x}-{run.stop * PAGE_BYTES - 1:#x}" for run in guest.ram)
    rows = (
        ("agent", f"{AGENT_VERSION}, protocol version {PROTOCOL_VERSION}"),
        ("runs on", "Linux {}, Python {}.{}.{}".format(os.uname().release, *sys.version_info[:3])),
        ("port", place.find() or f"{place}: there is none"),
        ("contract", f"{CONTRACT_NAMES[guest.verdict.contract]}: {guest.verdict.why}"),
        ("RAM", ram or "unknown"),
        ("pages", f"{guest.pages} of {PAGE_BYTES} bytes (holes counted)"),
        ("free", f"{free} pages, {free * PAGE_BYTES >> 20} MiB, looked at in {took_ms:.0f} ms"),
    )
    return "".join(f"{name:<10}{value}\n" for name, value in rows)


class Options(argparse.Namespace):
    """The command line."""

    port: Optional[str] = None
    socket: Optional[str] = None
    drop_caches = False
    info = False
    verbose = False


def parse(arguments: Optional[List[str]] = None) -> Options:
    """SystemExit on --help, --version and mistakes."""
    parser = argparse.ArgumentParser(
        prog="migd-agent",
        description="Tells migd's daemon on the host which memory pages of this Linux guest are free, so\n"
        "that a migration does not send them. It runs as root, needs /proc/kpageflags, and waits until\n"
        "it is asked.",
        epilog="The host has to give the guest a port of that name, for QEMU:\n"
        "  -device virtio-serial-pci -chardev socket,id=hint,path=PATH,server=on,wait=off\n"
        "  -device virtserialport,chardev=hint,name=" + PORT_NAME + "\n\n"
        "exit status: 0 ended by a signal, or told what was asked; 1 failed; 2 wrong options.\n"
        "See what it would tell, without telling it:  python3 agent.py --info",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--port", metavar="PATH", help="this device, not the port named " + PORT_NAME)
    where.add_argument(
        "--socket", metavar="PATH", help="a unix socket instead of a port: to try the agent out"
    )
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="drop the page cache before a migration's first answer: less is sent, and files are read again "
        "from disk afterwards",
    )
    parser.add_argument("--info", action="store_true", help="print what would be declared, and why, and end")
    parser.add_argument("--verbose", action="store_true", help="log each request as it comes")
    parser.add_argument("--version", action="version", version="migd-agent " + AGENT_VERSION)
    return parser.parse_args(arguments, namespace=Options())


def _end(signum: int, frame: object) -> None:
    raise SystemExit(0)


def _hurry() -> None:
    """An answer must not wait for the guest's own work: it is worth less with every millisecond."""
    with suppress(OSError):  # not root, or in a container: it works all the same
        os.setpriority(os.PRIO_PROCESS, 0, -20)


def main() -> None:
    """The program."""
    global _verbose
    options = parse()
    place = PortPlace(options.port, options.socket)
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    guest = Guest(drop_caches=options.drop_caches)
    if options.info:
        sys.stdout.write(info(place, guest))
        return
    _verbose = options.verbose
    say(f"contract {CONTRACT_NAMES[guest.verdict.contract]}: {guest.verdict.why}")
    _hurry()
    gc.collect()
    gc.disable()  # nothing here is cyclic, and a collection writes to every object
    Agent(place, guest).run()


if __name__ == "__main__":
    main()
