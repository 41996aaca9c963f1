"""The host's end of a lab guest: its command line, a QEMU that runs it, and questions to its workload."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from migd.errors import MigdError
from migd.lab.emulators import Emulator
from migd.lab.image import Image

MIB = 1 << 20

_SHARED_MEMORY = Path("/dev/shm")

_RESEND_S = 1.0
_POLL_S = 0.05
_END_S = 10.0
_LINE_LIMIT = 1 << 20
_TAIL_LINES = 12

_ONCE = frozenset({"hog"})
"""Requests that do more when they come twice, so they are sent once only, and may be lost."""


class LabError(MigdError):
    """The lab's guest ended, says that it failed, or says nothing."""


@dataclass(frozen=True)
class Recipe:
    """How a guest is run: everything of QEMU's command line that is no path of this one run."""

    emulator: Emulator
    image: Image
    machine: str = "pc"
    """pc or q35; with the version in it (pc-i440fx-7.2) where a guest moves between two versions of QEMU."""
    ram_bytes: int = 512 * MIB
    append: tuple[str, ...] = ()
    """More words for the kernel: migd.agent=off, migd.agent_args=A,B, init_on_free=1."""
    balloon: bool = False
    """With a virtio balloon that gives free-page hints to QEMU's own migration."""

    def argv(self, ram_path: str, qmp: str, hints: str, lab: str, console: str) -> list[str]:
        """The command line. Each path may be a placeholder for somebody else to fill in."""
        if self.ram_bytes % MIB:
            raise ValueError(f"{self.ram_bytes} bytes of RAM are not whole MiB")
        size = f"{self.ram_bytes // MIB}M"
        # On a busy host an emulated timer may tick too late for the kernel's test of it, which then panics.
        words = ("console=ttyS0", "panic=-1", "no_timer_check", *self.append)
        return [
            *self.emulator.command,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1", "-m", size),
            *("-object", f"memory-backend-file,id=ram,size={size},mem-path={_value(ram_path)},share=on"),
            *("-machine", f"{self.machine},memory-backend=ram,suppress-vmdesc=on"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", " ".join(words)),
            *("-device", "virtio-serial-pci,id=vs"),
            *_port(1, "hint", "org.migd.hints.0", hints),
            *_port(2, "lab", "org.migd.lab.0", lab),
            *(_BALLOON if self.balloon else ()),
            *("-serial", f"file:{_value(console)}"),
            *("-qmp", f"unix:{_value(qmp)},server=on,wait=off"),
        ]


_BALLOON = (
    *("-object", "iothread,id=balloon-thread"),
    *("-device", "virtio-balloon-pci,id=balloon,free-page-hint=on,iothread=balloon-thread"),
)


def _port(number: int, chardev: str, name: str, path: str) -> tuple[str, ...]:
    return (
        *("-chardev", f"socket,id={chardev},path={_value(path)},server=on,wait=off"),
        *("-device", f"virtserialport,bus=vs.0,nr={number},chardev={chardev},name={name}"),
    )


def _value(path: str) -> str:
    return path.replace(",", ",,")


class Workload:
    """The host's end of the lab port, at the Unix socket that QEMU made for it. To be closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._pending = b""
        self._id = secrets.randbits(40)  # unlike those of whoever asked before us

    def ask(self, do: str, timeout_s: float = 10.0, **arguments: object) -> dict[str, Any]:
        """The workload's answer, see ``migd/lab/workload.py``. LabError if it is no, or none comes in time.

        Repeated every second, as the guest may be moving; but not ``hog``, which would be done twice.
        """
        self._id += 1
        request = b"\n" + json.dumps({"id": self._id, "do": do, **arguments}).encode() + b"\n"
        now_s = time.monotonic()
        deadline_s = now_s + timeout_s
        send_s = now_s
        while now_s < deadline_s:
            try:
                if now_s >= send_s:
                    self._connected().sendall(request)
                    send_s = deadline_s if do in _ONCE else now_s + _RESEND_S
                answer = self._answer(min(deadline_s, send_s) - time.monotonic())
            except OSError:  # there is no QEMU yet, or no longer
                self.close()
                time.sleep(_POLL_S)
                answer = None
            if answer is not None:
                return _good(do, answer)
            now_s = time.monotonic()
        raise LabError(f"{self._path}: the guest's workload did not answer {do!r} within {timeout_s:g} s")

    def await_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the guest has booted, and its workload answers."""
        self.ask("ping", timeout_s)

    def close(self) -> None:
        if self._socket:
            self._socket.close()
        self._socket = None
        self._pending = b""

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(_RESEND_S)
            self._socket.connect(str(self._path))
        return self._socket

    def _answer(self, wait_s: float) -> dict[str, Any] | None:
        """The answer to the last request, or None if it does not come in time."""
        end_s = time.monotonic() + wait_s
        while (left_s := end_s - time.monotonic()) > 0:
            here = self._connected()
            here.settimeout(left_s)
            try:
                data = here.recv(1 << 16)
            except TimeoutError:
                return None
            finally:
                here.settimeout(_RESEND_S)
            if not data:
                raise ConnectionResetError(str(self._path))
            *lines, self._pending = (self._pending + data).split(b"\n")
            self._pending = self._pending[-_LINE_LIMIT:]
            for line in lines:
                if (answer := _parsed(line)).get("id") == self._id:
                    return answer
        return None

    def __enter__(self) -> Workload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parsed(line: bytes) -> dict[str, Any]:
    """The object on a line; nothing if it is the rest of one."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _good(do: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    if answer.get("ok") is not True:
        raise LabError(f"the guest's workload cannot {do}: {answer.get('error')}")
    return {name: value for name, value in answer.items() if name not in ("id", "ok")}


class Booted:
    """A guest that runs, with all its paths in one directory."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        """Starts it. It ends with us, even if we are killed."""
        self.ram_path, self.qmp, self.hints, self.lab, self.console = (
            directory / name for name in ("ram", "qmp", "hints", "lab", "console")
        )
        paths = map(str, (self.ram_path, self.qmp, self.hints, self.lab, self.console))
        self._errors = directory / "errors"
        environment = (f"{name}={value}" for name, value in recipe.emulator.environment.items())
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", "env", *environment, *recipe.argv(*paths)),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        self.workload = Workload(self.lab)

    @property
    def pid(self) -> int:
        """QEMU's, as setpriv and env become it."""
        return self._process.pid

    def await_ready(self, timeout_s: float = 60.0) -> None:
        """Returns when the workload answers. LabError, with the end of the console, if it does not."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                self.workload.await_ready(_RESEND_S)
                return
            except LabError as error:
                if self._process.poll() is not None:
                    raise LabError(f"QEMU ended with {self._process.returncode}:\n{self.tail()}") from error
                if time.monotonic() > deadline_s:
                    raise LabError(f"the guest is not ready after {timeout_s:g} s:\n{self.tail()}") from error

    def tail(self) -> str:
        """The last that QEMU and the guest's console said."""
        said = [path.read_text(errors="replace") for path in (self.console, self._errors) if path.exists()]
        return "\n".join("".join(said).splitlines()[-_TAIL_LINES:])

    def end(self) -> None:
        """Kills QEMU, and returns when it is gone."""
        self.workload.close()
        self._process.kill()
        self._process.wait(_END_S)


@contextmanager
def boot(recipe: Recipe) -> Iterator[Booted]:
    """A guest of that recipe, booting; at the end it is gone, with its RAM and all its files."""
    with tempfile.TemporaryDirectory(prefix="migd-lab-", dir=_SHARED_MEMORY) as directory:
        guest = Booted(recipe, Path(directory))
        try:
            yield guest
        finally:
            guest.end()
