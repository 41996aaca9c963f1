"""Waiting for the whole of a guest's answer, which no session does: one goes on once it is ahead."""

from __future__ import annotations

import asyncio
import time

from migd.migration.ports import HintChannel

_BEYOND = 1 << 40
"""More pages than a guest has."""


async def complete(channel: HintChannel, epoch: int, timeout_s: float) -> bool:
    """Whether the answer to ``epoch`` is complete, waiting for it at most ``timeout_s``."""
    until = time.monotonic() + timeout_s
    while not channel.answered(epoch) and time.monotonic() < until:
        await channel.reached(epoch, _BEYOND, 0.005)
        await asyncio.sleep(0.001)
    return channel.answered(epoch)
