"""Monitor: one QMP connection to a QEMU, every command bounded in time and every failure a GuestError."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient, QMPError, Runstate
from qemu.qmp.message import Message
from qemu.qmp.qmp_client import ExecuteError

from migd.errors import GuestError

COMMAND_S = 2.0
"""For one command: QEMU answers within a millisecond unless its main loop is held up."""

_RETRY_S = 0.02
_UCRED = struct.Struct("3i")

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it logs is raised, too


class CommandRefused(GuestError):
    """QEMU understood a command and declined it; the message has its reason."""


@dataclass(frozen=True)
class Event:
    """What QEMU said unasked."""

    name: str
    status: str
    """Of the data that came with it; most have none."""
    at_ns: int
    """By QEMU's clock (realtime)."""


class Monitor:
    """Owns the connection until ``close``."""

    def __init__(self, client: QMPClient, path: Path, sock: socket.socket, listener_pid: int) -> None:
        """``sock`` is another descriptor of the client's own, for what the loop's transports cannot send."""
        self.path = path
        self._sock = sock
        self.listener_pid = listener_pid
        """Who made the socket: the QEMU, or what started it with a socket of its own (libvirt)."""
        self._client = client
        self._expected: dict[asyncio.Future[Event], tuple[str, tuple[str, ...]]] = {}
        self._dispatching = asyncio.ensure_future(self._dispatch())

    @classmethod
    async def connect(cls, path: Path, timeout_s: float, *, retry: bool = False) -> Monitor:
        """GuestError if nobody answers there; with ``retry`` not before the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    client, sock = QMPClient(path.name), socket.socket(socket.AF_UNIX)
                    try:
                        sock.connect(str(path))
                        pid, _, _ = _UCRED.unpack(
                            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
                        )
                        sock.setblocking(False)
                        await client.connect(sock)
                        return cls(client, path, sock.dup(), pid)
                    except (QMPError, OSError) as error:
                        sock.close()
                        reason = error.__cause__ or error
                        if not retry:
                            raise GuestError(f"{path}: no QMP there: {reason}") from error
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError as error:
            busy = "; a monitor socket serves one client at a time, give migd one of its own"
            raise GuestError(f"{path}: no QMP greeting within {timeout_s:g} s{busy}") from error

    async def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What QEMU returns. CommandRefused with its words; GuestError if it is silent or gone."""
        try:
            async with asyncio.timeout(COMMAND_S):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandRefused(f"QEMU refused {command}: {error}") from error
        except TimeoutError as error:
            raise GuestError(f"QEMU did not answer {command} within {COMMAND_S:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise GuestError(f"QEMU is gone: {command} was not answered") from error

    async def lend(self, name: str, fd: int) -> None:
        """Hand QEMU a descriptor that ``fd:NAME`` then means to it; ours stays open."""
        try:
            socket.send_fds(self._sock, [b" "], [fd])
        except OSError as error:
            raise GuestError(f"QEMU takes no descriptor: {error}") from error
        await self.ask("getfd", {"fdname": name})

    @contextmanager
    def expecting(self, name: str, *statuses: str) -> Iterator[asyncio.Future[Event]]:
        """The next event of this name, with one of these statuses if any are given; never, if none comes.

        It is sent before the answer to the command that caused it, but taken in beside it.
        """
        event: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._expected[event] = (name, statuses)
        try:
            yield event
        finally:
            del self._expected[event]
            event.cancel()

    async def ended(self) -> None:
        """Returns when QEMU has closed the connection."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Give the connection up; QEMU goes on."""
        self._dispatching.cancel()
        self._sock.close()
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(COMMAND_S):
                await self._client.disconnect()

    async def _dispatch(self) -> None:
        while True:
            event = _event(await self._client.events.get())
            for expected, (name, statuses) in self._expected.items():
                if name == event.name and (not statuses or event.status in statuses) and not expected.done():
                    expected.set_result(event)


def _event(message: Message) -> Event:
    at, data = message["timestamp"], message.get("data", {})
    assert isinstance(at, dict)
    assert isinstance(data, dict)
    at_ns = at["seconds"] * 10**9 + at["microseconds"] * 1000
    return Event(str(message["event"]), str(data.get("status", "")), at_ns)
