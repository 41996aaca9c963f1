"""Processes that the API starts: marked, so that all of them are found again, and ended for certain.

The mark is a variable in their environment. What they start in turn inherits it: an incoming guest that has
outlived its daemon, too, whatever ``guest_command`` made of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from migd.errors import ResourceError

LOOK_S = 0.02
"""Between two looks at something that is waited for."""

_MARK = "MIGD_STARTED_BY"
_END_S = 3.0
"""Between SIGTERM and SIGKILL."""
_KILL_S = 10.0
"""For a process to be gone after SIGKILL; it has to give its memory back."""
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATE, _THREADS, _STARTED = 0, 17, 19
"""Fields of /proc/PID/stat behind the name, see proc(5)."""


class Process:
    """One process, by pid and time of start: a pid that is given out again is another process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _stat(pid)[_STARTED:][:1]

    @property
    def alive(self) -> bool:
        """Whether it has not ended; one that only waits to be reaped has.

        While threads are left of it, it cannot be reaped, although its first one may have ended.
        """
        fields = _stat(self.pid)
        if not fields or fields[_STARTED:][:1] != self._started:
            return False
        return fields[_STATE] not in "ZX" or int(fields[_THREADS]) > 1

    def signal(self, number: signal.Signals) -> None:
        """Nothing, if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(self.pid)
            try:
                if self.alive:  # it cannot become another process any more
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)


def _stat(pid: int) -> list[str]:
    """The fields behind the name; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def end(processes: Iterable[Process]) -> None:
    """SIGTERM, then SIGKILL for what is left. ResourceError naming what even that did not end."""
    left = list(processes)
    for number, patience_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _KILL_S)):
        for process in left:
            process.signal(number)
        deadline = time.monotonic() + patience_s
        while (left := [process for process in left if process.alive]) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
    if left:
        raise ResourceError(f"processes {', '.join(str(process.pid) for process in left)} cannot be ended")


class Family:
    """The processes of one owner: its children, and all that these have started."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(16)
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """``migd ARGUMENTS`` in a session of its own: Ctrl-C is for its owner to handle. OSError if not."""
        with log.open("wb") as output, interrupts_deferred():
            child = subprocess.Popen(
                [sys.executable, "-m", "migd", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Safe path: a numpy.py in the directory of whoever calls is not what migd wants to import.
                env={**os.environ, _MARK: self._token, "PYTHONSAFEPATH": "1"},
            )
            self._children.append(child)
        return child

    def end(self) -> None:
        """All of them, wherever they are now. ResourceError as of ``end``."""
        try:
            end(self._members())
            while late := list(self._members()):  # started by one that was just being ended
                end(late)
        finally:
            for child in self._children:
                child.poll()

    def _members(self) -> Iterable[Process]:
        # A child that is about to end has no environment left to be known by.
        found = {child.pid: Process(child.pid) for child in self._children if child.poll() is None}
        mark = f"{_MARK}={self._token}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):  # not ours, or ended meanwhile
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = Process(int(entry.name))
        return found.values()


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C and its like come after the block, so that it is done completely or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread only
        return
    arrived: list[int] = []

    def defer(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, defer)
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for number_ in dict.fromkeys(arrived):
            signal.raise_signal(number_)
