"""StartedQemu: the process of a QEMU that we have started, from its first sign of life to its end."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence

from migd.errors import GuestError
from migd.guest.control import Block
from migd.qemu.launch import Launch
from migd.qemu.monitor import Monitor
from migd.tasks import guarded

_ANSWER_S = 8.0
"""For a QEMU that was just started: it takes 0.1 to 0.3 s."""

_LOOK_S = 0.05
_END_S = 1.0


class StartedQemu:
    """A child of ours. It survives our end, unless ``end`` sees to its own."""

    def __init__(self, launch: Launch, blocks: Sequence[Block], fds: Sequence[int]) -> None:
        """Start it on RAM that is in ``fds``, which stay the caller's. ConfigError for a wrong command."""
        self._launch = launch
        self._process, self.untracked = launch.start(blocks, fds)
        """``untracked``: why the kernel does not log its writes, if so."""

    async def monitor(self) -> Monitor:
        """Once it answers. GuestError, with QEMU's own last words, if it ends instead."""
        return await guarded(Monitor.connect(self._launch.qmp, _ANSWER_S, retry=True), self._ends())

    async def _ends(self) -> None:
        while self._process.poll() is None:  # noqa: ASYNC110  # a child has no event
            await asyncio.sleep(_LOOK_S)
        raise self._launch.died(self._process)

    async def failure(self, patience_s: float = _END_S) -> GuestError | None:
        """Why it ended with an error, if it does within that time."""
        try:
            code = await asyncio.to_thread(self._process.wait, patience_s)
        except subprocess.TimeoutExpired:
            return None
        return self._launch.died(self._process) if code else None

    def terminate(self) -> None:
        """Where there is no monitor to ask it to quit."""
        self._process.terminate()

    async def end(self) -> None:
        """It was asked to quit; it ends in any case, and what it leaves goes with it, unless it failed."""
        try:
            await asyncio.to_thread(self._process.wait, _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if not self._process.returncode:
            self._launch.clear()

    def let_go(self) -> str:
        """It goes on without us: how somebody may stand beside it again."""
        self._process.returncode = 0  # no warning from Popen's destructor: this is on purpose
        return f"QEMU (pid {self._process.pid}) goes on: migd qemu --qmp {self._launch.qmp}"
