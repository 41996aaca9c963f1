"""DaemonPair: a source and a destination daemon as real processes, with guests, and nothing left behind.

Everything that waits is bounded by ``WAIT_S``; whatever takes longer fails with what it waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from xxhash import xxh3_128_digest

from migd.control import commands
from migd.control.client import ControlClient
from migd.control.commands import GuestStatus, MigrationStatus, StatusReport
from migd.errors import MigdError
from migd.migration.stats import Result

WAIT_S = 30.0
"""No assertion is about time: this only ends a test that hangs."""

ROOT = Path(__file__).resolve().parents[2]
_LOOK_S = 0.02

T = TypeVar("T")


def eventually(
    look: Callable[[], T | None], what: str, timeout_s: float = WAIT_S, why: Callable[[], str] = str
) -> T:
    """The first true answer of ``look``; ``why`` explains that there was none."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}\n{why()}"
        time.sleep(_LOOK_S)
    return found


@dataclass(frozen=True)
class Output:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Result:
        """What `migd migrate --json` printed."""
        assert self.stdout, self
        return msgspec.json.decode(self.stdout, type=Result)

    @property
    def complaint(self) -> str:
        """The one line that a failed command says."""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        return lines[0]


def start_migd(*arguments: object) -> subprocess.Popen[str]:
    """The command line in the background."""
    command = [sys.executable, "-m", "migd", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> Output:
    """Its end and its words."""
    try:
        out, err = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{process.args} did not end: {out} {err}") from None
    return Output(process.returncode, out, err)


def migd(*arguments: object) -> Output:
    """Run the command line to its end."""
    return finish(start_migd(*arguments))


class DaemonProcess:
    """One daemon in a directory of its own, restarted in the same one; ``config`` is TOML."""

    def __init__(self, role: str, config: str, *, held: bool = False) -> None:
        self.role = role
        self.directory = Path(tempfile.mkdtemp(prefix=f"migd-{role[:3]}-"))
        self._held = held
        self._config = self.directory / "config.toml"
        self._config.write_text(config)
        self._log = self.directory / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        """Returns once the process is on its way; ``ready`` waits for it."""
        for old in self.directory.glob("hold-*"):
            old.unlink()
        for old in self.directory.glob("held-*"):
            old.unlink()
        if self._held:
            entry = ["-m", "tests.support.held_daemon", self.role, str(self._config), str(self.directory)]
        else:
            options = ["--config", str(self._config), "--runtime-dir", str(self.directory)]
            entry = ["-m", "migd", self.role, *options]
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *entry], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT
            )

    def ready(self) -> None:
        """Every socket listens. A port chosen by the kernel is kept from now on."""
        line = eventually(self._ready_line, f"the {self.role} daemon", why=lambda: self.log)
        if match := re.search(r"listening on (\S+)", line):
            self.address = match[1]
            self._config.write_text(
                re.sub(r'listen = ".*"', f'listen = "{self.address}"', self._config.read_text())
            )

    def _ready_line(self) -> str:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with self._log.open() as log:
            log.seek(self._log_from)
            return next((line for line in log if "ready in" in line), "")

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def client(self) -> ControlClient:
        return ControlClient(self.directory)

    def status(self) -> StatusReport:
        """What `migd status` would say; MigdError if no daemon answers."""
        reply = self.client.ask_once(commands.Status())
        assert isinstance(reply, StatusReport), reply
        return reply

    def wait(self, target: str) -> int:
        """The exit code of a migration's result, once it is over; as `migd wait`."""
        reply = self.client.ask_once(commands.Attach(target=target))
        match reply:
            case commands.Finished(result=record) | commands.Arrived(record=record):
                return record.exit_code
            case _:
                raise AssertionError(reply)

    def guest(self, name: str) -> GuestStatus | None:
        """A guest as this daemon knows it; None as well while no daemon answers."""
        with contextlib.suppress(MigdError):
            return next((guest for guest in self.status().guests if guest.name == name), None)
        return None

    def migrations(self, guest: str) -> list[MigrationStatus]:
        return [found for found in self.status().migrations if found.guest == guest]

    # -- holds --------------------------------------------------------------------------------------

    def hold(self, state: str, tag: str = "") -> None:
        """The next session that enters this state stops there, until ``release`` of the tag (or state)."""
        assert self._held
        new = self.directory / f"new-hold-{state}"
        new.write_text(tag or state)
        new.rename(self.directory / f"hold-{state}")

    def is_held(self, tag: str) -> bool:
        return (self.directory / f"held-{tag}").exists()

    def wait_held(self, tag: str) -> None:
        eventually(lambda: self.is_held(tag), f"a session held as {tag}", why=lambda: self.log)

    def release(self, tag: str) -> None:
        (self.directory / f"held-{tag}").unlink()

    def release_all(self) -> None:
        for path in [*self.directory.glob("hold-*"), *self.directory.glob("held-*")]:
            path.unlink()

    # -- ends ---------------------------------------------------------------------------------------

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def restart(self) -> None:
        """Again in the same directory, after ``kill`` or ``stop``."""
        self.start()
        self.ready()

    def reconfigure(self, config: str) -> None:
        """Another configuration, from the next start on."""
        self._config.write_text(config)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the {self.role} daemon did not end:\n{self.log}") from None

    def close(self) -> None:
        """Whatever is left of it: the process, and guests spawned in its directory."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for pid in processes_naming(str(self.directory)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory)


def processes_naming(*texts: str) -> list[int]:
    """Pids of processes with all these texts in their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if all(text.encode() in words for text in texts):
                    found.append(int(entry.name))
    return found


def _incoming(daemon: DaemonProcess) -> dict[str, list[int]]:
    """Pids of the processes that a daemon spawned, by the guest whose log they write: a spare none."""
    found: dict[str, list[int]] = {}
    for pid in processes_naming("migd.guest.incoming", f"{daemon.directory}/guest.sock"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            log = Path(f"/proc/{pid}/fd/1").readlink()
            if log.parent == daemon.directory:
                found.setdefault(log.stem.removeprefix("guest-"), []).append(pid)
    return found


def ram_digest(pid: int) -> bytes:
    """Of all RAM that a guest process has written; b"" once it is gone or while it has none.

    Read by pread from outside, through the process's own descriptor: two digests that differ prove that the
    guest runs, whatever anybody says of it.
    """
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(entry).startswith("/memfd:migd-ram"):
                continue
            fd = os.open(entry, os.O_RDONLY)
            try:
                return xxh3_128_digest(_content(fd))
            finally:
                os.close(fd)
    return b""


def _content(fd: int) -> bytes:
    parts, end = [], 0
    with contextlib.suppress(OSError):  # ENXIO: no data behind here
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            parts.append(os.pread(fd, end - start, start))
    return b"".join(parts)


def spoil(pid: int) -> None:
    """Change every page of a guest's RAM that has content, through its descriptor."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:migd-ram"):
            fd = os.open(entry, os.O_RDWR)
            try:
                end = 0
                while True:
                    start = os.lseek(fd, end, os.SEEK_DATA)
                    end = os.lseek(fd, start, os.SEEK_HOLE)
                    for offset in range(start, end, 4096):
                        os.pwrite(fd, b"spoilt", offset)
            except OSError:  # ENXIO: no data behind here
                return
            finally:
                os.close(fd)


class GuestProcess:
    """A stub guest that this test started at the source."""

    def __init__(self, name: str, pid: int, log_path: Path, process: subprocess.Popen[bytes] | None) -> None:
        """``process`` is None for one that is not our child (``tests.support.nursery``)."""
        self.name = name
        self.pid = pid
        self._log_path = log_path
        self._process = process

    @property
    def log(self) -> str:
        return self._log_path.read_text() if self._log_path.exists() else ""

    @property
    def alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] != "Z"

    def ready(self) -> GuestProcess:
        """It has filled its RAM."""
        eventually(self._is_ready, f"guest {self.name}", why=lambda: self.log)
        return self

    def _is_ready(self) -> bool:
        assert self.alive, self.log
        return " ready: " in self.log

    def wait(self) -> int:
        """Its exit code: 0 after it was released."""
        assert self._process is not None
        return self._process.wait(WAIT_S)

    def kill(self) -> None:
        """kill -9, and its end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        eventually(lambda: not self.alive, f"the end of guest {self.name}")


class Nursery:
    """Starts stub guests fast; close it when the last one has been started."""

    def __init__(self, socket_path: Path, log_dir: Path) -> None:
        self._socket_path = socket_path
        self._log_dir = log_dir
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, name: str, *, ram_bytes: tuple[int, ...], **options: object) -> GuestProcess:
        """A guest on its way; options are those of ``GuestOptions``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log_path = self._log_dir / f"{name}.log"
        asked = {"daemon": str(self._socket_path), "name": name, "ram_bytes": ram_bytes, **options}
        self._process.stdin.write(json.dumps({**asked, "log": str(log_path)}) + "\n")
        self._process.stdin.flush()
        return GuestProcess(name, int(self._process.stdout.readline()), log_path, None)

    def close(self) -> None:
        self._process.communicate(timeout=WAIT_S)


class DaemonPair:
    """Both daemons, ready. ``source`` and ``destination`` add TOML tables to their configurations.

    With ``serve`` both have both roles, and ``back`` brings a guest home.
    """

    def __init__(
        self, *, source: str = "", destination: str = "", held: bool = False, serve: bool = False
    ) -> None:
        listen = '[destination]\nlisten = "127.0.0.1:0"\n'
        self.source = DaemonProcess(
            "serve" if serve else "source", listen + source if serve else source, held=held
        )
        self.destination = DaemonProcess("serve" if serve else "destination", listen + destination, held=held)
        self.guests: dict[str, GuestProcess] = {}
        self._commands: list[subprocess.Popen[str]] = []
        self._numbers = iter(range(1, 10_000))
        try:
            for daemon in (self.source, self.destination):
                daemon.start()
            for daemon in (self.source, self.destination):
                daemon.ready()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self.destination.address

    # -- guests -------------------------------------------------------------------------------------

    def start_guest(self, name: str = "", *, ram: str = "32Mi", **options: object) -> GuestProcess:
        """A guest at the source, on its way; options are those of `migd guest`. No ``ram`` for an image."""
        name = name or f"vm{next(self._numbers)}"
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        log_path = self.source.directory / f"{name}.log"
        socket_path = self.source.directory / "guest.sock"
        command = [
            sys.executable, "-m", "migd", "guest", "--name", name, "--socket", str(socket_path),
            *(("--ram", ram) if ram else ()), *words,
        ]  # fmt: skip
        with log_path.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT
            )
        guest = GuestProcess(name, process.pid, log_path, process)
        self.guests[name] = guest
        return guest

    def guest(self, name: str = "", **options: object) -> GuestProcess:
        """A guest that is ready."""
        return self.start_guest(name, **options).ready()  # type: ignore[arg-type]

    def arrived_log(self, name: str) -> str:
        """What the guest process spawned at the destination said."""
        path = self.destination.directory / f"guest-{name}.log"
        return path.read_text() if path.exists() else ""

    def copies(self, name: str) -> list[int]:
        """Pids of all processes that are this guest, whether it runs in them or not."""
        return self.copies_of([name])[name]

    def copies_of(self, names: list[str]) -> dict[str, list[int]]:
        """The same for many guests, in one look at all processes of the host."""
        here, there = _incoming(self.source), _incoming(self.destination)
        found = {}
        for name in names:
            mine = self.guests.get(name)
            started = [mine.pid] if mine is not None and mine.alive else []
            found[name] = started + here.get(name, []) + there.get(name, [])
        return found

    @staticmethod
    def arrived(daemon: DaemonProcess, name: str) -> list[int]:
        """Pids of the processes that this daemon spawned for this guest, and that still live."""
        return _incoming(daemon).get(name, [])

    def checked(self, name: str) -> tuple[int, int]:
        """Pages checked and pages wrong, by the arrived guest's own words."""
        match = eventually(
            lambda: re.search(r"checked: (\d+) pages, (\d+) wrong", self.arrived_log(name)),
            f"the self-check of {name}",
            why=lambda: self.arrived_log(name),
        )
        return int(match[1]), int(match[2])

    def discard(self, name: str) -> None:
        """End a guest wherever it is: the next test needs its memory."""
        for daemon in (self.source, self.destination):
            found = daemon.guest(name)
            if found is not None and found.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found.pid, signal.SIGKILL)
        mine = self.guests.pop(name, None)
        if mine is not None:
            mine.kill()

    # -- commands -----------------------------------------------------------------------------------

    def start_migration(self, name: str, *options: object) -> subprocess.Popen[str]:
        to = () if "--to" in options else ("--to", self.address)
        process = start_migd("migrate", name, "--json", "--runtime-dir", self.source.directory, *to, *options)
        self._commands.append(process)
        return process

    def migrate(self, name: str, *options: object) -> Output:
        """`migd migrate --json` to its end."""
        return finish(self.start_migration(name, *options))

    def start_back(self, name: str, *options: object) -> subprocess.Popen[str]:
        """`migd migrate --json` from the destination to the source."""
        process = start_migd(
            "migrate", name, "--json", "--runtime-dir", self.destination.directory,
            *("--to", self.source.address), *options,
        )  # fmt: skip
        self._commands.append(process)
        return process

    def back(self, name: str, *options: object) -> Output:
        return finish(self.start_back(name, *options))

    def launch(self, name: str, *, back: bool = False, **options: object) -> str:
        """A detached migration, its id; as `migd migrate --detach` without the time Python needs to start."""
        here, there = (self.destination, self.source) if back else (self.source, self.destination)
        request = commands.Migrate(guest=name, to=there.address, detach=True)
        reply = here.client.ask_once(msgspec.structs.replace(request, **options))
        assert isinstance(reply, commands.Accepted), reply
        return reply.migration

    def cancel(self, target: str) -> Output:
        return migd("cancel", target, "--runtime-dir", self.source.directory)

    def resolve(self, target: str) -> Output:
        return migd("resolve", target, "--runtime-dir", self.source.directory)

    def ended(self, name: str) -> MigrationStatus:
        """The last migration of a guest from the source, once it is over."""
        return eventually(
            lambda: self._ended(name), f"the end of {name}'s migration", why=lambda: self.source.log
        )

    def _ended(self, name: str) -> MigrationStatus | None:
        found = self.source.migrations(name)
        over = found and found[-1].state in ("completed", "cancelled", "failed", "unknown")
        return found[-1] if over else None

    def close(self) -> None:
        for command in self._commands:
            if command.poll() is None:
                command.kill()
                command.communicate()
        for guest in self.guests.values():
            guest.kill()
        self.source.close()
        self.destination.close()


@contextlib.contextmanager
def daemon_pair(
    *, source: str = "", destination: str = "", held: bool = False, serve: bool = False
) -> Iterator[DaemonPair]:
    """A pair for a fixture or a single test."""
    pair = DaemonPair(source=source, destination=destination, held=held, serve=serve)
    try:
        yield pair
    finally:
        pair.close()
