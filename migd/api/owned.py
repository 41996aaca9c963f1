"""OwnedDaemon: a daemon process that we started, with its guests; all of it is ended with its context."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from migd.api.daemon import ROLES, Daemon
from migd.api.guest import Guest
from migd.api.processes import LOOK_S, Family, Process, end, interrupts_deferred
from migd.config import load
from migd.errors import ConfigError, MigdError, ResourceError, TimedOut

START_S = 30.0
"""For a daemon to answer, on a busy machine."""

Value = str | int | float | bool | Sequence[str]
Tables = Mapping[str, Mapping[str, Value]]
"""Those of a configuration file: ``{"migration": {"streams": 4}}``."""

_open: set[OwnedDaemon] = set()
"""Not closed yet; whoever forgets to is helped when the interpreter ends."""


class OwnedDaemon(Daemon):
    """A daemon that is ours: it ends when its context is left, or at ``close``, at the latest at our own end.

    With it end the guests that were started through it, and those that arrived at it: an incoming guest
    outlives its daemon, but not its owner. So does its private directory, with logs, configuration and,
    unless another was named, the runtime directory. Only SIGKILL of our own process leaves them behind.
    """

    role: str
    """``serve``, ``source`` or ``destination``."""
    process: subprocess.Popen[bytes]
    """The daemon's own."""

    def __init__(
        self, role: str, config: Tables | None = None, runtime_dir: Path | str | None = None
    ) -> None:
        """Returns once the process is on its way. ConfigError for a bad role or configuration."""
        if role not in ROLES:
            raise ConfigError(f"{role!r} is no role of a daemon: {', '.join(ROLES)}")
        self.role = role
        self._family = Family()
        self._guests: list[Guest] = []
        self._numbers = itertools.count(1)
        with interrupts_deferred():
            self._private = Path(tempfile.mkdtemp(prefix="migd-"))
            _open.add(self)
        super().__init__(Path(runtime_dir).absolute() if runtime_dir is not None else self._private / "run")
        self._log = self._private / "daemon.log"
        self._last_log = ""
        try:
            self.process = self._start(config or {})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OwnedDaemon:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of its process, also after its end."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has said, also after its end."""
        with contextlib.suppress(FileNotFoundError):
            return self._log.read_text(errors="replace")
        return self._last_log

    def logs(self) -> list[tuple[str, str]]:
        """Name and text of the daemon's log, of those of its guests, and of those that arrived."""
        arrived = sorted(self.runtime_dir.glob("guest-*.log"))
        return [
            ("daemon", self.log),
            *((f"guest-{guest.name}", guest.log) for guest in self._guests),
            *((f"{path.stem} (arrived)", path.read_text(errors="replace")) for path in arrived),
        ]

    def ready(self, timeout_s: float = START_S) -> OwnedDaemon:
        """Itself, once it answers. ConfigError or ResourceError with its words if it ends, TimedOut."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_alive()
            with contextlib.suppress(MigdError):  # not listening yet
                if self.status().pid == self.pid:  # else another daemon has the directory
                    return self
            if time.monotonic() > deadline:
                raise TimedOut(f"the {self.role} daemon did not answer within {timeout_s:g} s")
            time.sleep(LOOK_S)

    def start_guest(self, name: str, ram: str | int = "64Mi", **options: Value) -> Guest:
        """A stub guest here, on its way: ``ready`` waits for it.

        ``options`` are those of ``migd guest``, with ``_`` for ``-``: ``workload="hog"``, ``run_pages=4``,
        ``fill=["/a", "/b"]``. The guest says what is wrong with them: GuestError from its ``ready``.
        """
        log = self._private / f"guest-{next(self._numbers)}.log"
        socket_path = self.runtime_dir / "guest.sock"
        words = [word for key, value in options.items() for word in _option(key, value)]
        child = self._family.start(
            log, "guest", "--name", name, "--ram", str(ram), "--socket", str(socket_path), *words
        )
        guest = Guest(name, child.pid, log, child)
        self._guests.append(guest)
        return guest

    def start_qemu(
        self, name: str, command: Sequence[str] = (), ram: str | int = "1Gi", *, qmp: Path | None = None
    ) -> Guest:
        """A guest under a stock QEMU here, on its way: ``ready`` waits for QEMU, not for what it boots.

        Started by ``command``, with the placeholders of ``migd qemu``, or found at ``qmp``: that one is
        somebody else's, and goes on when we end.
        """
        log = self._private / f"guest-{next(self._numbers)}.log"
        how = ["--qmp", str(qmp)] if qmp is not None else ["--ram", str(ram), "--", *command]
        socket_path = self.runtime_dir / "guest.sock"
        child = self._family.start(log, "qemu", "--name", name, "--socket", str(socket_path), *how)
        guest = Guest(name, child.pid, log, child)
        self._guests.append(guest)
        return guest

    def end_guests(self) -> None:
        """End every guest that is here, and return when the daemon has noticed. TimedOut if it does not."""
        for guest in self._guests:
            guest.end()
        deadline = time.monotonic() + START_S
        while found := self.status().guests:
            end(Process(attached.pid) for attached in found)
            if time.monotonic() > deadline:
                raise TimedOut(f"guests are still attached in {self.runtime_dir}: {found}")
            time.sleep(LOOK_S)

    def stop(self, timeout_s: float = START_S) -> int:
        """SIGTERM to the daemon alone, and its exit code: guests go on, migrations end. TimedOut."""
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"the {self.role} daemon did not end within {timeout_s:g} s") from None

    def close(self) -> None:
        """End everything that is left; a second time does nothing. ResourceError if something cannot be."""
        if self not in _open:
            return
        with interrupts_deferred():  # a second Ctrl-C must not leave half of it behind
            try:
                self._family.end()
            finally:
                self._last_log = self.log
                shutil.rmtree(self._private, ignore_errors=True)
                _open.discard(self)

    def _start(self, config: Tables) -> subprocess.Popen[bytes]:
        path = self._private / "config.toml"
        path.write_text(_toml(config, self.role))
        try:
            load(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(path), "config", 1)) from error
        arguments = (self.role, "--config", str(path), "--runtime-dir", str(self.runtime_dir))
        return self._family.start(self._log, *arguments)

    def _check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            last = (self.log.strip().splitlines() or ["it said nothing"])[-1].removeprefix("migd: ")
            kind = {2: ConfigError, 3: ResourceError}.get(code, MigdError)
            raise kind(f"the {self.role} daemon ended with {code}: {last}")


def start_daemon(
    role: str,
    config: Tables | None = None,
    runtime_dir: Path | str | None = None,
    timeout_s: float = START_S,
) -> OwnedDaemon:
    """A new daemon that answers: ``serve``, ``source`` or ``destination``. Use it in a ``with`` statement.

    ``config`` has the tables of a configuration file, like ``{"migration": {"streams": 4}}``; unless it says
    where to listen, that is a free port of 127.0.0.1. Without ``runtime_dir`` it gets a private one.
    """
    daemon = OwnedDaemon(role, config, runtime_dir)
    try:
        return daemon.ready(timeout_s)
    except BaseException:
        daemon.close()
        raise


def _option(key: str, value: Value) -> list[str]:
    """The words of one option of the command line; none for False."""
    flag = f"--{key.replace('_', '-')}"
    match value:
        case bool():
            return [flag] if value else []
        case str() | int() | float():
            return [flag, str(value)]
        case _:
            return [word for one in value for word in (flag, str(one))]


def _toml(config: Tables, role: str) -> str:
    """JSON writes scalars and lists of them as TOML does."""
    tables = {name: dict(keys) for name, keys in config.items()}
    if role != "source":
        tables.setdefault("destination", {}).setdefault("listen", "127.0.0.1:0")
    lines: list[str] = []
    for name, keys in tables.items():
        lines.append(f"[{name}]")
        lines += (f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return "\n".join(lines) + "\n"


@atexit.register
def _close_all() -> None:
    with interrupts_deferred():  # over all of them
        for daemon in list(_open):
            daemon.close()
