"""Launch: starting a QEMU from a command line with placeholders, on RAM that a daemon made.

The same words serve at a guest's first host and at every later one: migd adds the monitor and, for a guest
that arrives, ``-incoming defer -S``. The RAM has no name: QEMU gets it as an open descriptor, which the
memory backend takes as ``mem-path={ram}``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from migd.errors import ConfigError, GuestError
from migd.guest.control import Block
from migd.qemu import preload
from migd.ram.page import PAGE_BYTES

PLACEHOLDERS = {
    "{name}": "the guest's name",
    "{ram}": "path of its RAM, for mem-path=; of several blocks {ram:ID}, ID being the backend's",
    "{ram_bytes}": "size of its RAM, for -m and size=, with the suffix B; of several blocks {ram_bytes:ID}",
    "{dir}": "a directory for the sockets of this QEMU",
    "{hints}": "path of the socket for the port org.migd.hints.0",
}
"""What may stand in a command line."""

_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True)
class Launch:
    """A QEMU to be started; ``directory`` takes its sockets and its log."""

    name: str
    command: tuple[str, ...]
    directory: Path
    incoming: bool

    @property
    def qmp(self) -> Path:
        return self.directory / "qmp"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def argv(self, blocks: Sequence[Block], fds: Sequence[int]) -> list[str]:
        """ConfigError if the command has no place for the RAM."""
        words = {"{name}": self.name, "{dir}": str(self.directory), "{hints}": str(self.directory / "hints")}
        for block, fd in zip(blocks, fds, strict=True):
            path, size = f"/proc/self/fd/{fd}", f"{block.pages * PAGE_BYTES}B"
            words |= {f"{{ram:{block.name}}}": path, f"{{ram_bytes:{block.name}}}": size}
            if len(blocks) == 1:
                words |= {"{ram}": path, "{ram_bytes}": size}
        filled = [_filled(word, words) for word in self.command]
        if len(str(self.qmp)) > _SOCKET_PATH_BYTES:
            raise ConfigError(f"{self.qmp}: too long for a socket; choose a shorter daemon.runtime_dir")
        if not any("/proc/self/fd/" in word for word in filled):
            raise ConfigError("the QEMU command has no {ram}: -object memory-backend-file,...,mem-path={ram}")
        more = ["-incoming", "defer", "-S"] if self.incoming else []
        return [*filled, "-qmp", f"unix:{self.qmp},server=on,wait=off", *more]

    def start(self, blocks: Sequence[Block], fds: Sequence[int]) -> tuple[subprocess.Popen[bytes], str]:
        """The process, which maps RAM as it is in ``fds``, and why its writes are not tracked, if so.

        ConfigError for a command that cannot be started.
        """
        argv = self.argv(blocks, fds)
        self.clear()
        try:
            self.directory.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise ConfigError(f"{self.directory}: {error.strerror}") from error
        environment, untracked = dict(os.environ), ""
        try:
            environment = preload.environment(os.environ, [os.readlink(f"/proc/self/fd/{fd}") for fd in fds])
        except preload.PreloadUnavailable as error:
            untracked = str(error)
        try:
            with self.log.open("wb") as log:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=tuple(fds),
                    env=environment,
                )
        except OSError as error:
            raise ConfigError(f"{argv[0]}: {error.strerror or error}") from error
        return process, untracked

    def clear(self) -> None:
        """Sockets and log of a QEMU that has ended as it should, or of a predecessor, are of no more use."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def died(self, process: subprocess.Popen[bytes]) -> GuestError:
        """Why QEMU ended, as far as its last line tells."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        return GuestError(f"QEMU ended with code {process.poll()}: {last} (all of it in {self.log})")


def _filled(word: str, words: dict[str, str]) -> str:
    for placeholder, value in words.items():
        word = word.replace(placeholder, value)
    return word
