"""Life: one daemon process from its start to its end, and the ports through which it can do anything at all.

``kill`` is kill -9: from then on every port raises ``Killed``, whatever the coroutines of that daemon still
do while they unwind. Descriptors and sockets that the process held are closed, as its kernel would.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from migd.errors import ResourceError
from migd.migration.journal import Journal, Mark, Record

P = ParamSpec("P")
T = TypeVar("T")

_REAPS = 400
"""Rounds of the loop in which all tasks of a killed daemon must have unwound."""


class Killed(BaseException):
    """The daemon that this code belongs to was killed. No ``except Exception`` of migd may stop it."""


_present: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


def enlist(task: asyncio.Task[Any]) -> None:
    """A new task belongs to the daemon in whose context it was created, if to any."""
    life = _present.get()
    if life is not None:
        life.tasks.append(task)


class Life:
    """``alive`` until ``kill`` or ``exit``. Whoever gives it something to hold says how to let go of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.killed = False
        self.tasks: list[asyncio.Task[Any]] = []
        self._held: list[Callable[[], object]] = []
        self._context = contextvars.copy_context()
        self._context.run(_present.set, self)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As a task of this daemon."""
        context = self._context.copy()
        return context.run(asyncio.get_running_loop().create_task, work)

    def hold(self, let_go: Callable[[], object]) -> None:
        """Called when the process is killed."""
        self._held.append(let_go)

    def check(self) -> None:
        """Every port, before it does anything, and before it gives an answer."""
        if not self.alive:
            raise Killed(self.name)

    def kill(self) -> None:
        """At once."""
        if not self.alive:
            return
        self.killed = True
        self.exit()
        self._reap(_REAPS)

    def exit(self) -> None:
        """The process is no more: its kernel closes what it held."""
        self.alive = False
        for let_go in reversed(self._held):
            let_go()
        self._held.clear()

    def _reap(self, rounds: int) -> None:
        left = [task for task in self.tasks if not task.done()]
        if not left:
            return
        assert rounds, f"{self.name} was killed, and this goes on: {left[0].get_coro()}"
        for task in left:
            task.cancel()
        asyncio.get_running_loop().call_soon(self._reap, rounds - 1)

    @property
    def unwound(self) -> bool:
        """Nothing of it is left."""
        return all(task.done() for task in self.tasks)


class VirtualClock:
    """See ``migd.migration.ports.Clock``."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        self._life.check()
        await asyncio.sleep(seconds)
        self._life.check()


class LaterWorker:
    """See ``migd.migration.ports.Worker``: a job runs whole, some time after it was asked for.

    What it works on may have changed by then, and its answer takes time, too: the guest writes in between.
    """

    def __init__(self, life: Life, dice: random.Random) -> None:
        self._life = life
        self._dice = dice
        self._loop = asyncio.get_running_loop()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like migd's own, a cancelled caller still waits for the job."""
        self._life.check()
        answer: asyncio.Future[T] = self._loop.create_future()
        self._loop.call_later(self._wait_s(), self._do, answer, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            await asyncio.wait({answer})
            if not answer.cancelled():
                answer.exception()
            raise

    def _wait_s(self) -> float:
        return self._dice.random() ** 4 * 5e-3

    def _do(self, answer: asyncio.Future[T], job: Callable[[], T]) -> None:
        if not self._life.alive:
            answer.cancel()
            return
        try:
            found = job()
        except Killed:
            answer.cancel()
        except Exception as error:  # noqa: BLE001  # the caller's
            self._loop.call_later(self._wait_s(), self._fail, answer, error)
        else:
            self._loop.call_later(self._wait_s(), self._answer, answer, found)

    def _answer(self, answer: asyncio.Future[T], found: T) -> None:
        if self._life.alive and not answer.done():
            answer.set_result(found)
        answer.cancel()

    def _fail(self, answer: asyncio.Future[T], error: Exception) -> None:
        if self._life.alive and not answer.done():
            answer.set_exception(error)
        answer.cancel()


class DiceEntropy:
    """See ``migd.migration.ports.Entropy``: the seed's."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def token(self, size: int) -> bytes:
        return self._dice.randbytes(size)


Moment = Callable[[str, Mark], str]
"""Asked "before" and "after" each append: what happens to it, "" for nothing, else "full" or "torn".

After half of a line was written it is asked with "torn"."""


class WatchedJournal(Journal):
    """The real journal, whose daemon may die before, in the middle of, or after a record."""

    def __init__(self, directory: Path, life: Life, moment: Moment) -> None:
        super().__init__(directory)
        self._life = life
        self._moment = moment
        self._place = directory

    def append(self, record: Record) -> None:
        self._life.check()
        match self._moment("before", record.mark):
            case "full":
                raise ResourceError(f"journal {self._place}: No space left on device")
            case "torn":
                self._tear(record)
                self._moment("torn", record.mark)
        self._life.check()
        super().append(record)
        self._moment("after", record.mark)
        self._life.check()

    def _tear(self, record: Record) -> None:
        """Half of the line reached the disk, and the process is no more."""
        path = self._place / f"{record.migration}.jsonl"
        with path.open("ab") as file:
            file.write(b'{"format":3,"migration":"' + record.migration[:12].encode())

    def records(self, migration: str) -> list[Record]:
        self._life.check()
        return super().records(migration)
