"""StateStream: QEMU's device state, out of one QEMU's `migrate` and into another's, over a socket of ours."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from migd.errors import GuestError
from migd.qemu.monitor import COMMAND_S, Event, Monitor

LOAD_S = 5.0

_POLL_S = 0.0005
_LOOK_S = 0.05
"""Without an event of its end. Asking more often would hold it up: QEMU answers between two devices."""
_ENDS = ("completed", "failed", "cancelled")
_NAME = "migd-state"
_BUFFER_BYTES = 1 << 20
"""Of the socket, or what its user may have: each side need not wait for the other to take a part."""
_READ_BYTES = 1 << 20
_MAX_BYTES = 1 << 30


class StateStream:
    """One end is ours until ``close``, the other QEMU's, by the name ``fd:migd-state``."""

    def __init__(self, monitor: Monitor, sock: socket.socket) -> None:
        self._monitor = monitor
        self._sock = sock

    @classmethod
    async def open(cls, monitor: Monitor) -> StateStream:
        """Before the guest is paused, since it takes half a millisecond."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        try:
            with theirs:
                await monitor.lend(_NAME, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return cls(monitor, ours)

    async def save(self) -> tuple[bytearray, int]:
        """The state of the stopped guest, and how many bytes of RAM QEMU has counted into it: 4 to 5 ms."""
        drained = asyncio.ensure_future(self._drained())
        try:
            with self._monitor.expecting("MIGRATION", *_ENDS) as over:
                await self._monitor.ask("migrate", {"uri": f"fd:{_NAME}"})
                info, run_state = await _completed(self._monitor, over, COMMAND_S)
            if run_state == "running":
                raise GuestError("somebody else has the guest run on in QEMU, which migd has stopped")
            return await drained, int(info.get("ram", {}).get("total", 0))
        finally:
            drained.cancel()
            await asyncio.wait({drained})

    async def await_state(self) -> None:
        """QEMU, started with ``-incoming defer``, begins to wait for a state."""
        await self._monitor.ask("migrate-incoming", {"uri": f"fd:{_NAME}"})

    async def load(self, state: memoryview) -> str:
        """QEMU's run state once it has taken it in. GuestError if it does not, or ends over it."""
        try:
            with self._monitor.expecting("MIGRATION", *_ENDS) as over:
                async with asyncio.timeout(LOAD_S):
                    await asyncio.get_running_loop().sock_sendall(self._sock, state)
                    self._sock.shutdown(socket.SHUT_WR)
                _, run_state = await _completed(self._monitor, over, LOAD_S)
            return run_state
        except (TimeoutError, OSError, GuestError) as error:
            raise GuestError(
                f"QEMU did not take the device state in ({error}): what it printed says why"
            ) from error

    def close(self) -> None:
        self._sock.close()

    async def _drained(self) -> bytearray:
        """All that QEMU writes until it closes its end. GuestError if it takes too long or is too much."""
        loop = asyncio.get_running_loop()
        state = bytearray()
        try:
            async with asyncio.timeout(COMMAND_S):
                while part := await loop.sock_recv(self._sock, _READ_BYTES):
                    state += part
                    if len(state) > _MAX_BYTES:
                        raise GuestError(f"QEMU's device state exceeds {_MAX_BYTES} bytes")
        except TimeoutError as error:
            raise GuestError(f"QEMU did not save its device state within {COMMAND_S:g} s") from error
        return state


async def _completed(
    monitor: Monitor, over: asyncio.Future[Event], timeout_s: float
) -> tuple[dict[str, Any], str]:
    """What QEMU says of its migration, of the device state, once that is over, and its run state then.

    GuestError if it failed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                await asyncio.wait({over}, timeout=_LOOK_S)
                info, status = await asyncio.gather(monitor.ask("query-migrate"), monitor.ask("query-status"))
                if info.get("status") == "completed":
                    return info, status["status"]
                if info.get("status") in ("failed", "cancelled"):
                    raise GuestError(f"QEMU: {info.get('error-desc') or info['status']}")
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise GuestError(f"QEMU is not done with the device state after {timeout_s:g} s") from error


async def cancelled(monitor: Monitor) -> None:
    """A migration of QEMU's own that was begun ends, so that the guest can go on."""
    if (await monitor.ask("query-migrate")).get("status") not in ("setup", "active", "device"):
        return
    await monitor.ask("migrate_cancel")
    try:
        async with asyncio.timeout(COMMAND_S):
            while (await monitor.ask("query-migrate")).get("status") != "cancelled":  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise GuestError("QEMU does not end its migration") from error
