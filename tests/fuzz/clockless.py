"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from tests.fuzz.target import Broken

T = TypeVar("T")

MOST_TIME_S = 3600.0
"""Every wait in migd is bounded (G6): nothing goes on for an hour."""


class _Jumping(selectors.EpollSelector):
    """Never waits: time that would be waited for has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise Broken("it waits for ever")
        if not ready and timeout:
            self.now_s += timeout
        return ready


class ClocklessLoop(asyncio.SelectorEventLoop):
    """``run`` any number of coroutines, one after the other."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """To its end, and to that of every task it left behind. Broken if something waits for ever."""
        began_s = self.time()
        try:
            return self.run_until_complete(story)
        finally:
            left = asyncio.all_tasks(self)
            for task in left:
                task.cancel()
            if left:
                self.run_until_complete(asyncio.wait(left))
            if self.time() - began_s > MOST_TIME_S:
                raise Broken(f"it waits for {self.time() - began_s:.0f} s")

    async def sleep(self, seconds: float) -> None:
        """See ``migd.migration.ports.Clock``."""
        await asyncio.sleep(seconds)

    def now(self) -> float:
        return self.time()
