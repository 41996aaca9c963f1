"""The emulators that the lab boots its guest with: the installed QEMU, and Debian's newest beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from migd.lab import debian
from migd.lab.debian import Apt, LabUnavailable, Progress

_PROGRAM = "qemu-system-x86_64"
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_MODERN = (10,)
_COMPILERS = ("gcc", "cc", "clang")
_COMPILER_PACKAGES = ("gcc", "libc6-dev")
_CALL_S = 20.0

_LIBRARY = re.compile(r"(lib|zlib|liburing).*")
_OF_THE_LOADER = re.compile(r"libc6.*|libgcc-s1|libc-bin")  # not to be mixed with the system's
_LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")


@dataclass(frozen=True)
class Emulator:
    """A QEMU: the words its command line begins with, and what it wants in its environment."""

    version: tuple[int, ...]
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "QEMU " + ".".join(map(str, self.version))


def emulators(*, progress: Progress = debian.silent) -> list[Emulator]:
    """All that are to be had, oldest first. LabUnavailable if there is none."""
    found: dict[tuple[int, ...], Emulator] = {}
    reasons = []
    for get in (installed, newest):
        try:
            emulator = get(progress=progress)
            found.setdefault(emulator.version, emulator)
        except LabUnavailable as error:
            reasons.append(error)
            progress(f"QEMU: {error}")
    if not found:
        raise reasons[0]
    return [emulator for _, emulator in sorted(found.items())]


def installed(*, progress: Progress = debian.silent) -> Emulator:
    """The one on PATH; installed first where it is missing. LabUnavailable where that cannot be done."""
    if not shutil.which(_PROGRAM):
        progress("QEMU: installing Debian's")
        debian.install(_PACKAGES[:1])
    return _emulator((shutil.which(_PROGRAM) or _PROGRAM,), {})


def compiler(*, progress: Progress = debian.silent) -> str:
    """A C compiler for the preload that these QEMUs are started with; installed first where it is missing."""
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        progress("a C compiler: installing Debian's, for the preload")
        debian.install(_COMPILER_PACKAGES)
        found = shutil.which(_COMPILERS[0]) or _COMPILERS[0]
    return found


def newest(*, progress: Progress = debian.silent) -> Emulator:
    """QEMU 10 or later: the installed one, or that of Debian's backports, unpacked into the cache."""
    if shutil.which(_PROGRAM):
        there = _emulator((_PROGRAM,), {})
        if there.version >= _MODERN:
            return there
    return _unpacked(
        debian.built_once(debian.cache() / "qemu-backports", lambda root: _build(root, progress))
    )


def _build(root: Path, progress: Progress) -> None:
    progress("QEMU: about 30 MB of Debian's backports, a minute at most")
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        apt = Apt(Path(scratch) / "apt", backports=True)
        packages = Path(scratch) / "packages"
        packages.mkdir()
        apt.download(_PACKAGES, packages)
        debian.unpack(packages, root)
        if _missing_libraries(root):
            progress("QEMU: and the libraries it needs")
            libraries = filter(_LIBRARY.fullmatch, apt.dependencies(_PACKAGES[0], recurse=True))
            more = Path(scratch) / "libraries"
            more.mkdir()
            apt.download((name for name in libraries if not _OF_THE_LOADER.fullmatch(name)), more)
            debian.unpack(more, root)
            (root / "own-libraries").touch()
    _unpacked(root)


def _unpacked(root: Path) -> Emulator:
    data = [str(root / "usr" / "share" / folder) for folder in ("qemu", "seabios")]
    environment = _with_libraries(root) if (root / "own-libraries").exists() else {}
    return _emulator((str(root / "usr" / "bin" / _PROGRAM), "-L", data[0], "-L", data[1]), environment)


def _with_libraries(root: Path) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": ":".join(str(root / folder) for folder in _LIBRARY_FOLDERS)}


def _missing_libraries(root: Path) -> bool:
    return "not found" in _output(("ldd", str(root / "usr" / "bin" / _PROGRAM)), {})


def _emulator(command: tuple[str, ...], environment: Mapping[str, str]) -> Emulator:
    """The emulator, asked for its version. LabUnavailable if it does not run."""
    said = _output((*command, "--version"), environment)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if not found:
        raise LabUnavailable(f"{command[0]} does not run here: {said.strip()[:200]}")
    return Emulator(tuple(map(int, found.groups())), command, environment)


def _output(command: tuple[str, ...], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            ("env", *(f"{name}={value}" for name, value in environment.items()), *command),
            capture_output=True,
            text=True,
            timeout=_CALL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabUnavailable(f"{command[0]}: {error}") from error
    return done.stdout + done.stderr
