"""Opening the files that a QEMU's RAM is in, by what it says of its memory backends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from migd.errors import GuestError
from migd.qemu.inventory import Backend

_PROC_SELF = "/proc/self/"


def open_ram(backend: Backend, pid: int) -> int:
    """A descriptor of the backend's file, open for reading and writing; ``pid``: of the QEMU, or of whoever
    started it. GuestError if it cannot be found, or not be opened.
    """
    path = backend.path
    if path.startswith(_PROC_SELF):
        path = f"/proc/{pid}/{path.removeprefix(_PROC_SELF)}"
    elif path:
        path = os.path.join(f"/proc/{pid}/cwd", path)
    if os.path.exists(path) and not os.path.isdir(path):
        return _opened(path, backend)
    # Without a name: a directory was given to -object, the file was deleted since, or it is a memfd.
    found = {_identity(link): link for link in _links(pid) if _may_be(link, backend)}
    if len(found) != 1:
        raise GuestError(
            f"RAM {backend.id}: process {pid} has {len(found)} open files that may be it; give the memory "
            f"backend a file of its own, mem-path=DIRECTORY/NAME"
        )
    return _opened(str(found.popitem()[1]), backend)


def _opened(path: str, backend: Backend) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise GuestError(f"RAM {backend.id} in {path}: {error.strerror}; migd needs to read it") from error


def _links(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError as error:
        raise GuestError(f"the files of process {pid}: {error.strerror}; run migd as its user") from error


def _may_be(link: Path, backend: Backend) -> bool:
    try:
        status, target = link.stat(), os.readlink(link)
    except OSError:  # closed meanwhile
        return False
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_size == backend.bytes
        and (backend.path or "/memfd:") in target
    )


def _identity(link: Path) -> tuple[int, int]:
    status = link.stat()
    return status.st_dev, status.st_ino
