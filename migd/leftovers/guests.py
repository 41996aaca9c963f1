"""Guest processes as they show in /proc: which guests may be alive while no daemon is there to ask."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_RAM = re.compile(r"/memfd:migd-.*|.*/migd-.+-.+-[0-9a-f]{8}(?: \(deleted\))?")
"""What a descriptor of guest RAM leads to: a memfd, or a file named by ``migd.ram.provider``."""
_NAME_PREFIX = "migd:"
_COMM_BYTES = 15


@dataclass(frozen=True)
class GuestProcess:
    """A process that holds guest RAM, or says by its arguments that it is a guest of migd."""

    pid: int
    name: str
    """Of the guest, or its first letters; empty if the process does not tell."""
    home: tuple[int, int] | None
    """Device and inode of the runtime directory it was told to attach in; None if it does not tell."""
    files: frozenset[str]
    """What its descriptors lead to; empty if it is another user's."""

    def belongs_to(self, runtime_dir: Path) -> bool:
        """Whether it was told to attach in this directory, by whatever path it calls that."""
        return self.home == _identity(runtime_dir)

    def may_be(self, guest: str, runtime_dir: Path) -> bool:
        """Whether it could be this guest of this directory's daemon, as far as it shows."""
        if self.home is not None and not self.belongs_to(runtime_dir):
            return False
        cut = len(self.name) >= _SHOWN and guest.startswith(self.name)
        return not self.name or guest == self.name or cut


_OWN_QEMU = re.compile(r"unix:(?P<home>/.+)/qemu-(?P<name>[^/]+)/qmp,")
"""The monitor of a QEMU that a companion has started (migd/qemu/launch.py)."""

_SOCKET = "guest.sock"
_SHOWN = _COMM_BYTES - len(_NAME_PREFIX)
"""Of a guest's name in the name of its process; longer ones are cut."""


def guest_processes() -> list[GuestProcess]:
    """All of this host that can be told to be guests; daemons hold guest RAM, too, and are left out."""
    return list(_guests())


def _guests() -> Iterator[GuestProcess]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it ended meanwhile
                found = _guest(entry)
                if found is not None:
                    yield found


def _guest(process: Path) -> GuestProcess | None:
    arguments = tuple((process / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
    comm = (process / "comm").read_text().removesuffix("\n")
    files = frozenset(_files(process))
    is_daemon = any(path.endswith("/lock") for path in files)  # of its runtime directory
    told = comm.startswith(_NAME_PREFIX) or _is_command(arguments)
    if is_daemon or not (told or any(map(_RAM.fullmatch, files))):
        return None
    return GuestProcess(int(process.name), _name(arguments, comm), _home(process, arguments), files)


def _is_command(arguments: tuple[str, ...]) -> bool:
    """``migd guest ...`` or ``migd qemu ...``, however Python was told to run it."""
    return any(
        command in ("guest", "qemu") and before.rpartition("/")[2] == "migd"
        for before, command in pairwise(arguments)
    )


def _name(arguments: tuple[str, ...], comm: str) -> str:
    if comm.startswith(_NAME_PREFIX):
        return comm.removeprefix(_NAME_PREFIX)
    for word, following in pairwise((*arguments, "")):
        if word == "--name":
            return following
        if word.startswith("--name="):
            return word.removeprefix("--name=")
        if found := _OWN_QEMU.match(word):
            return found["name"]
    return ""


def _home(process: Path, arguments: tuple[str, ...]) -> tuple[int, int] | None:
    """As the process sees the path: it may be relative, or in another name space of mounts."""
    for word in arguments:
        path = Path(word.removeprefix("--socket="))
        if found := _OWN_QEMU.match(word):
            path = Path(found["home"]) / _SOCKET
        if path.name == _SOCKET:
            with suppress(OSError):  # it is gone, or another user's
                seen = Path(os.readlink(process / "cwd")) / path
                return _identity(process / "root" / seen.parent.relative_to("/"))
    return None


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return (status.st_dev, status.st_ino)


def _files(process: Path) -> Iterator[str]:
    with suppress(OSError):  # another user's
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                yield os.readlink(descriptor)
