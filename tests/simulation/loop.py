"""VirtualLoop: an asyncio event loop whose time is a number, which jumps to the next timer when all is done.

Nothing sleeps and no descriptor is watched. Tasks hash by their number, not by their address: asyncio keeps
them in sets, and in which order a group cancels its tasks would else differ from process to process.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike


class Stuck(AssertionError):
    """Everybody waits, and no timer is left: nothing would ever happen again."""


class Readable(Protocol):
    """An in-memory socket: it calls back when something has come."""

    def watch(self, callback: Callable[[], object] | None) -> None: ...


class _NoDescriptors(selectors.BaseSelector):
    """Instead of waiting, lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self._keys: dict[FileDescriptorLike, selectors.SelectorKey] = {}

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        key = selectors.SelectorKey(fileobj, number, events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("everybody waits for ever")
        self.now += max(0.0, timeout)
        return []

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._keys


class _Task(asyncio.Task[Any]):
    """A task that sets put where any other process would."""

    _made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _Task._made += 1
        self._number = _Task._made
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    """``created`` is told of every task, in the context that it will run in."""

    def __init__(self, created: Callable[[asyncio.Task[Any]], object] = lambda _task: None) -> None:
        self._jumping = _NoDescriptors()
        super().__init__(self._jumping)
        _Task._made = 0
        self._created = created
        self.set_task_factory(self._make)  # type: ignore[arg-type]  # typeshed lacks the context of 3.11

    def time(self) -> float:
        return self._jumping.now

    def _make(
        self,
        _loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any],
        *,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        context = contextvars.copy_context() if context is None else context
        task = _Task(work, loop=self, context=context)
        context.copy().run(self._created, task)
        return task

    def add_reader(  # type: ignore[override]  # no file descriptor
        self, fd: Any, callback: Callable[..., object], *args: Any
    ) -> None:
        """Only in-memory sockets are ever watched here."""
        context = contextvars.copy_context()
        fd.watch(lambda: self.call_soon(callback, *args, context=context))

    def remove_reader(self, fd: Any) -> bool:
        fd.watch(None)
        return True


@contextmanager
def virtual_loop(created: Callable[[asyncio.Task[Any]], object]) -> Iterator[VirtualLoop]:
    """One loop from its beginning to its end."""
    loop = VirtualLoop(created)
    asyncio.set_event_loop(loop)
    try:
        yield loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()
