"""HandOver: the destination's half of the decision who runs the guest, from READY on.

``go``, ``abort`` and the operator's ``resolve`` exclude each other, durably: whichever is journalled first
wins, and a later call gets its answer (G2, G3). GO may come any number of times, over any connection, before
or after a restart; so may the verdict.
"""

from __future__ import annotations

import asyncio
import logging

from migd.errors import (
    GuestError,
    MigdError,
    PeerError,
    ProtocolError,
    Refused,
    ResourceError,
    VerificationError,
)
from migd.limits import Limits
from migd.migration.decision import Arrived, Asked, go_at_destination, paused_at_destination
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Conversation, LoadedGuest, Observer, Passage, SelfCheck, Worker
from migd.migration.state import DestinationState, Progress
from migd.tasks import Runner
from migd.wire import messages
from migd.wire.messages import Aborted, Started, Verdict
from migd.wire.protocol import Keeper

log = logging.getLogger(__name__)

_NO_CHECK = SelfCheck(pages=0, wrong=0, first_wrong=-1)
"""The source shall not wait for what will not come."""


class HandOver:
    """Owns the decision for one migration and, until it is taken, nothing of the guest runs."""

    def __init__(
        self,
        passage: Passage,
        guest: LoadedGuest,
        progress: Progress[DestinationState],
        journal: Journal,
        worker: Worker,
        limits: Limits,
        observer: Observer,
        last: Record | None = None,
    ) -> None:
        """``last``: of the journal, if a daemon before this one has written there."""
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
        self._condemned = False
        """A bad verdict was heard, whether it could be acted upon or not."""
        self.last = last
        """The newest record in the journal."""
        self.decided = asyncio.Event()
        self.settled = asyncio.Event()
        """The verdict was heard and acted on."""
        self.error = ""
        """Why the state is failed."""
        self.exit_code = 0

    @property
    def mark(self) -> Mark | None:
        """Of the newest record."""
        return self.last.mark if self.last is not None else None

    @property
    def gone(self) -> bool:
        """The guest's process has ended; or only its connection, and it comes back over another."""
        return self._guest.gone

    async def write_ready(self) -> None:
        """The image is verified: durable before ``ready``, and void if that never comes."""
        await self._mark(Mark.READY)

    async def ready(self) -> None:
        """It is loaded, too: GO may come."""
        await self._enter(DestinationState.READY)

    # -- GO -----------------------------------------------------------------------------------------

    async def go(self) -> Started | Aborted:
        """Start the guest, once. GuestError if it died after STARTED was journalled: then nobody knows.

        The connection that GO came over may break at any point of this; the next GO gets the same answer.
        """
        if self._starting is None or self._starting.done():
            self._starting = asyncio.ensure_future(self._go())
            self._starting.add_done_callback(_told)
        return await asyncio.shield(self._starting)

    async def _go(self) -> Started | Aborted:
        async with self._deciding:
            if self._answer is None:
                self._answer = await self._decide()
                self.decided.set()
            return self._answer

    async def _decide(self) -> Started | Aborted:
        match self.mark:
            case Mark.READY:
                await self._mark(Mark.STARTED)
                await self._enter(DestinationState.STARTING)
                return await self._start()
            case Mark.STARTED:
                return await self._start()
            case Mark.VERIFIED | Mark.CONDEMNED:
                return Started(migration=self._migration, stopped_at_ns=0, resumed_at_ns=0)
            case Mark.ABORTED:
                assert self.last is not None
                return Aborted(migration=self._migration, reason=self.last.detail)
        raise GuestError(f"GO came, and the journal says {self.mark}")

    async def _start(self) -> Started:
        if self._guest.gone and self._progress.ended:
            raise GuestError("GO came before, and the guest ended before it was started")
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
            await self._give_up(reason)

    async def _give_up(self, reason: str) -> Aborted:
        """ABORTED is durable: whatever is left of the guest here goes."""
        self._answer = Aborted(migration=self._migration, reason=reason[:1000])
        await self._guest.discard()
        if self._progress.state is DestinationState.READY:
            await self._enter(DestinationState.ABORTED)
        elif not self._progress.ended:
            self._fail(GuestError(reason))
            await self._enter(DestinationState.FAILED)
        self.decided.set()
        self.settled.set()
        return self._answer

    # -- what the source says -----------------------------------------------------------------------

    async def serve(self, conversation: Conversation) -> None:
        """Answer over one connection until it breaks or misbehaves: PeerError."""
        check: Runner | None = None
        try:
            while True:
                message = await conversation.next("GO", None)
                match message:
                    case messages.Go() | messages.Resolve():
                        await conversation.send(await self.answer(message))
                    case Verdict():
                        await self._hear(message, conversation)
                        if message.ok and check is None:
                            check = Runner(self._report_check(conversation))
                    case _:
                        raise ProtocolError(f"{type(message).__name__} where GO or VERDICT was due")
        finally:
            if check is not None:
                await check.stop()

    async def answer(self, question: messages.Go | messages.Resolve) -> messages.Message:
        """What is true after it; REFUSE what is not for the operator, ABORT what cannot be done."""
        try:
            if isinstance(question, messages.Resolve):
                return await self.resolve(question.keeper, question.detail)
            return await self.go()
        except Refused as error:
            return messages.Refuse(migration=self._migration, reason=str(error)[:1000])
        except MigdError as error:
            log.exception("%s: %s came, and cannot be done", self._migration, type(question).__name__.upper())
            word = "not started" if isinstance(question, messages.Go) else "not resolved"
            return messages.Abort(migration=self._migration, reason=f"{word}: {error}"[:1000])

    async def _hear(self, verdict: Verdict, conversation: Conversation) -> None:
        """Act on it, even if its connection ends right behind it. PeerError, and said, if that fails."""
        self._hearing = asyncio.ensure_future(self._accept(verdict, after=self._hearing))
        try:
            await asyncio.shield(self._hearing)
        except Refused as error:
            await conversation.send(messages.Refuse(migration=self._migration, reason=str(error)[:1000]))
            raise
        except (GuestError, ResourceError) as error:
            log.exception("%s: the verdict (%s) cannot be acted upon", self._migration, verdict.detail)
            await conversation.send(messages.Abort(migration=self._migration, reason=str(error)[:1000]))
            raise PeerError(f"a verdict that could not be acted upon: {error}") from error

    async def _accept(self, verdict: Verdict, after: asyncio.Task[None] | None) -> None:
        """One after the other; the same one again changes nothing."""
        if after is not None:
            await asyncio.wait({after})
        async with self._deciding:
            match self.mark, verdict.ok:
                case Mark.STARTED, True if not self._condemned:
                    await self._release(verdict.detail)
                case Mark.STARTED, False:
                    await self._condemn(verdict.detail)
                case (Mark.VERIFIED, True) | (Mark.CONDEMNED, False):
                    log.info("%s: the verdict (%s) came again", self._migration, verdict.detail)
                case ((Mark.STARTED | Mark.CONDEMNED), True):
                    raise Refused(f"guest {self._guest.name} is paused here by a bad verdict")
                case Mark.VERIFIED, False:
                    raise Refused(f"guest {self._guest.name} runs on here, as was decided after that verdict")
                case _:
                    raise ProtocolError("a verdict before the guest was started")
        self.settled.set()

    async def _release(self, detail: str) -> None:
        log.info("%s: released by the source (%s)", self._migration, detail)
        self._guest.judged()
        if self._progress.state is DestinationState.RUNNING:
            await self._enter(DestinationState.COMPLETED)
        try:
            await self._mark(Mark.VERIFIED, detail)
        except (
            ResourceError
        ) as error:  # after a restart it waits for a verdict once more, no longer than verdict_s
            log.warning("%s: %s", self._migration, error)

    async def _condemn(self, detail: str) -> None:
        """A bad verdict pauses the guest here; the operator decides (G4).

        GuestError if it does not pause, ResourceError if that is not durable: then the source tells it again.
        """
        self._condemned = True
        bad = VerificationError(f"the source found untracked writes ({detail}): guest paused")
        log.error("%s: %s", self._migration, bad)
        self._fail(bad)
        try:
            await self._guest.pause(self._migration)
        except GuestError as error:
            if not self._guest.gone:
                raise
            log.error("%s: %s", self._migration, error)  # noqa: TRY400  # the reason is the message
        await self._mark(Mark.CONDEMNED, detail)
        self._guest.judged()
        if not self._progress.ended:
            await self._enter(DestinationState.FAILED)

    async def unheard(self) -> None:
        """No verdict was acted upon within ``verdict_s``: the guest is here for good, unless it was bad."""
        async with self._deciding:
            if self._progress.state is not DestinationState.RUNNING:
                return
            if self._condemned:
                await self._enter(DestinationState.FAILED)
                return
            log.warning("%s: the guest runs here, but no verdict came", self._migration)
            self._guest.judged()
            await self._enter(DestinationState.COMPLETED)

    async def _report_check(self, conversation: Conversation) -> None:
        """The guest's own check, if it makes one, for the source's result; of no page if it never does."""
        try:
            async with asyncio.timeout(self._limits.check_s):
                check = await self._guest.self_check() if self._guest.checks_itself else _NO_CHECK
            checked = messages.Checked(
                migration=self._migration, pages=check.pages, wrong=check.wrong, first_wrong=check.first_wrong
            )
            await conversation.send(checked)
        except (TimeoutError, GuestError, PeerError) as error:
            log.info("%s: no self-check was reported: %s", self._migration, error)

    # -- what the operator, or a restart, finds -----------------------------------------------------

    async def found_paused(self) -> Arrived:
        """After a restart, by the journal: what was done. ResourceError if it cannot be written."""
        async with self._deciding:
            assert self.mark is not None
            decision = paused_at_destination(self.mark)
            match decision:
                case Arrived.CONDEMN:
                    self._condemned = True
                    await self._mark(Mark.CONDEMNED, "found paused after a restart")
                case Arrived.RESUME:
                    await self._guest.resume()
                case Arrived.DISCARD:
                    await self._guest.discard()
                case Arrived.KEEP:
                    pass
            return decision

    async def resolve(self, keeper: Keeper, detail: str) -> Started | Aborted:
        """The operator's word, durable before it is done. Refused, with the reason, where nothing is open."""
        async with self._deciding:
            if keeper is Keeper.SOURCE:
                return await self._to_source(detail)
            return await self._stays(detail)

    async def _to_source(self, detail: str) -> Aborted:
        name = self._guest.name
        match self.mark:
            case Mark.READY | Mark.CONDEMNED:
                pass
            case Mark.STARTED if self._guest.gone:
                pass
            case Mark.ABORTED:
                assert self.last is not None
                return Aborted(migration=self._migration, reason=self.last.detail)
            case _:
                raise Refused(
                    f"guest {name} was started here and is not paused: the source cannot have it back"
                )
        reason = f"given up, {detail}"
        await self._mark(Mark.ABORTED, reason[:1000])
        log.warning("%s: guest %s is given up: %s", self._migration, name, detail)
        return await self._give_up(reason)

    async def _stays(self, detail: str) -> Started:
        name = self._guest.name
        if go_at_destination(self.mark) is not Asked.STARTED:
            raise Refused(f"guest {name} was never started here: only the source can run it")
        if self._guest.gone and self.mark is not Mark.VERIFIED:
            raise Refused(f"the process of guest {name} is gone here: only the source can run it")
        if self.mark is not Mark.VERIFIED:
            await self._mark(Mark.VERIFIED, detail)
            log.warning("%s: guest %s runs on here: %s", self._migration, name, detail)
            self.error = f"{self.error}; then it ran on, {detail}" if self.error else ""
        if not self._guest.gone:
            await self._guest.resume()
        self._condemned = False
        self._guest.judged()
        if self._progress.state is DestinationState.RUNNING:
            await self._enter(DestinationState.COMPLETED)
        self.settled.set()
        answer = Started(migration=self._migration, stopped_at_ns=0, resumed_at_ns=0)
        self._answer = self._answer or answer
        return answer

    def _fail(self, error: MigdError) -> None:
        self.error, self.exit_code = str(error), error.exit_code

    async def _enter(self, state: DestinationState) -> None:
        self._progress.enter(state)
        await self._observer.entered(self._passage, state)

    async def _mark(self, mark: Mark, detail: str = "") -> None:
        record = Record(migration=self._migration, mark=mark, guest=self._guest.name, detail=detail)
        await self._worker.run(self._journal.append, record)
        self.last = record


def _told(starting: asyncio.Task[Started | Aborted]) -> None:
    """Whoever sent GO may be gone by the time that it fails; the next GO asks again."""
    if not starting.cancelled():
        starting.exception()
