"""The agent as a process on this machine, over a unix socket or a terminal in the place of the port.

A terminal whose other end has gone is to its reader what a virtio-serial port is whose host is not there:
read() returns nothing at once, and poll() cannot wait for anything better.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migd.guest import agent, hints
from migd.guest.hint_receiver import SocketHints
from migd.guest.hints import Bitmap, Done, End, Greet, Hello, HintDecoder, HintFrame, Ranges, Request
from migd.limits import Limits
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract

AGENT = Path(agent.__file__)
WAIT_S = 20.0
ONE_GIB = "agent.system_ram = lambda iomem: [agent.Run(0x100, 0x40100)]"
"""A line that makes an answer quick where the machine is large."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

needs_flags = pytest.mark.skipif(
    not os.access("/proc/kpageflags", os.R_OK), reason="only root reads the flags of pages"
)


@dataclass
class Program:
    """A running agent."""

    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def logs(self, pattern: str) -> re.Match[str]:
        """Wait until its log has such a line."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log
            if found := re.search(pattern, self.log, re.MULTILINE):
                return found
            time.sleep(0.02)
        pytest.fail(f"no {pattern!r} in:\n{self.log}")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S

    def resident_bytes(self) -> int:
        """Of its own; what it maps of files may come and go."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) << 10

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@dataclass
class Host:
    """The daemon's end: listens where the agent looks, and talks."""

    path: Path
    listener: socket.socket | None = None
    sock: socket.socket | None = None
    decoder: HintDecoder = field(default_factory=HintDecoder)
    heard: list[HintFrame] = field(default_factory=list)

    def listen(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(WAIT_S)
        self.listener.bind(str(self.path))
        self.listener.listen()

    def accept(self) -> None:
        assert self.listener is not None
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(WAIT_S)
        self.decoder, self.heard = HintDecoder(), []

    def hang_up(self) -> None:
        assert self.sock is not None
        self.sock.close()

    def close(self) -> None:
        for one in (self.sock, self.listener):
            if one is not None:
                one.close()
        self.path.unlink(missing_ok=True)

    def say(self, *said: HintFrame | bytes) -> None:
        assert self.sock is not None
        self.sock.sendall(b"".join(one if isinstance(one, bytes) else hints.encode(one) for one in said))

    def hear(self) -> HintFrame:
        assert self.sock is not None
        while not self.heard:
            data = self.sock.recv(1 << 16)
            assert data, "the agent hung up"
            self.heard = self.decoder.feed(data)
        return self.heard.pop(0)

    def hear_until(self, last: type[HintFrame]) -> list[HintFrame]:
        frames = [self.hear()]
        while not isinstance(frames[-1], last):
            frames.append(self.hear())
        return frames

    def waits_in_vain(self, seconds: float) -> bool:
        assert self.sock is not None
        return not self.heard and not select.select([self.sock], [], [], seconds)[0]


Start = Callable[..., Program]


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="migd-a-") as base:
        yield Path(base)


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Start an agent with these arguments; ``lines`` are run in it before its main function."""
    programs: list[Program] = []

    def started(*arguments: object, lines: str = "", python: str = sys.executable) -> Program:
        code = f"import sys; sys.path.insert(0, {str(AGENT.parent)!r}); import agent\n{lines}\nagent.main()"
        program = ["-c", code] if lines else [str(AGENT)]
        log_path = place / f"log-{len(programs)}"
        with log_path.open("wb") as log:
            process = subprocess.Popen([python, "-I", "-S", *program, *map(str, arguments)], stderr=log)
        programs.append(Program(process, log_path))
        return programs[-1]

    yield started
    for program in programs:
        program.process.kill()
        program.process.wait()
        assert "Traceback" not in program.log


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with closing(Host(place / "hints")) as host:
        yield host


@pytest.fixture
def talking(host: Host, start: Start) -> Host:
    """A host that an agent with all the RAM of this machine has connected to."""
    host.listen()
    start("--socket", host.path, "--verbose")
    host.accept()
    return host


@pytest.fixture
def quick(host: Host, start: Start) -> tuple[Host, Program]:
    """The same with 1 GiB of it."""
    host.listen()
    program = start("--socket", host.path, lines=ONE_GIB)
    host.accept()
    return host, program


def free_pages_of_the_kernel() -> int:
    """By its free lists. MemFree counts more where the kernel puts off setting memory up."""
    rows = [row.split()[4:] for row in Path("/proc/buddyinfo").read_text().splitlines()]
    return sum(int(count) << order for row in rows for order, count in enumerate(row))


def ram_here() -> list[agent.Run]:
    return agent.system_ram(Path("/proc/iomem").read_text())


def epochs(frames: list[HintFrame]) -> list[int]:
    return [frame.epoch for frame in frames if isinstance(frame, Bitmap | Ranges | End)]


# -- an answer --------------------------------------------------------------------------------------------


@needs_flags
async def test_the_daemon_s_own_receiver_takes_every_record(talking: Host) -> None:
    """Its count is that of the kernel's free lists, within what other processes do meanwhile."""
    talking.say(Greet())
    hello = talking.hear()
    assert isinstance(hello, Hello)
    assert (hello.strength, hello.page_bytes, hello.version) == (0, 4096, 1)
    ram = ram_here()
    assert hello.pages == ram[-1].stop

    assert talking.sock is not None
    found = PageBitmap(hello.pages)
    before = free_pages_of_the_kernel()
    with closing(SocketHints(talking.sock.dup(), hello.pages, Limits(hint_window_s=WAIT_S))) as channel:
        assert await channel.declare(WAIT_S) == FreeContract(hello.contract)

        def sink(epoch: int, free: PageBitmap) -> None:
            nonlocal found
            assert epoch == 7
            found |= free

        await channel.request(7, sink)
        async with asyncio.timeout(WAIT_S):
            while not channel.answered(7):  # noqa: ASYNC110  # it sets no event for the end of an answer
                await asyncio.sleep(0.01)
        assert (channel.rejected, channel.distrusted) == (0, False)
        await channel.done()
    after = free_pages_of_the_kernel()
    assert 0.8 * min(before, after) < found.count() < 1.2 * max(before, after)
    outside = found - PageBitmap.from_runs(hello.pages, [(run.first, run.stop) for run in ram])
    assert not outside


@needs_flags
def test_the_first_part_of_an_answer_comes_before_the_rest_is_looked_at(talking: Host) -> None:
    begun = time.monotonic()
    talking.say(Request(1))
    talking.hear()
    first_s = time.monotonic() - begun
    frames = talking.hear_until(End)
    if len(frames) > 20:  # where the machine has so much RAM
        assert first_s < (time.monotonic() - begun) / 2


@needs_flags
def test_two_requests_at_once_are_one_answer(talking: Host) -> None:
    talking.say(Request(1), Request(2))
    assert set(epochs(talking.hear_until(End))) == {2}


@needs_flags
def test_a_request_ends_the_answer_before_it(talking: Host) -> None:
    talking.say(Request(1))
    first = talking.hear()
    talking.say(Request(2))
    heard = epochs([first, *talking.hear_until(End)])
    assert heard == sorted(heard)
    assert heard[-1] == 2
    talking.say(Request(3))
    assert set(epochs(talking.hear_until(End))) == {3}


@needs_flags
def test_done_stops_an_answer_and_not_the_next(talking: Host) -> None:
    talking.say(Request(1))
    talking.hear()
    talking.say(Done(1), Greet())
    assert End not in map(type, talking.hear_until(Hello))
    assert talking.waits_in_vain(0.3)
    talking.say(Request(2))
    assert set(epochs(talking.hear_until(End))) == {2}


def test_garbage_and_halves_before_a_request(quick: tuple[Host, Program]) -> None:
    """As at a reconnect, or a migration: bytes are lost in both directions."""
    host, _ = quick
    greeting = hints.encode(Greet())
    host.say(b"garbage fpH1 fpH", greeting[:20], hints.encode(Request(3))[5:], b"\0" * 9000, Request(4))
    assert set(epochs(host.hear_until(End))) == {4}
    for byte in greeting:
        host.say(bytes([byte]))
    assert isinstance(host.hear(), Hello)
    host.say(Greet(version=2), hints.encode(End(1, 1)), Greet(), Greet())
    assert isinstance(host.hear(), Hello)


def test_greetings_again_and_again(quick: tuple[Host, Program]) -> None:
    host, _ = quick
    said = set()
    for _ in range(20):
        host.say(Greet())
        said.add(host.hear())
    assert len(said) == 1


# -- a host that comes and goes ---------------------------------------------------------------------------


def test_the_host_may_come_late_go_and_come_back(host: Host, start: Start) -> None:
    program = start("--socket", host.path, lines=ONE_GIB)
    program.logs("hints: there is none")
    host.listen()
    host.accept()
    host.say(Greet(), Request(1))
    assert isinstance(host.hear_until(End)[-1], End)
    host.say(Request(2))
    host.hang_up()
    host.accept()
    host.say(Greet())
    assert isinstance(host.hear(), Hello)  # and nothing of epoch 2
    host.close()
    program.logs("the host closed the socket")
    host.listen()
    host.accept()
    host.say(Request(3))
    assert set(epochs(host.hear_until(End))) == {3}


def test_a_host_that_does_not_read_costs_an_answer_and_no_more(host: Host, start: Start) -> None:
    host.listen()
    program = start("--socket", host.path, lines=ONE_GIB + "; agent.STALLED_S = 0.5")
    host.accept()
    fill(host)
    host.say(Request(1))
    before = program.cpu_s()
    time.sleep(1.5)
    assert program.cpu_s() - before < 0.1
    host.say(Request(2))  # it is as fresh as any, however long the host has not read
    time.sleep(0.2)
    assert set(epochs(host.hear_until(End))) == {2}


def fill(host: Host) -> None:
    """Greet until the socket has taken no more HELLOs for a while."""
    unread, since = 0, time.monotonic()
    while time.monotonic() - since < 0.5:
        host.say(Greet())
        time.sleep(0.001)
        if (now_unread := unread_bytes(host)) != unread:
            unread, since = now_unread, time.monotonic()


def unread_bytes(host: Host) -> int:
    """As many as the agent has sent and the host has not read."""
    assert host.sock is not None
    try:
        return len(host.sock.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


def test_a_host_that_hangs_up_at_once_is_no_flood_of_log_lines(host: Host, start: Start) -> None:
    host.listen()
    program = start("--socket", host.path, lines=ONE_GIB)
    for _ in range(5):
        host.accept()
        host.hang_up()
    assert program.log.count("\n") <= 4
    host.accept()
    host.say(Greet())
    assert isinstance(host.hear(), Hello)


# -- the port as a device ---------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[tuple[int, Path]]:
    """The host's end of a line that changes no byte, and the guest's device."""
    ours, theirs = os.openpty()
    tty.setraw(theirs, termios.TCSANOW)
    with ExitStack() as ends:
        ends.callback(os.close, theirs)
        ends.callback(os.close, ours)
        yield ours, Path(os.ttyname(theirs))


def hear_device(ours: int, last: type[HintFrame]) -> list[HintFrame]:
    decoder, frames = HintDecoder(), []
    while not frames or not isinstance(frames[-1], last):
        assert select.select([ours], [], [], WAIT_S)[0]
        frames += decoder.feed(os.read(ours, 1 << 16))
    return frames


def test_a_device_that_appears_while_the_agent_waits(
    place: Path, start: Start, terminal: tuple[int, Path]
) -> None:
    ours, device = terminal
    port = place / "port"
    program = start("--port", port, lines=ONE_GIB)
    program.logs("port: there is none")
    port.symlink_to(device)
    program.logs("listening on")
    os.write(ours, hints.encode(Greet()) + hints.encode(Request(1)))
    assert isinstance(hear_device(ours, End)[0], Hello)


def test_an_absent_host_costs_almost_nothing(place: Path, start: Start) -> None:
    """Of a device that is there, and of a socket that is not."""
    ours, theirs = os.openpty()
    tty.setraw(theirs, termios.TCSANOW)
    device = start("--port", os.ttyname(theirs), lines=ONE_GIB)
    waiting = start("--socket", place / "nobody", lines=ONE_GIB)
    waiting.logs("there is none")
    device.logs("listening on")
    os.write(ours, hints.encode(Greet()))
    hear_device(ours, Hello)
    os.close(ours)
    before = [program.cpu_s() for program in (device, waiting)]
    time.sleep(2.0)
    used = [program.cpu_s() - was for program, was in zip((device, waiting), before, strict=True)]
    os.close(theirs)
    assert max(used) <= 0.05
    assert device.log.count("\n") <= 3
    assert (device.end(), waiting.end()) == (0, 0)


# -- steady state -----------------------------------------------------------------------------------------


@needs_flags
def test_its_memory_does_not_grow(quick: tuple[Host, Program]) -> None:
    host, program = quick

    def ask(first: int, count: int) -> None:
        for epoch in range(first, first + count):
            host.say(Greet(), Request(epoch), *([Done(epoch)] if epoch % 5 == 0 else []))
            host.hear_until(Hello if epoch % 5 == 0 else End)

    ask(1, 10)
    before = program.resident_bytes()
    ask(11, 50)
    assert program.resident_bytes() - before <= 64 << 10


@needs_flags
def test_a_log_has_one_line_for_a_connection_and_one_for_its_answers(host: Host, start: Start) -> None:
    host.listen()
    program = start("--socket", host.path, lines=ONE_GIB + "; agent.QUIET_S = 0.2")
    host.accept()
    for epoch in (1, 2, 3):
        host.say(Request(epoch))
        host.hear_until(End)
    program.logs("requests answered: 3")
    time.sleep(0.5)
    assert len(program.log.splitlines()) == 3  # the contract, the connection, the answers


@needs_flags
def test_the_page_cache_is_dropped_once_in_a_migration(host: Host, start: Start, place: Path) -> None:
    """Into a file here: the tests' own machine keeps its cache."""
    switch = place / "drop_caches"
    switch.write_text("")
    host.listen()
    lines = f"{ONE_GIB}; agent.DROP_CACHES = {str(switch)!r}; agent.SAME_MIGRATION_S = 1.0"
    program = start("--socket", host.path, "--drop-caches", lines=lines)
    host.accept()
    for epoch in (1, 2, 3):
        host.say(Request(epoch))
        host.hear_until(End)
        assert switch.read_text() == "1"
    saving = program.logs(r"MemFree (\d+) -> (\d+) kB \(([+-]\d+) kB\)")
    assert int(saving[2]) - int(saving[1]) == int(saving[3])
    time.sleep(1.1)
    host.say(Request(4))
    host.hear_until(End)
    assert program.log.count("page cache dropped") == 2


@needs_flags
def test_the_page_cache_stays_unless_asked_for(host: Host, start: Start, place: Path) -> None:
    host.listen()
    lines = f"{ONE_GIB}; agent.DROP_CACHES = {str(place / 'none')!r}"
    start("--socket", host.path, lines=lines)
    host.accept()
    host.say(Request(1))
    host.hear_until(End)
    assert not (place / "none").exists()


# -- the command line -------------------------------------------------------------------------------------


def agent_says(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-S", AGENT, *arguments], capture_output=True, text=True, timeout=WAIT_S
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [True, False])
def test_a_signal_ends_it_cleanly(host: Host, start: Start, number: int, connected: bool) -> None:
    if connected:
        host.listen()
    program = start("--socket", host.path)
    program.logs("listening on" if connected else "there is none")
    assert program.end(number) == 0


def test_info_tells_what_would_be_declared() -> None:
    done = agent_says("--info")
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(rows) == ["agent", "runs", "port", "contract", "RAM", "pages", "free"]
    assert rows["contract"].partition(":")[0] in agent.CONTRACT_NAMES
    ram = ram_here()
    assert int(rows["pages"].split()[0]) == (ram[-1].stop if ram else 0)


def test_without_rights_it_declares_nothing() -> None:
    """Run as nobody: the addresses of /proc/iomem are zeros then."""
    if os.getuid():
        pytest.skip("only root can be somebody else")
    code = f"""import os, sys; sys.path.insert(0, {str(AGENT.parent)!r}); import agent
place, _ = agent.PortPlace(None, None), agent.Guest()  # what is imported late may not be found any more
os.setgid(65534); os.setuid(65534)
sys.stdout.write(agent.info(place, agent.Guest()))"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^contract +NONE: .*root$", done.stdout, re.MULTILINE)
    assert re.search(r"^pages +0 of", done.stdout, re.MULTILINE)


@needs_flags
def test_flags_that_open_and_cannot_be_read_are_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = agent.PageFlags
    monkeypatch.setattr(agent, "PageFlags", lambda: flags("/proc/self/mem"))  # page 0 is mapped nowhere
    guest = agent.Guest()
    assert guest.verdict == agent.Verdict(agent.NONE, "/proc/kpageflags: Input/output error")
    monkeypatch.undo()
    guest.look()
    assert guest.verdict == agent.judge_this_kernel()
    assert guest.flags is not None
    guest.flags.close()


def test_help_teaches_and_mistakes_are_told() -> None:
    text = agent_says("--help").stdout
    assert all(
        word in text for word in ("--info", "org.migd.hints.0", "exit status", "root", "virtserialport")
    )
    assert agent_says("--version").stdout == f"migd-agent {agent.AGENT_VERSION}\n"
    for wrong in (["--unknown"], ["--port", "a", "--socket", "b"], ["--inf"], ["operand"]):
        done = agent_says(*wrong)
        assert (done.returncode, "usage:" in done.stderr) == (2, True), wrong
