"""Structured concurrency for the two roles: work that is watched, and runners that outlive their watchers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from migd.errors import first_cause

T = TypeVar("T")


async def guarded(work: Coroutine[Any, Any, T], *guards: Coroutine[Any, Any, None]) -> T:
    """The result of ``work``; a guard that fails first cancels the work, and its error is raised.

    Guards are cancelled when the work is done, however it ended; all are awaited. Errors come out bare, not
    in a group: the one that happened first.
    """
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            watchers = [group.create_task(guard) for guard in guards]
            task.add_done_callback(lambda _: [watcher.cancel() for watcher in watchers])
    except BaseExceptionGroup as error:
        raise first_cause(error) from error
    return task.result()


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all, in order. The first that fails cancels the others; its error comes out bare."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as error:
        raise first_cause(error) from error
    return [task.result() for task in tasks]


class Runner:
    """A background coroutine with an owner: it runs until it fails or is stopped."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.ensure_future(work)

    async def failure(self) -> None:
        """Returns when the work returned; raises what it raised. Cancelling this leaves the work alone."""
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            error = self._task.exception()
            if error is not None:
                raise first_cause(error)

    async def stop(self) -> None:
        """Cancel the work and wait for its end; its errors were for ``failure``."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()
