"""A recorded or invented peer: channels that say what is on a tape, and a daemon's services around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from migd.errors import PeerLost

P = ParamSpec("P")
T = TypeVar("T")


class PlayedChannel:
    """See ``migd.transport.channel.Channel``: says ``data``, then ends or is silent."""

    def __init__(self, data: bytes, ends: bool) -> None:
        self._left = memoryview(data)
        self._ends = ends
        self._closed = asyncio.Event()

    async def send(self, data: bytes | memoryview) -> None:
        self._check()

    async def receive_into(self, view: memoryview) -> int:
        await asyncio.sleep(0)
        self._check()
        if not self._left and not self._ends:
            await self._closed.wait()
            self._check()
        return self._take(view)

    def _take(self, view: memoryview) -> int:
        size = min(len(view), len(self._left))
        view[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._check()
        yield
        self._check()

    def send_now(self, data: bytes | memoryview) -> int:
        return len(data)

    def receive_now(self, view: memoryview) -> int | None:
        return None if not self._left and not self._ends else self._take(view)

    def close(self) -> None:
        self._closed.set()

    def _check(self) -> None:
        if self._closed.is_set():
            raise PeerLost("the connection was closed on this side")


class SameThread:
    """See ``migd.migration.ports.Worker``."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)


class GivenEntropy:
    """See ``migd.migration.ports.Entropy``: what the tape says was given out."""

    def __init__(self) -> None:
        self.given = b""

    def token(self, size: int) -> bytes:
        return self.given
