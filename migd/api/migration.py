"""Migration: one migration as its caller holds it, while it runs and after."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from migd.control.commands import Accepted, Failed, Finished, Iterated, MigrationStatus, Moving, Reply
from migd.errors import MigdError, OutcomeUnknown, PeerLost, TimedOut, of_exit_code
from migd.migration.stats import Iteration, Result

WAIT_S = 600.0
"""For a migration: twice what one may take by default before its guest is paused."""


class Migration:
    """A migration that was begun. A thread listens to the daemon, so that every method is ready to answer.

    Every method may be called from any thread, also after the end. Dropping the object stops nothing.
    """

    id: str
    """32 hexadecimal digits."""

    def __init__(
        self,
        migration: str,
        replies: Iterator[Reply],
        status: Callable[[str], MigrationStatus],
        cancel: Callable[[str], str],
    ) -> None:
        """``replies`` that follow it, the rest of those to Migrate, or those to Attach."""
        self.id = migration
        self._status = status
        self._cancel = cancel
        self._replies = replies
        self._news = threading.Condition()
        self._iterations: list[Iteration] = []
        self._moving: Moving | None = None
        self._result: Result | None = None
        self._error: MigdError | None = None
        self._listener = threading.Thread(target=self._listen, name=f"migd-{self.id[:8]}", daemon=True)
        self._listener.start()

    def __repr__(self) -> str:
        return f"<migd.api.Migration {self.id}>"

    @property
    def done(self) -> bool:
        """Whether ``wait`` returns at once."""
        return self._result is not None or self._error is not None

    def wait(self, timeout_s: float = WAIT_S) -> Result:
        """Its result, whatever the outcome: ``Result.check`` raises if it is not what one hopes for.

        TimedOut if it is not over in time: it goes on. OutcomeUnknown if the daemon ended before it was over.
        """
        with self._news:
            if not self._news.wait_for(lambda: self.done, timeout_s):
                raise TimedOut(f"migration {self.id} was not over after {timeout_s:g} s; it goes on")
            if self._result is None:
                assert self._error is not None
                raise self._error
            return self._result

    def status(self) -> MigrationStatus:
        """Where it stands, as the daemon says now. MigdError if it does not know of it any more."""
        return self._status(self.id)

    def cancel(self) -> None:
        """Ask for its end; ``wait`` says what came of it. MigdError if it is too late."""
        self._cancel(self.id)

    def iterations(self) -> list[Iteration]:
        """Those that have ended, the bulk stage first."""
        with self._news:
            return list(self._result.iterations if self._result is not None else self._iterations)

    def follow(self, timeout_s: float = WAIT_S) -> Iterator[Moving | Iterated]:
        """Every iteration as it ends, and between them where the migration stands; ends with the migration.

        TimedOut and OutcomeUnknown as of ``wait``.
        """
        shown, last = 0, None
        deadline = time.monotonic() + timeout_s
        while True:
            with self._news:
                while not self.done and shown == len(self._iterations) and last is self._moving:
                    if not self._news.wait(deadline - time.monotonic()):
                        raise TimedOut(f"migration {self.id} was not over after {timeout_s:g} s; it goes on")
                iterations, moving, done = self._iterations[shown:], self._moving, self.done
            shown += len(iterations)
            yield from (Iterated(iteration=iteration) for iteration in iterations)
            if moving is not None and moving is not last:
                yield (last := moving)
            if done:
                self.wait(0)
                return

    def _listen(self) -> None:
        """The listener: takes the replies in until the last."""
        try:
            for reply in self._replies:
                self._take(reply)
            lost: MigdError | None = OutcomeUnknown(
                f"the daemon ended before migration {self.id} did; its guest's state is in `migd status` "
                "once a daemon is back"
            )
        except MigdError as error:
            lost = error
        with self._news:
            self._error = self._error or lost
            self._news.notify_all()

    def _take(self, reply: Reply) -> None:
        with self._news:
            match reply:
                case Moving():
                    self._moving = reply
                case Iterated(iteration=iteration):
                    self._iterations.append(iteration)
                case Finished(result=result):
                    self._result = result
                case Failed(error=text, exit_code=code):
                    self._error = of_exit_code(code, text)
                case _:
                    pass
            self._news.notify_all()


def accepted(reply: Reply | None) -> str:
    """The id of a migration that has begun, from the first reply to Migrate. MigdError if it has not."""
    match reply:
        case Accepted(migration=migration):
            return migration
        case Failed(error=text, exit_code=code):
            raise of_exit_code(code, text)
        case _:
            raise PeerLost(f"the daemon did not say whether it began the migration, but {reply!r}")
