"""Spawner: the processes of incoming guests, from a configured command or the stub kept in readiness."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from migd.guest.incoming import Assignment

_SPARE_AFTER_S = 2.0
"""From the use of a spare to the start of the next: its 0.1 s of processor shall not slow the migration."""

_EXIT_S = 2.0


class SpawnedProcess(subprocess.Popen[bytes]):
    """A process for an incoming guest, which leads a session, and so a process group, of its own."""

    def kill(self) -> None:
        """And whatever it has started: a QEMU, perhaps.

        The number of the group stays taken until the process is reaped.
        """
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class Spawner:
    """Starts a process for each incoming guest, in a session of its own: it outlives its daemon.

    Without a configured command that is the stub, and one is kept started, to be told later which guest it
    is: starting an interpreter costs as much as moving 50 MB.
    """

    def __init__(self, command: Sequence[str], guest_socket: Path, log_dir: Path) -> None:
        """``command``: argv with {socket}, {name} and {migration} to be replaced; empty for the stub."""
        self._command = command
        self._socket = guest_socket
        self._log_dir = log_dir
        self._spare: SpawnedProcess | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self) -> None:
        """Have a spare stub waiting. OSError if none can be started."""
        if not self._command and self._spare is None:
            self._spare = self._start_stub()

    def spawn(self, name: str, migration: str) -> SpawnedProcess:
        """A process that will attach as this guest. OSError if none can be started."""
        if self._command:
            return self._start_command(name, migration)
        if self._spare is not None and self._spare.poll() is not None:
            self._end_spare()  # whoever killed it shall not have cost anybody a migration
        process, self._spare = self._spare or self._start_stub(), None
        assignment = Assignment(name=name, migration=migration, log=str(self._log(name)))
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write(msgspec.json.encode(assignment) + b"\n")
        except OSError:
            process.kill()
            process.wait()
            raise
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SPARE_AFTER_S, self._replenish)
        return process

    def _replenish(self) -> None:
        self._timer = None
        try:
            self.prepare()
        except OSError:  # the next guest's own start will say why
            return

    def _log(self, name: str) -> Path:
        return self._log_dir / f"guest-{name}.log"

    def _start_stub(self) -> SpawnedProcess:
        return SpawnedProcess(
            [sys.executable, "-m", "migd.guest.incoming", str(self._socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _start_command(self, name: str, migration: str) -> SpawnedProcess:
        command = [
            word.replace("{socket}", str(self._socket))
            .replace("{name}", name)
            .replace("{migration}", migration)
            for word in self._command
        ]
        with self._log(name).open("ab") as output:
            return SpawnedProcess(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def close(self) -> None:
        """The spare ends; guests that were spawned go on."""
        if self._timer is not None:
            self._timer.cancel()
        self._end_spare()

    def _end_spare(self) -> None:
        if self._spare is not None and self._spare.stdin is not None:
            self._spare.stdin.close()
            self._spare.kill()
            self._spare.wait(_EXIT_S)
            self._spare = None
