"""Guest: a guest's process as its caller holds it, started by us or found at a daemon."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from migd.api.processes import LOOK_S, Process, end
from migd.errors import GuestError, TimedOut

READY_S = 120.0
"""For a guest to fill its RAM: a hog of a few GiB on a busy machine."""

END_S = 30.0
"""For a guest to end after it has arrived elsewhere."""


class Guest:
    """One process that is, or was, a guest. A guest that was migrated goes on in another process."""

    name: str
    """The guest's, by which daemons know it."""
    log_path: Path
    """The file with ``log``."""

    def __init__(self, name: str, pid: int, log: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        """``child`` for a process of ours; others are somebody else's to reap."""
        self.name = name
        self.log_path = log
        self._child = child
        self._process = Process(pid)

    def __repr__(self) -> str:
        return f"<migd.api.Guest {self.name}, pid {self.pid}>"

    @property
    def pid(self) -> int:
        """Of this process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended; at the source it does when the guest has arrived elsewhere."""
        return self._process.alive

    @property
    def exit_code(self) -> int | None:
        """Of a process of ours that has ended: 0 after its guest arrived elsewhere; else None."""
        return self._child.poll() if self._child is not None else None

    @property
    def log(self) -> str:
        """What it has said; empty if it has said nothing, or its log is gone with its daemon's directory."""
        try:
            return self.log_path.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def filled(self) -> bool:
        """Whether it has filled its RAM and its workload runs. GuestError with its words if it has ended."""
        if " ready: " in self.log:
            return True
        if not self.alive:
            raise GuestError(f"guest {self.name} ended with {self.exit_code}: {self._last_line()}")
        return False

    def ready(self, timeout_s: float = READY_S) -> Guest:
        """Itself, once it is ``filled``. TimedOut."""
        deadline = time.monotonic() + timeout_s
        while not self.filled:
            if time.monotonic() > deadline:
                raise TimedOut(f"guest {self.name} was not ready after {timeout_s:g} s: {self._last_line()}")
            time.sleep(LOOK_S)
        return self

    def wait(self, timeout_s: float = END_S) -> int | None:
        """Returns once the process has ended: ``exit_code``. TimedOut."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                raise TimedOut(f"guest {self.name} had not ended after {timeout_s:g} s")
            time.sleep(LOOK_S)
        return self.exit_code

    def end(self) -> None:
        """SIGTERM, and SIGKILL if that does not help; returns when the process is gone."""
        end([self._process])
        if self._child is not None:
            self._child.wait()

    def _last_line(self) -> str:
        return (self.log.strip().splitlines() or ["it said nothing"])[-1].removeprefix("migd: ")
