"""Turns: tasks that wait until a policy grants what they asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Claims that are waited for; a claim is waited for by one task."""

    def __init__(self, give_up: Callable[[T], None]) -> None:
        """``give_up`` is told of a claim whose task was cancelled, be it granted meanwhile or not."""
        self._give_up = give_up
        self._waiting: dict[T, asyncio.Future[None]] = {}

    def grant(self, claims: Iterable[T]) -> None:
        """Wake those who wait for these. One that nobody waits for yet need not wait: see ``of``."""
        for claim in claims:
            future = self._waiting.get(claim)
            if future is not None and not future.done():
                future.set_result(None)

    async def of(self, claim: T) -> None:
        """Returns when the claim was granted by a later call of ``grant``."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[claim] = future
        try:
            await future
        except asyncio.CancelledError:
            self._give_up(claim)
            raise
        finally:
            del self._waiting[claim]
