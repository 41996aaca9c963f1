"""Real QEMUs for tests: small, without an operating system, under TCG, and surely ended.

What runs in them is SeaBIOS. It finds nothing to boot and idles, and its clock counts on, 18 times a second,
in the guest's memory: a guest that stands still, or whose memory stays behind, shows.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from migd.errors import GuestError
from migd.lab.debian import LabUnavailable
from migd.lab.emulators import Emulator, emulators
from migd.qemu.monitor import Monitor

MIB = 1 << 20
WAIT_S = 30.0
"""No assertion is about time: this only ends a test that hangs."""

RAM_BYTES = 64 * MIB
TICKS_AT = 0x46C
"""The BIOS data area: ticks since midnight, a little-endian u32."""

_TICKS = struct.Struct("<I")

FIRST_WORDS = ("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg,thread=single")
SHARED_FILE = (
    *("-object", "memory-backend-file,id=ram,size={size},mem-path={ram},share=on"),
    *("-machine", "{machine},memory-backend=ram"),
)
"""RAM as migd wants it, in a file of its own."""

HINT_PORT = (
    *("-device", "virtio-serial-pci,id=vs"),
    *("-chardev", "socket,id=hints,path={hints},server=on,wait=off"),
    *("-device", "virtserialport,bus=vs.0,nr=1,chardev=hints,name=org.migd.hints.0"),
)


@functools.cache
def available() -> tuple[Emulator, ...]:
    """Every QEMU that is to be had here, oldest first; none is no error."""
    try:
        return tuple(emulators())
    except LabUnavailable:
        return ()


@dataclass(frozen=True)
class Qemu:
    """One QEMU process, with all its paths in one directory."""

    emulator: Emulator
    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def qmp(self) -> Path:
        return self.directory / "qmp"

    @property
    def ram(self) -> Path:
        return self.directory / "ram"

    @property
    def hints(self) -> Path:
        return self.directory / "hints"

    @property
    def errors(self) -> str:
        return (self.directory / "errors").read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """A connection of our own; QEMU takes one at a time."""
        monitor = await self.connected()
        try:
            yield monitor
        finally:
            await monitor.close()

    async def connected(self) -> Monitor:
        """The caller's to close. AssertionError, with its words, if QEMU ends instead."""
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    return await Monitor.connect(self.qmp, WAIT_S)
                except GuestError:  # it does not listen yet
                    assert self.alive, self.errors
                    await asyncio.sleep(0.005)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


class Hatchery:
    """Starts QEMUs in a directory of its own, and ends them all."""

    def __init__(self, emulator: Emulator, directory: Path) -> None:
        self.emulator = emulator
        self.directory = directory
        self._started: list[Qemu] = []

    def start(
        self,
        *words: str,
        ram: Sequence[str] = SHARED_FILE,
        memory: str = "64M",
        machine: str = "pc",
        environment: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Qemu:
        """Returns when its monitor and its RAM are there. AssertionError, with its words, if it ends instead.

        In the words {dir}, {ram}, {hints}, {size} and {machine} are replaced.
        """
        directory = self.directory / f"{len(self._started)}"
        directory.mkdir()
        values = {
            "{dir}": str(directory),
            "{ram}": str(directory / "ram"),
            "{hints}": str(directory / "hints"),
            "{size}": memory,
            "{machine}": machine,
        }
        command = [
            *self.emulator.command,
            *FIRST_WORDS,
            *("-m", memory),
            *(replaced(word, values) for word in (*ram, *words)),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        ]
        variables = {**self.emulator.environment, **(environment or {})}
        with (directory / "errors").open("wb") as errors:
            process = subprocess.Popen(
                # It ends with us, even if we are killed; setpriv and env become it.
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "env",
                    *(f"{k}={v}" for k, v in variables.items()),
                    *command,
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=directory,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        qemu = Qemu(self.emulator, directory, process)
        self._started.append(qemu)
        awaited = [qemu.qmp, *([qemu.ram] if "{ram}" in " ".join(ram) else [])]
        deadline = time.monotonic() + WAIT_S
        while not all(path.exists() for path in awaited):
            assert qemu.alive, qemu.errors
            assert time.monotonic() < deadline, "QEMU makes no monitor"
            time.sleep(0.005)
        return qemu

    def close(self) -> None:
        for qemu in self._started:
            qemu.kill()


@contextmanager
def hatchery(emulator: Emulator, directory: Path) -> Iterator[Hatchery]:
    made = Hatchery(emulator, directory)
    try:
        yield made
    finally:
        made.close()


def replaced(word: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        word = word.replace(placeholder, value)
    return word


def ticks(ram: Path | int) -> int:
    """How far the BIOS in that RAM has counted; 0 until it has begun."""
    fd = os.open(ram, os.O_RDONLY) if isinstance(ram, Path) else ram
    try:
        return int(_TICKS.unpack(os.pread(fd, _TICKS.size, TICKS_AT))[0])
    finally:
        if isinstance(ram, Path):
            os.close(fd)


def await_ticks(ram: Path | int, beyond: int = 0) -> int:
    """The count, once it is beyond that."""
    deadline = time.monotonic() + WAIT_S
    while (found := ticks(ram)) <= beyond:
        assert time.monotonic() < deadline, f"the guest's clock stands at {found}"
        time.sleep(0.005)
    return found


# -- whatever is started --------------------------------------------------------------------------------

_MARK = "MIGD_TEST_QEMU"


@contextmanager
def everything_ended() -> Iterator[dict[str, str]]:
    """An environment: all that is started with it in the block, and all that this starts, ends behind it."""
    token = secrets.token_hex(8)
    try:
        yield {**os.environ, _MARK: token}
    finally:
        mark = f"{_MARK}={token}".encode()
        while left := [pid for pid in processes() if mark in environment_of(pid)]:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)


def processes() -> list[int]:
    """All that have not ended."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and is_alive(int(entry))]


def is_alive(pid: int) -> bool:
    """Not if it only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def children_of(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def ram_of(pid: int) -> int:
    """A descriptor, the caller's, of the memfd that is the RAM of this QEMU."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "memfd:" in os.readlink(link) and link.stat().st_size == RAM_BYTES:
                return os.open(link, os.O_RDWR)
    raise AssertionError(f"process {pid} has no RAM")
