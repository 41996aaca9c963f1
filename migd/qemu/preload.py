"""The library that makes a stock QEMU's writes visible: built from ``preload.c`` when it is first wanted.

What it does stands there. It is compiled on the machine where QEMU runs, against that machine's C library,
and kept in the user's cache under a name that changes with its source, so no stale one is ever loaded. Code
that is loaded into QEMU must come from its owner: a cache that others could write to is refused.

A QEMU that runs as another user (libvirt) must be able to read the library: give ``library`` a directory
that it can enter. The dynamic linker ignores a library that it cannot read, with a line on stderr, and
any where the program is set-user-id or has file capabilities: ``QemuProcess.tracked`` tells.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from migd.errors import ConfigError, ResourceError

SOURCE = Path(__file__).with_name("preload.c")

COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c99", "-shared", "-fPIC", "-O2", "-Wall")
_COMPILE_S = 60.0
"""It takes 0.1 s; a compiler that waits for a license server or a dead network drive ends here."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_REMEDY = (
    "install a C compiler (apt-get install gcc libc6-dev), or name one in CC. Without the library what this "
    "QEMU writes is found by soft-dirty marks, where the kernel has them, or by comparing the content of its "
    "RAM, and then the guest is not asked for free pages"
)


class PreloadUnavailable(ResourceError):
    """The library cannot be built, or not be kept, on this host; the message says why and what to do."""


def library(cache_dir: Path | None = None) -> Path:
    """The library's path, absolute; built if it is not in ``cache_dir`` (default: ``~/.cache/migd``) yet.

    PreloadUnavailable without a compiler, if it fails, or if the directory is not safe to load code from.
    """
    directory = _cache(cache_dir)
    name = f"preload-{_fingerprint()}.so"
    if any(sign in f"{directory}" for sign in ": "):
        raise PreloadUnavailable(f"{directory}: LD_PRELOAD takes no path with a blank or a colon")
    built = directory / name
    if not built.exists():
        _build(built)
    return built


def environment(
    base: Mapping[str, str], ram_names: Iterable[str | Path], *, preload: Path | None = None
) -> dict[str, str]:
    """``base`` with what QEMU must be started with, so that the RAM in files of these names is tracked.

    A name is the path of the file, or the last part of it, or the name of a memfd, or what /proc/PID/fd says.
    None at all: whatever looks like RAM. ``preload`` is ``library()`` unless given. ConfigError for a name
    that cannot be passed.
    """
    path = f"{library() if preload is None else preload}"
    names = [_name(ram_name) for ram_name in ram_names]
    existing = [base["LD_PRELOAD"]] if base.get("LD_PRELOAD") else []
    added = {"LD_PRELOAD": ":".join([path, *existing])}
    if names:
        added["MIGD_RAM"] = ":".join(names)
    rest = {key: value for key, value in base.items() if key != "MIGD_RAM"}
    return {**rest, **added}


def _name(ram_name: str | Path) -> str:
    """As the library compares it: where a path leads to in the end, without links on the way."""
    name = f"{ram_name}".removesuffix(" (deleted)").removeprefix("/memfd:").removeprefix("memfd:")
    if "/" in name:
        name = os.path.realpath(name)
    if not name or ":" in name:
        raise ConfigError(f"RAM file {ram_name}: a name that is empty or has a colon cannot be told to QEMU")
    return name


# -- the cache ----------------------------------------------------------------------------------------


def _cache(chosen: Path | None) -> Path:
    if chosen is None:
        home = os.environ.get("XDG_CACHE_HOME", "")
        # The standard says to ignore a relative one.
        chosen = (Path(home) if home.startswith("/") else Path("~/.cache").expanduser()) / "migd"
    directory = chosen.absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        _check(directory)
    except OSError as error:
        raise PreloadUnavailable(
            f"no place for the preload library: {directory}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
    return directory


def _check(directory: Path) -> None:
    """PreloadUnavailable if another user could put a library there. OSError as the kernel gives it."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PreloadUnavailable(f"{directory} is no directory (a link to one is not followed)")
    if found.st_uid != os.geteuid():
        raise PreloadUnavailable(
            f"{directory} belongs to another user (uid {found.st_uid}): code from there is not loaded into "
            "QEMU; set XDG_CACHE_HOME to a directory of your own"
        )
    if found.st_mode & _OTHERS_WRITE:
        raise PreloadUnavailable(
            f"others can write to {directory}: code from there is not loaded into QEMU; look at what is in "
            f"it, then chmod go-w {directory}"
        )


def _fingerprint() -> str:
    """Of all that decides what the compiler makes."""
    parts = [SOURCE.read_bytes(), platform.machine().encode(), " ".join(_FLAGS).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


# -- the compiler -------------------------------------------------------------------------------------


def _build(target: Path) -> None:
    """Two that build at once write the same bytes, and the later rename wins."""
    compiler = _compiler()
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _compile([*compiler, *_FLAGS, "-o", str(made), str(SOURCE)])
            made.chmod(0o755)  # whatever the umask: another user's QEMU has to read it
            made.rename(target)
    except OSError as error:
        raise PreloadUnavailable(f"{target.parent}: the preload library: {error.strerror}") from error


def _compiler() -> list[str]:
    """``CC`` and nothing else if it is set; it may carry options."""
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise PreloadUnavailable(f"CC={wanted[0]} is no program: {_REMEDY}")
        return wanted
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise PreloadUnavailable(f"none of {', '.join(COMPILERS)} is installed: {_REMEDY}")


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_COMPILE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PreloadUnavailable(f"{command[0]} took longer than {_COMPILE_S:g} s") from error
    if done.returncode != 0:
        said = done.stdout.strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else "without a word")
        raise PreloadUnavailable(f"{command[0]} failed ({done.returncode}): {first}: {_REMEDY}")
