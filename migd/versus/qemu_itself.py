"""A guest moved by QEMU's own migration: default, multifd, or with free-page hints through the balloon."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

from migd.errors import GuestError
from migd.qemu.monitor import Monitor
from migd.qemu.settings import Settings
from migd.versus.cases import Contender, Measured
from migd.versus.venue import Venue

_CONNECT_S = 10.0
_MIGRATE_S = 120.0
_POLL_S = 0.002
_CHANNELS = 2
"""As many as migd has streams."""
_UNCAPPED_BYTES_S = 1 << 40

_EVENT_S = 5.0


def move(venue: Venue, contender: Contender) -> Measured:
    """GuestError if it fails."""
    return asyncio.run(_move(venue, contender))


async def _move(venue: Venue, contender: Contender) -> Measured:
    source = await _attach(venue.source.qmp, contender)
    destination = await _attach(venue.destination.qmp, contender)
    try:
        uri = f"tcp:127.0.0.1:{_free_port()}"
        await destination.ask("migrate-incoming", {"uri": uri})
        began, began_ns = time.perf_counter(), time.time_ns()
        with source.expecting("STOP") as stopped, destination.expecting("RESUME") as resumed:
            await source.ask("migrate", {"uri": uri})
            info = await _completed(source)
            async with asyncio.timeout(_EVENT_S):
                await _paused(destination)
                await destination.ask("cont")  # as -S demands
                stopped_ns, resumed_ns = (await stopped).at_ns, (await resumed).at_ns
        total_s = time.perf_counter() - began
    finally:
        for monitor in (source, destination):
            await monitor.close()
    return Measured(
        total_s=total_s,
        downtime_s=(resumed_ns - stopped_ns) / 1e9,
        wire_bytes=info["ram"]["transferred"],
        started_s=(resumed_ns - began_ns) / 1e9,
        detail=f"QEMU counts {info['total-time']} ms, downtime {info['downtime']} ms",
    )


async def _attach(path: Path, contender: Contender) -> Monitor:
    monitor = await Monitor.connect(path, _CONNECT_S, retry=True)
    settings = await Settings.of(monitor)
    multifd = contender is Contender.MULTIFD
    capabilities = {
        name: name == "events" or (name == "multifd" and multifd) for name in settings.capabilities
    }
    await Settings(capabilities, _UNCAPPED_BYTES_S, "").apply(monitor)
    if multifd:
        await monitor.ask("migrate-set-parameters", {"multifd-channels": _CHANNELS})
    return monitor


async def _completed(monitor: Monitor) -> dict[str, Any]:
    async with asyncio.timeout(_MIGRATE_S):
        while (info := await monitor.ask("query-migrate")).get("status") != "completed":
            if info.get("status") in ("failed", "cancelled"):
                raise GuestError(f"QEMU's own migration {info['status']}: {info.get('error-desc', '')}")
            await asyncio.sleep(_POLL_S)
    return dict(info)


async def _paused(monitor: Monitor) -> None:
    while (await monitor.ask("query-status"))["status"] == "inmigrate":  # noqa: ASYNC110  # only QEMU knows
        await asyncio.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
