"""Usage: the processor time and memory that a daemon takes during one migration, seen from outside."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import TracebackType

import msgspec

SAMPLE_S = 0.05
"""Between two looks at a process: what it allocates and gives back within less may be missed."""

_ANON = re.compile(r"RssAnon:\s+(\d+) kB")


class Usage(msgspec.Struct, kw_only=True):
    """Of one process during one run. Guest RAM is shared memory and does not count."""

    cpu_s: float
    """User and system, of all its threads."""
    peak_anon_bytes: int
    end_anon_bytes: int


class Watch:
    """Watches a process from the beginning of the context to its end; ``usage`` afterwards."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"watch-{pid}", daemon=True)
        self._cpu_s = 0.0
        self._peak_bytes = 0
        self._end_bytes = 0

    def __enter__(self) -> Watch:
        self._began_s = self._cpu_s = cpu_seconds(self._pid)
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    @property
    def usage(self) -> Usage:
        return Usage(
            cpu_s=self._cpu_s - self._began_s,
            peak_anon_bytes=self._peak_bytes,
            end_anon_bytes=self._end_bytes,
        )

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        try:
            self._cpu_s = cpu_seconds(self._pid)
            self._end_bytes = anonymous_bytes(self._pid)
        except OSError:  # it ended: the run has failed, and what was seen last stands
            return
        self._peak_bytes = max(self._peak_bytes, self._end_bytes)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads, ended ones included; OSError if there is none.

    From its CPU clock, numbered as by clock_getcpuclockid(3): it counts nanoseconds, /proc/PID/stat ticks of
    10 ms, of which a short run takes a daemon six.
    """
    return time.clock_gettime(~pid << 3 | 2)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file and no other process shares; 0 for a zombie, OSError for none."""
    found = _ANON.search(Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0
