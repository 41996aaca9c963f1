"""HandOver: the destination's half of the decision who runs the guest, from READY on.

``go`` and ``abort`` exclude each other, durably: whichever is journalled first wins, and a later call gets
its answer (G2, G3). GO may come any number of times, over any connection, before or after a restart.
"""

from __future__ import annotations

import asyncio
import logging

from migd.errors import (
    GuestError,
    MigdError,
    PeerError,
    ProtocolError,
    ResourceError,
    VerificationError,
)
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Conversation, DestinationGuest, Observer, Passage, Worker
from migd.migration.state import DestinationState, Progress
from migd.wire import messages
from migd.wire.messages import Aborted, Started, Verdict

log = logging.getLogger(__name__)


class HandOver:
    """Owns the decision for one migration and, until it is taken, nothing of the guest runs."""

    def __init__(
        self,
        passage: Passage,
        guest: DestinationGuest,
        progress: Progress[DestinationState],
        journal: Journal,
        worker: Worker,
        limits: Limits,
        observer: Observer,
    ) -> None:
        self._passage = passage
        self._migration = passage.migration
        self._guest = guest
        self._progress = progress
        self._journal = journal
        self._worker = worker
        self._limits = limits
        self._observer = observer
        self._deciding = asyncio.Lock()
        self._starting: asyncio.Task[Started | Aborted] | None = None
        self._answer: Started | Aborted | None = None
        self._hearing: asyncio.Task[None] | None = None
        self.decided = asyncio.Event()
        self.settled = asyncio.Event()
        """The verdict was heard and acted on."""
        self.error = ""
        """Why the state is failed."""
        self.exit_code = 0

    async def ready(self) -> None:
        """The image is verified and loaded: durable, and GO may come."""
        await self._mark(Mark.READY)
        await self._enter(DestinationState.READY)

    async def go(self) -> Started | Aborted:
        """Start the guest, once. GuestError if it died after STARTED was journalled: then nobody knows.

        The connection that GO came over may break at any point of this; the next GO gets the same answer.
        """
        if self._starting is None or (self._starting.done() and self._answer is None):
            self._starting = asyncio.ensure_future(self._go())
        return await asyncio.shield(self._starting)

    async def _go(self) -> Started | Aborted:
        async with self._deciding:
            if self._answer is None:
                if self._progress.state is DestinationState.READY:
                    await self._mark(Mark.STARTED)
                    await self._enter(DestinationState.STARTING)
                elif self._progress.state is not DestinationState.STARTING:
                    raise GuestError("GO came before, and the guest ended before it was started")
                self._answer = await self._start()
                self.decided.set()
            return self._answer

    async def _start(self) -> Started:
        try:
            resumption = await self._guest.start()
        except GuestError as error:
            # Starting is idempotent: one that is only slow may be started by the next GO.
            if self._guest.gone:
                self._fail(error)
                await self._enter(DestinationState.FAILED)
            raise
        await self._enter(DestinationState.RUNNING)
        return Started(
            migration=self._migration,
            stopped_at_ns=resumption.stopped_at_ns,
            resumed_at_ns=resumption.resumed_at_ns,
        )

    async def abort(self, reason: str) -> None:
        """Never start this guest here; nothing if GO came first.

        Even where the journal cannot be written: after a restart READY without STARTED means the same.
        """
        async with self._deciding:
            if self._answer is not None or self._progress.state is not DestinationState.READY:
                return
            try:
                await self._mark(Mark.ABORTED, reason)
            except ResourceError as error:
                log.warning("%s: %s", self._migration, error)
            self._answer = Aborted(migration=self._migration, reason=reason[:1000])
            await self._guest.discard()
            await self._enter(DestinationState.ABORTED)
            self.decided.set()

    async def serve(self, conversation: Conversation) -> None:
        """Answer GO and hear the verdict over one connection. PeerError when it breaks or misbehaves."""
        while True:
            message = await conversation.next("GO", None)
            match message:
                case messages.Go():
                    await conversation.send(await self.answer_go())
                case Verdict():
                    await self._hear(message)
                    if message.ok:
                        await self._report_check(conversation)
                    return
                case _:
                    raise ProtocolError(f"{type(message).__name__} where GO or VERDICT was due")

    async def answer_go(self) -> messages.Message:
        """The answer to one GO: STARTED, ABORTED, or ABORT if the guest died between the two."""
        try:
            return await self.go()
        except MigdError as error:
            log.exception("%s: GO came and the guest could not be started", self._migration)
            return messages.Abort(migration=self._migration, reason=f"not started: {error}"[:1000])

    async def _hear(self, verdict: Verdict) -> None:
        """Act on it, once, even if its connection ends right behind it: it does after a bad one."""
        if self._progress.state is not DestinationState.RUNNING or self._hearing is not None:
            raise ProtocolError("a verdict before the guest was started, or a second one")
        self._hearing = asyncio.ensure_future(self._accept(verdict))
        await asyncio.shield(self._hearing)

    async def _accept(self, verdict: Verdict) -> None:
        """A bad verdict pauses the guest here; the operator decides (G4)."""
        if verdict.ok:
            log.info("%s: released by the source (%s)", self._migration, verdict.detail)
            self._guest.judged()
            await self._enter(DestinationState.COMPLETED)
        else:
            await self._condemn(verdict.detail)
        self.settled.set()

    async def _condemn(self, detail: str) -> None:
        bad = VerificationError(f"the source found untracked writes ({detail}): guest paused")
        log.error("%s: %s", self._migration, bad)
        self._fail(bad)
        try:
            await self._guest.pause(self._migration)
        except GuestError as error:  # gone, or silent: the order to pause is on its way
            log.error("%s: %s", self._migration, error)  # noqa: TRY400  # the reason is the message
        self._guest.judged()
        await self._enter(DestinationState.FAILED)

    def _fail(self, error: MigdError) -> None:
        self.error, self.exit_code = str(error), error.exit_code

    async def _report_check(self, conversation: Conversation) -> None:
        """The guest's own check, if it makes one, for the source's result."""
        try:
            async with asyncio.timeout(self._limits.check_s):
                check = await self._guest.self_check()
            checked = messages.Checked(
                migration=self._migration, pages=check.pages, wrong=check.wrong, first_wrong=check.first_wrong
            )
            await conversation.send(checked)
        except (TimeoutError, GuestError, PeerError) as error:
            log.info("%s: no self-check was reported: %s", self._migration, error)

    async def _enter(self, state: DestinationState) -> None:
        self._progress.enter(state)
        await self._observer.entered(self._passage, state)

    async def _mark(self, mark: Mark, detail: str = "") -> None:
        record = Record(migration=self._migration, mark=mark, guest=self._guest.name, detail=detail)
        await self._worker.run(self._journal.append, record)
