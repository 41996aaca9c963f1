"""The durable journal of hand-overs: what a restarted daemon needs to never have two guests (G2, G3).

One file per migration and role, one JSON line per record, fsynced before ``append`` returns. Only the
records that decide anything are written: five at most.

Formats: 1 had no ``software``; 2 has; 3 knows VERIFIED and CONDEMNED. Each migd reads its own and every
older one. Whatever a later format changes, a line stays a JSON object with an integer ``format`` and a string
``software``, so that any migd can say who wrote what it cannot read.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec

from migd.errors import MigdError, ResourceError
from migd.wire.protocol import SOFTWARE

FORMAT = 3

_FILE = re.compile(r"([0-9a-f]{32})\.jsonl")


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
    """Source: it let go of the guest."""
    VERIFIED = "verified"
    """Destination: the source's verdict on the guest that runs here was good."""
    CONDEMNED = "condemned"
    """The verdict was bad: on neither side may the guest go on before the operator says where (G4)."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One line of a journal."""

    format: int = FORMAT
    software: str = SOFTWARE
    """Which migd wrote it; empty in format 1."""
    migration: str
    mark: Mark
    guest: str = ""
    peer: str = ""
    detail: str = ""


class _Origin(msgspec.Struct, frozen=True):
    """What a line of any format has."""

    format: Annotated[int, msgspec.Meta(ge=1)]
    software: str = ""


class CorruptJournal(MigdError):
    """A journal file cannot be read; no decision is taken from it."""

    exit_code = 4


class NewerJournal(CorruptJournal):
    """A later migd wrote it."""


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
        ours = msgspec.structs.replace(
            record, format=FORMAT, software=SOFTWARE
        )  # it may derive from an older
        line = msgspec.json.encode(ours) + b"\n"
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
            records = [_read(line) for line in lines]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise CorruptJournal(f"journal {path}: {error}; resolve by hand") from error
        except NewerJournal as error:
            raise NewerJournal(f"journal {path}: {error}") from error
        if any(record.migration != migration for record in records):
            raise CorruptJournal(f"journal {path}: it has records of another migration; resolve by hand")
        return records

    def last(self, migration: str) -> Record | None:
        """The newest record of a migration."""
        records = self.records(migration)
        return records[-1] if records else None

    def newest_of(self, guest: str) -> Record | None:
        """The newest record about this guest, of whichever migration; what cannot be read is passed over."""
        newest: tuple[int, Record] | None = None
        for migration in self.migrations():
            with suppress(OSError, CorruptJournal):
                written_ns = self._path(migration).stat().st_mtime_ns
                last = self.last(migration)
                if last is not None and last.guest == guest and (newest is None or written_ns > newest[0]):
                    newest = (written_ns, last)
        return newest[1] if newest is not None else None

    def migrations(self) -> list[str]:
        """Of all files here, in order. ResourceError if the directory cannot be read."""
        try:
            names = os.listdir(self._directory)
        except OSError as error:
            raise ResourceError(f"journal directory {self._directory}: {error.strerror}") from error
        return sorted(found[1] for name in names if (found := _FILE.fullmatch(name)))

    def forget(self, migration: str) -> None:
        """Delete all records of a migration, durably. ResourceError if that fails.

        Afterwards a daemon knows nothing of it: see ``migd.leftovers`` for when that is right.
        """
        path = self._path(migration)
        try:
            path.unlink(missing_ok=True)
            self._sync_directory()
        except OSError as error:
            raise ResourceError(f"journal {path}: {error.strerror}") from error

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


def _read(line: bytes) -> Record:
    origin = msgspec.json.decode(line, type=_Origin)
    if origin.format > FORMAT:
        writer = origin.software if origin.software.isprintable() and origin.software else "a later migd"
        raise NewerJournal(
            f"{writer[:100]} wrote it in format {origin.format}, {SOFTWARE} reads formats up to {FORMAT} and "
            f"decides nothing from it: update migd here, or run the one that wrote it"
        )
    record = msgspec.json.decode(line, type=Record)
    return msgspec.structs.replace(record, software=origin.software)


def _whole_lines(data: bytes) -> int:
    """How many leading bytes are complete lines: a crash may have torn the last one."""
    return data.rfind(b"\n") + 1
