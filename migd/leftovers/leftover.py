"""Leftover: one thing that a daemon left behind, and whether it may go."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path

import msgspec

from migd.migration.journal import Journal


class Kind(StrEnum):
    """What it is."""

    SOCKET = "socket"
    JOURNAL = "journal"
    """The records of one migration in one role."""
    LOG = "log"
    """What a guest's process had to say; of one under QEMU, a directory with QEMU's log and sockets."""
    RAM = "ram"
    """A file of guest RAM."""
    GUEST = "guest"
    """A process. Never removed: it is somebody's guest, or ends by itself."""
    DIRECTORY = "directory"
    """A whole runtime directory: a daemon uses it, or it is not ours."""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """``place`` is its path, or the process; ``why`` it may go, or has to stay, for people."""

    kind: Kind
    place: str
    removable: bool
    why: str

    def remove(self) -> None:
        """Make it go. OSError or ResourceError if it cannot."""
        path = Path(self.place)
        if self.kind is Kind.JOURNAL:
            Journal(path.parent).forget(path.stem)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def goes(kind: Kind, place: object, why: str) -> Leftover:
    return Leftover(kind=kind, place=str(place), removable=True, why=why)


def stays(kind: Kind, place: object, why: str) -> Leftover:
    return Leftover(kind=kind, place=str(place), removable=False, why=why)
