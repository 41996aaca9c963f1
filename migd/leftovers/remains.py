"""Remains: what a daemon that is gone left in its runtime directory and elsewhere, each judged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from migd.errors import ConfigError
from migd.guest.stub import ORPHAN_S
from migd.host import RuntimeDir
from migd.leftovers import journals
from migd.leftovers.guests import GuestProcess, guest_processes
from migd.leftovers.leftover import Kind, Leftover, goes, stays
from migd.ram.provider import RamDirectory, provider

_SOCKETS = ("control.sock", "guest.sock")
_LOG = re.compile(r"guest-(.+)\.log")
_QEMU = re.compile(r"qemu-(.+)")


class Remains:
    """Of the daemon of one runtime directory, whose lock is held while the context is entered.

    So no daemon is there, and none can start before its leftovers were judged and removed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = RuntimeDir(directory)

    def __enter__(self) -> Remains:
        """ConfigError if it is no runtime directory, ResourceError if a daemon uses it."""
        if not (self._directory / "lock").is_file():  # else the lock would make one of any directory
            raise ConfigError(f"{self._directory} is no runtime directory of a migd daemon")
        self._lock.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def leftovers(self) -> Iterator[Leftover]:
        """All there are, judged at this moment. Nothing is changed."""
        guests = guest_processes()
        yield from self._guests(guests)
        yield from self._sockets()
        yield from journals.leftovers(self._directory, guests)
        yield from self._logs(guests)

    def _guests(self, guests: Sequence[GuestProcess]) -> Iterator[Leftover]:
        """Never signalled: from outside nobody can tell one that runs from one that waits."""
        for guest in guests:
            if guest.belongs_to(self._directory):
                yield stays(
                    Kind.GUEST,
                    f"process {guest.pid}{f' ({guest.name})' if guest.name else ''}",
                    f"attaches to the next daemon here; one that was never started ends by itself after "
                    f"{ORPHAN_S:.0f} s",
                )

    def _sockets(self) -> Iterator[Leftover]:
        for name in _SOCKETS:
            if (self._directory / name).is_socket():
                yield goes(Kind.SOCKET, self._directory / name, "no daemon listens on it")

    def _logs(self, guests: Sequence[GuestProcess]) -> Iterator[Leftover]:
        for path in sorted(self._directory.iterdir()):
            found = _LOG.fullmatch(path.name)
            if found and path.is_file():
                yield self._log(path, found[1], guests)
            elif (of_qemu := _QEMU.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
                yield self._qemu(path, of_qemu[1], guests)

    def _qemu(self, path: Path, name: str, guests: Sequence[GuestProcess]) -> Leftover:
        for guest in guests:
            if guest.may_be(name, self._directory):
                return stays(Kind.LOG, path, f"process {guest.pid} may be its QEMU, or stand beside it")
        return goes(Kind.LOG, path, f"guest {name} is not here any more")

    def _log(self, path: Path, name: str, guests: Sequence[GuestProcess]) -> Leftover:
        for guest in guests:
            named = bool(guest.name) and guest.may_be(name, self._directory)
            if named or str(path.resolve()) in guest.files:
                return stays(Kind.LOG, path, f"process {guest.pid} may write to it")
        return goes(Kind.LOG, path, f"guest {name} is not here any more")


def ram_files(ram: str) -> Iterator[Leftover]:
    """Files of guest RAM in the directory that ``daemon.ram`` names, if it names one. ConfigError."""
    place = provider(ram)
    if isinstance(place, RamDirectory):
        for path in place.leftovers():
            yield goes(Kind.RAM, path, "no process has it open: its guest is gone")
