"""The durable journal of hand-overs: what a restarted daemon needs to never have two guests (G2, G3).

One file per migration and role, one JSON line per record, fsynced before ``append`` returns. Only the
records that decide anything are written: four at most.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path

import msgspec

from migd.errors import MigdError, ResourceError

FORMAT = 1


class Mark(StrEnum):
    """What a record says."""

    READY = "ready"
    """Destination: the image is verified and loaded."""
    GO = "go"
    """Source: from here on only the destination's answer decides; ``peer`` is whom to ask."""
    STARTED = "started"
    """Destination: the guest is, or is about to be, running here. Source: the destination said so."""
    ABORTED = "aborted"
    """This side will never run this migration's guest (destination), or has resumed it (source)."""
    RELEASED = "released"
    """The source let go of the guest."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of a journal."""

    format: int = FORMAT
    migration: str
    mark: Mark
    guest: str = ""
    peer: str = ""
    detail: str = ""


class CorruptJournal(MigdError):
    """A journal file cannot be read; no decision is taken from it."""

    exit_code = 4


class Journal:
    """All records of one role below one directory (0700)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"journal directory {directory}: {error.strerror}") from error

    def append(self, record: Record) -> None:
        """Durable when this returns. ResourceError (disk full, read-only) otherwise: then it did not happen.

        A torn line from a crash or a full disk is cut off first, so that it can never swallow this record.
        """
        path = self._path(record.migration)
        line = msgspec.json.encode(record) + b"\n"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                whole = _whole_lines(os.pread(fd, 1 << 20, 0))
                os.ftruncate(fd, whole)
                if not whole:
                    self._sync_directory()  # before the record: if this fails, there must be none
                try:
                    if os.write(fd, line) != len(line):
                        raise OSError(28, "No space left on device")
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, whole)
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise ResourceError(f"journal {path}: {error.strerror}") from error

    def records(self, migration: str) -> list[Record]:
        """All records of a migration, oldest first; empty if it is unknown. CorruptJournal if unreadable."""
        path = self._path(migration)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CorruptJournal(f"journal {path}: {error.strerror}") from error
        try:
            lines = data[: _whole_lines(data)].splitlines()
            records = [msgspec.json.decode(line, type=Record) for line in lines]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CorruptJournal(f"journal {path}: {error}; resolve by hand") from error
        for record in records:
            if record.format != FORMAT:
                raise CorruptJournal(f"journal {path}: format {record.format}, this migd writes {FORMAT}")
        return records

    def last(self, migration: str) -> Record | None:
        """The newest record of a migration."""
        records = self.records(migration)
        return records[-1] if records else None

    def _path(self, migration: str) -> Path:
        if not re.fullmatch("[0-9a-f]{32}", migration):
            raise ResourceError(f"{migration!r} is no migration id")
        return self._directory / f"{migration}.jsonl"

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _whole_lines(data: bytes) -> int:
    """How many leading bytes are complete lines: a crash may have torn the last one."""
    return data.rfind(b"\n") + 1
