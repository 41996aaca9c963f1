"""Sites of real guests: a daemon each, on this host, that starts QEMUs with Linux in them and can be held."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from migd.lab.debian import LabUnavailable
from migd.lab.emulators import Emulator, emulators
from migd.lab.image import image
from migd.lab.workbench import MIB, Recipe
from migd.qemu import preload
from migd.qemu.monitor import Monitor
from migd.ram import linux
from tests.support.pair import ROOT, DaemonProcess, eventually, processes_naming

WAIT_S = 120.0
"""No assertion is about time: this only ends a test that hangs, on a machine that has more to do."""

PATIENT = {
    **dict.fromkeys(("hello_s", "begin_s", "ready_s", "progress_s", "dead_s", "go_s", "hint_window_s"), 60.0),
    "guest_s": 30.0,
    "hint_first_s": 5.0,
}
"""Nothing ends by itself while a test holds it, and hints are waited for: they come in milliseconds, unless
this machine is busy."""

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Lab:
    """What real guests are made of, on this host."""

    emulators: tuple[Emulator, ...]
    """Oldest first; at least one."""

    @property
    def oldest(self) -> Emulator:
        return self.emulators[0]

    @property
    def newest(self) -> Emulator:
        return self.emulators[-1]

    @staticmethod
    @functools.cache
    def found() -> Lab:
        """LabUnavailable, with the reason, where real guests cannot run, or their writes not be tracked."""
        image()
        try:
            os.close(linux.userfaultfd())
        except OSError as error:
            raise LabUnavailable(f"this kernel tracks no writes: {error.strerror}") from error
        try:
            preload.library()
        except preload.PreloadUnavailable as error:
            raise LabUnavailable(str(error)) from error
        return Lab(tuple(emulators()))

    def recipe(self, emulator: Emulator | None = None, **changes: Any) -> Recipe:
        """A small guest; see ``Recipe``."""
        return replace(Recipe(emulator or self.newest, image(), ram_bytes=256 * MIB), **changes)


class Site:
    """A host: a daemon of both roles that can be held, and a directory whose files are its guests' RAM."""

    def __init__(self, *, memfd: bool = False, **limits: float) -> None:
        """``limits``: others than ``PATIENT`` ones. ``memfd``: RAM without a name, as by default."""
        self.place = Path(tempfile.mkdtemp(prefix="mv-", dir=_SHARED_MEMORY))
        self.ram = self.place / "ram"
        self.ram.mkdir()
        command = ["/bin/sh", f"{self.place}/arrive-{{name}}", "{migration}", "{socket}"]
        self.daemon = DaemonProcess(
            "serve",
            f"[daemon]\nram = {json.dumps('memfd' if memfd else str(self.ram))}\n"
            f'[destination]\nlisten = "127.0.0.1:0"\nguest_command = {json.dumps(command)}\n'
            + "\n".join(["[limits]", *(f"{key} = {value}" for key, value in {**PATIENT, **limits}.items())]),
            held=True,
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        return self.daemon.address

    def directory(self, name: str) -> Path:
        """Of the sockets of this guest's QEMU."""
        return self.daemon.directory / f"qemu-{name}"

    def console(self, name: str) -> Path:
        """What the guest's console has said since its QEMU was started here."""
        return self.place / f"console-{name}"

    def command(self, name: str, recipe: Recipe) -> list[str]:
        """QEMU's words, with the placeholders of `migd qemu`."""
        variables = [f"{key}={value}" for key, value in recipe.emulator.environment.items()]
        argv = recipe.argv("{ram}", "{dir}/watch", "{hints}", "{dir}/lab", str(self.console(name)))
        return [*(["env", *variables] if variables else []), *argv]

    def prepare(self, name: str, recipe: Recipe) -> None:
        """How QEMU is started here when this guest arrives."""
        words = [sys.executable, "-m", "migd", "qemu", "--name", name]
        command = shlex.join(self.command(name, recipe))
        arrive = f'exec {shlex.join(words)} --incoming "$1" --socket "$2" -- {command}\n'
        (self.place / f"arrive-{name}").write_text(arrive)

    def stand_beside(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """A companion, on its way: `migd qemu` with these options."""
        socket_path = str(self.daemon.directory / "guest.sock")
        command = [sys.executable, "-m", "migd", "qemu", "--name", name, "--socket", socket_path, *options]
        with (self.daemon.directory / f"companion-{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        self._processes.append(process)
        return process

    def start_qemu(self, name: str, recipe: Recipe, *more: str, tracked: bool = True) -> Path:
        """A QEMU of our own, for a companion to find; its monitor. It ends with us, even if we are killed."""
        directory = self.directory(name)
        directory.mkdir(mode=0o700, exist_ok=True)
        ram = self.ram / f"own-{name}"
        argv = recipe.argv(
            str(ram), *(f"{directory}/{each}" for each in ("watch", "hints", "lab", "console"))
        )
        environment = {**os.environ, **recipe.emulator.environment}
        if tracked:
            environment = preload.environment(environment, [ram])
        monitor = directory / "qmp"
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    *argv,
                    "-qmp",
                    f"unix:{monitor},server=on,wait=off",
                    *more,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        self._processes.append(process)
        eventually(monitor.exists, "QEMU's monitor", WAIT_S, why=(directory / "log").read_text)
        return monitor

    def qemu(self, name: str) -> int | None:
        """The pid of this guest's QEMU, if there is one here."""
        found = [
            pid for pid in processes_naming(f"{self.directory(name)}/") if "qemu-system" in _program(pid)
        ]
        assert len(found) <= 1, f"QEMUs of {name}: {found}"
        return found[0] if found else None

    def companion(self, name: str) -> int:
        """The pid of the `migd qemu` that stands beside this guest here."""
        (found,) = processes_naming("migd", f"{self.daemon.directory}/guest.sock", f"\0{name}\0")
        return found

    def open_ram(self, name: str, ram_bytes: int) -> int:
        """A descriptor of this guest's RAM, by what its QEMU has open; the caller's to close."""
        pid = self.qemu(name)
        assert pid is not None, f"no QEMU of {name}"
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry)
            if (str(self.ram) in target or "/memfd:migd-ram" in target) and entry.stat().st_size == ram_bytes:
                return os.open(entry, os.O_RDONLY)
        raise AssertionError(f"QEMU {pid} has no RAM open")

    def ask_qemu(self, name: str, command: str, **arguments: object) -> Any:
        """Past migd: by QEMU's second monitor."""

        async def ask() -> Any:
            monitor = await Monitor.connect(self.directory(name) / "watch", WAIT_S, retry=True)
            try:
                return await monitor.ask(command, arguments or None)
            finally:
                await monitor.close()

        return asyncio.run(ask())

    def runs(self, name: str) -> bool:
        """Whether this guest's processor runs here, by QEMU's own word; False if there is no QEMU."""
        return self.qemu(name) is not None and self.ask_qemu(name, "query-status")["running"]

    def said(self, name: str) -> str:
        """Everything about this guest: for the message of a test that failed."""
        directory = self.daemon.directory
        paths = [directory / f"companion-{name}.log", directory / f"guest-{name}.log"]
        paths += [self.directory(name) / "log", self.console(name)]
        found = [
            f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths if path.exists()
        ]
        return "\n".join([*found, f"-- daemon\n{self.daemon.log[-4000:]}"])

    def close(self) -> None:
        """Everything that is left here ends."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.daemon.close()
        shutil.rmtree(self.place)


def _program(pid: int) -> str:
    """What a process runs; nothing if it has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""
