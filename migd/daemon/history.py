"""History: the outcomes of migrations that are over, in the runtime directory, through restarts.

For people and scripts, never for a decision: those are the journal's (``migd/migration/journal.py``). So a
line that cannot be read is left out, and a record that cannot be written is a warning.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from migd.control.commands import Remembered
from migd.daemon.targets import is_id_of
from migd.migration.stats import Arrival, Result

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 1000
"""Records; about 3 KiB each, so that the file stays at 3 MiB."""
_SLACK = 100
"""Records beyond KEPT before the file is written anew, so that this is not done for each."""


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the file; fields may be added within a format."""

    format: int = FORMAT
    ended: str
    record: Result | Arrival


_DECODER = msgspec.json.Decoder(_Line)


class History:
    """One file; its methods block, and may be called from any thread."""

    def __init__(self, path: Path, kept: int = KEPT) -> None:
        self._path = path
        self._kept = kept
        self._lock = threading.Lock()
        self._lines: int | None = None
        """In the file; unknown before the first append."""

    def append(self, entry: Remembered) -> None:
        """Durable when this returns, unless a warning says why it is not."""
        try:
            with self._lock:
                self._append(msgspec.json.encode(_Line(ended=entry.ended, record=entry.record)) + b"\n")
        except OSError as error:
            log.warning("history %s: not written: %s", self._path, error.strerror)

    def newest(self, limit: int) -> list[Remembered]:
        """At most so many, the newest last."""
        return list(deque(self._entries(), limit))

    def about(self, target: str) -> list[Remembered]:
        """Those of a guest by name, or of a migration by the beginning of its id; the newest last."""
        return [
            entry
            for entry in self._entries()
            if entry.record.guest == target or is_id_of(target, entry.record.migration)
        ]

    def _append(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags, 0o600)
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            if end and os.pread(fd, 1, end - 1) != b"\n":
                line = b"\n" + line  # what a crash has torn stays a line of its own
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        if self._lines is None:
            self._lines = len(self._path.read_bytes().splitlines())
        else:
            self._lines += 1
        if self._lines > self._kept + _SLACK:
            self._shorten()

    def _shorten(self) -> None:
        """The newest records into a new file, in the place of the old one: a crash leaves either of them."""
        lines = self._path.read_bytes().splitlines(keepends=True)[-self._kept :]
        new = self._path.with_suffix(".new")
        with open(new, "wb", opener=_private) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        self._lines = len(lines)

    def _entries(self) -> Iterator[Remembered]:
        """Every record that can be read; a newer migd may have written others."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("history %s: %s", self._path, error.strerror)
            return
        for line in data.splitlines():
            try:
                found = _DECODER.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                continue
            if found.format == FORMAT:
                yield Remembered(ended=found.ended, record=found.record)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
