"""DestinationSession: one migration at its destination, from HELLO to the verdict.

Ownership: until READY everything made for the migration (RAM, guest process) goes when it fails; from READY
on ``HandOver`` decides, and a guest that was started stays, whatever becomes of the connection.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from migd.destination.handover import HandOver
from migd.destination.loader import Loader
from migd.destination.stream import Stream
from migd.errors import GuestError, MigdError, OutcomeUnknown, PeerError, PeerLost, ProtocolError
from migd.limits import Limits
from migd.migration.bandwidth import Unlimited
from migd.migration.journal import Journal
from migd.migration.ports import (
    Bandwidth,
    Clock,
    Conversation,
    DestinationGuest,
    Entropy,
    GuestHost,
    Link,
    Observer,
    Passage,
    Room,
    Worker,
)
from migd.migration.state import DestinationState, destination_progress
from migd.migration.stats import Arrival
from migd.ram.block import PAGE_BYTES, BlockShape
from migd.ram.digest import frame_digest
from migd.tasks import Runner, guarded, together
from migd.wire import handshake, messages
from migd.wire.framing import Frame
from migd.wire.messages import Hello
from migd.wire.protocol import MAX_PAGES_PER_FRAME, TOKEN_BYTES, FrameType

log = logging.getLogger(__name__)

_STATE_FLOOR_BYTES = 64 << 20
_STATE_RAM_SHARE = 128
"""Device state may have 64 MiB plus 1/128 of RAM: the stub's journal has 16 bytes a page, 1/256."""

_FAREWELL_S = 1.0

_OUTCOMES = {
    DestinationState.RUNNING: "completed",
    DestinationState.COMPLETED: "completed",
    DestinationState.ABORTED: "aborted",
    DestinationState.FAILED: "failed",
}

_RUNS_HERE = frozenset({DestinationState.STARTING, DestinationState.RUNNING, DestinationState.COMPLETED})

_SHUTDOWN = MigdError("the destination daemon is shutting down")


@dataclass(frozen=True)
class DestinationServices:
    """What the daemon plugs in."""

    clock: Clock
    worker: Worker
    entropy: Entropy
    journal: Journal
    limits: Limits
    guests: GuestHost
    observer: Observer
    max_streams: int
    room: Callable[[], Room]
    """For the frames of one migration in flight."""
    bandwidth: Callable[[], Bandwidth] = Unlimited
    """At which one migration is taken in."""


class DestinationSession:
    """Receives one guest. ``run`` once; data streams join by ``join``."""

    def __init__(self, hello: Hello, conversation: Conversation, services: DestinationServices) -> None:
        self.hello = hello
        self.migration = hello.migration
        self.passage = Passage(hello.migration, hello.guest, "in", hello.software)
        self.token = services.entropy.token(TOKEN_BYTES)
        self._conversation = conversation
        self._services = services
        self._limits = services.limits
        self._progress = destination_progress()
        self._began_s = services.clock.now()
        self._moved_s: float | None = None
        self._links: dict[int, Link] = {}
        self._bandwidth = services.bandwidth()
        self._room = services.room()
        self._joined = asyncio.Event()
        self._barrier = asyncio.Barrier(hello.streams)
        self._writing = threading.Lock()
        self._guest: DestinationGuest | None = None
        self._task: asyncio.Task[None] | None = None
        self.handover: HandOver | None = None
        self.over = asyncio.Event()
        self._error = ""

    @property
    def state(self) -> DestinationState:
        return self._progress.state

    @property
    def path(self) -> list[DestinationState]:
        return self._progress.path

    @property
    def ended(self) -> bool:
        """The guest runs here for good, or never will."""
        return self._progress.ended

    @property
    def undecided(self) -> bool:
        """Whether it may still be that the guest never runs here, or is certain by now."""
        return self.state not in _RUNS_HERE

    @property
    def moving_s(self) -> float:
        """From HELLO until the guest was started, or the attempt was over, or until now."""
        if self._moved_s is not None:
            return self._moved_s
        return self._services.clock.now() - self._began_s

    @property
    def placed_bytes(self) -> int:
        """Of RAM, by records of any kind; a page that came twice counts twice."""
        return self._conversation.applied_bytes

    @property
    def error(self) -> str:
        """What went wrong; empty while nothing has."""
        return self._error or (self.handover.error if self.handover is not None else "")

    @property
    def record(self) -> Arrival:
        """What happened; complete once the session has ended."""
        return Arrival(
            migration=self.migration,
            guest=self.hello.guest,
            peer=self.hello.software,
            outcome=_OUTCOMES.get(self.state, "unknown"),
            error=self.error,
            exit_code=self._exit_code(),
            total_s=self.moving_s,
            ram_pages=sum(block.pages for block in self.hello.blocks),
            placed_bytes=self.placed_bytes,
            states=[str(state) for state in self.path],
        )

    def _exit_code(self) -> int:
        if self.state in (DestinationState.RUNNING, DestinationState.COMPLETED):
            return 0
        if self.state is DestinationState.FAILED and self.handover is not None:
            return self.handover.exit_code
        return MigdError.exit_code if self.ended else OutcomeUnknown.exit_code

    def balance_pages(self) -> tuple[int, int]:
        """(pages settled by records so far, or all once the guest was started; all pages)."""
        pages = sum(block.pages for block in self.hello.blocks)
        if self.state in (DestinationState.RUNNING, DestinationState.COMPLETED):
            return (pages, pages)
        return (min(pages, self._conversation.applied_bytes // PAGE_BYTES), pages)

    @property
    def guest(self) -> DestinationGuest:
        assert self._guest is not None
        return self._guest

    def join(self, stream: messages.Stream, link: Link) -> None:
        """A data stream with the right token. ProtocolError if it is out of range, twice, or late."""
        if self.state is not DestinationState.PREPARING or stream.index >= self.hello.streams:
            raise ProtocolError(f"stream {stream.index} is not expected")
        if stream.index in self._links:
            raise ProtocolError(f"stream {stream.index} is connected already")
        self._links[stream.index] = link
        if len(self._links) == self.hello.streams:
            self._joined.set()

    async def run(self) -> None:
        """All of it; logs how it ended, raises only CancelledError."""
        self._task = asyncio.current_task()
        self._services.observer.began(self.passage)
        runner = Runner(self._conversation.run())
        try:
            await guarded(self._until_ready(), runner.failure())
        except MigdError as error:
            await self._give_up(error)
        except asyncio.CancelledError:
            await self._give_up(_SHUTDOWN)
            raise
        except Exception as error:  # our own bug must not leave half a guest behind
            log.exception("%s: unexpected failure in %s", self.migration, self.state)
            await self._give_up(MigdError(f"unexpected {type(error).__name__}: {error}"))
        else:
            await self._decide(runner)
        finally:
            await runner.stop()
            self._conversation.close()
            self._bandwidth.close()
            self._room.close()
            await self._services.observer.finished(self.passage, self.record)
            self.over.set()

    async def stop(self) -> None:
        """The daemon ends: before GO the attempt ends with it, and a guest that was started stays."""
        if self._task is not None and not self.over.is_set():
            self._task.cancel()
            await self.over.wait()

    async def _enter(self, state: DestinationState) -> None:
        self._progress.enter(state)
        log.debug("%s: %s", self.migration, state)
        await self._services.observer.entered(self.passage, state)

    async def _until_ready(self) -> None:
        await self._prepare()
        await guarded(self._receive(), self._guest_lost())

    @property
    def _frame_pages(self) -> int:
        """As large as one may be that comes often enough, if the bandwidth stays as it is."""
        pages = self._bandwidth.frame_bytes / self.hello.streams / PAGE_BYTES
        return int(min(MAX_PAGES_PER_FRAME, max(1, pages)))

    async def _guest_lost(self) -> None:
        await self.guest.lost()
        raise GuestError(f"the guest process spawned for {self.hello.guest} ended")

    async def _prepare(self) -> None:
        """Fresh RAM and a guest process; every stream connected. Refused reaches the source as REFUSE."""
        await self._services.observer.entered(self.passage, self.state)
        accept = handshake.accept(self.hello, self.token, self._services.max_streams, self._frame_pages)
        shapes = tuple(BlockShape(block.name, block.pages) for block in self.hello.blocks)
        self._guest = self._services.guests.create(self.hello.guest, self.migration, shapes)
        await self._conversation.send(accept)
        try:
            async with asyncio.timeout(self._limits.begin_s):
                await self._joined.wait()
        except TimeoutError as error:
            missing = sorted(set(range(self.hello.streams)) - set(self._links))
            raise PeerLost(f"streams {missing} did not connect within {self._limits.begin_s:g} s") from error
        await self._enter(DestinationState.RECEIVING)
        await self._conversation.send(messages.Begin(migration=self.migration))

    async def _receive(self) -> None:
        """Pages on every stream, device state on the control connection, then verify and load."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._await_guest())
            for link in self._links.values():
                tasks.create_task(self._receive_stream(link))
            state = await self._receive_state()
        await self._enter(DestinationState.LOADING)
        services = self._services
        handover = HandOver(
            self.passage,
            self.guest,
            self._progress,
            services.journal,
            services.worker,
            services.limits,
            services.observer,
        )
        # Both are due before READY is sent. The record alone promises nothing (migd/migration/decision.py).
        await together(self.guest.load(state), handover.write_ready())
        await handover.ready()
        self.handover = handover

    async def _await_guest(self) -> None:
        """Its process starts while memory arrives; the source does not pause the guest before."""
        await self.guest.attached()
        await self._conversation.send(messages.Prepared(migration=self.migration))

    async def _receive_stream(self, link: Link) -> None:
        """One stream to its END. EOF before END is an error (R16); barriers hold all streams (R9)."""
        stream = Stream(
            link,
            Loader(self.guest.ram, self._writing),
            self._services.worker,
            self._room.slot(),
            self._bandwidth,
            self.hello.streams,
            self._limits,
            self._count_applied,
        )
        while True:
            frame = await stream.next()
            if frame.type is FrameType.BARRIER:
                self._own(frame.message())
                await self._barrier.wait()
            elif frame.type is FrameType.END:
                said = self._own(frame.message())
                if said != (counted := link.received.end(self.migration)):
                    raise ProtocolError(f"END does not match what arrived: {said}, {counted}")
                return
            else:
                raise ProtocolError(f"{frame.type.name} on a data stream")

    def _count_applied(self, placed_bytes: int) -> None:
        self._conversation.applied_bytes += placed_bytes

    def _own(self, message: messages.Message) -> messages.Message:
        if message.migration != self.migration:
            raise ProtocolError(f"a message of another migration ({message.migration})")
        return message

    async def _receive_state(self) -> bytes:
        """Device state up to FINISH, within its limit and with the announced size and digest."""
        limit = _STATE_FLOOR_BYTES + self.guest.ram.bytes // _STATE_RAM_SHARE
        state = bytearray()
        while True:
            found = await self._conversation.next("STATE", None)
            if isinstance(found, Frame):
                await self._bandwidth.take(len(found.metadata))
                state += found.metadata
                if len(state) > limit:
                    raise ProtocolError(f"more than {limit} bytes of device state")
            elif isinstance(found, messages.Finish):
                if (found.state_bytes, found.state_digest) != (len(state), frame_digest(state)):
                    raise ProtocolError("the device state arrived damaged")
                return bytes(state)
            else:
                raise ProtocolError(f"{type(found).__name__} where STATE or FINISH was due")

    # -- after READY --------------------------------------------------------------------------------

    async def _decide(self, runner: Runner) -> None:
        """GO within ``go_s``, over this connection or, if it is lost, over another; else ABORTED."""
        assert self.handover is not None
        handover = self.handover
        serving = Runner(guarded(handover.serve(self._conversation), runner.failure()))
        try:
            async with asyncio.timeout(self._limits.go_s):
                await self._conversation.send(messages.Ready(migration=self.migration))
                await guarded(_wait(handover.decided), self._aborted_by_peer(serving), self._dead())
        except TimeoutError:
            await self._give_up(MigdError(f"no GO within {self._limits.go_s:g} s"))
        except MigdError as error:
            await self._give_up(error)
        except asyncio.CancelledError:
            await self._give_up(_SHUTDOWN)
            raise
        else:
            self._moved_s = self.moving_s
            await self._until_settled(handover, serving)
        finally:
            await serving.stop()

    async def _aborted_by_peer(self, serving: Runner) -> None:
        """Raises if the source aborted; a lost connection is no reason yet, GO may come over another."""
        try:
            await serving.failure()
        except PeerLost:
            log.warning("%s: connection lost after READY, waiting for GO over another", self.migration)
        await asyncio.Event().wait()

    async def _dead(self) -> None:
        await self.guest.lost()
        raise GuestError("the guest process ended before GO")

    async def _until_settled(self, handover: HandOver, serving: Runner) -> None:
        """The guest runs here: hear the verdict, report the guest's check, over whichever connection."""
        try:
            async with asyncio.timeout(self._limits.verdict_s):
                await handover.settled.wait()
            async with asyncio.timeout(self._limits.check_s):
                await serving.failure()
        except (PeerError, TimeoutError) as error:
            log.debug("%s: the connection is over: %s", self.migration, error)
        await handover.unheard()

    async def _give_up(self, error: MigdError) -> None:
        """Before READY nothing stays but the source's guest; from READY on ``HandOver`` has the say."""
        self._error = str(error)
        self._moved_s = self.moving_s
        log.warning("%s: gave up in %s: %s", self.migration, self.state, error)
        word = messages.Refuse if self._guest is None else messages.Abort
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._conversation.send(word(migration=self.migration, reason=str(error)[:1000]))
        except (PeerError, TimeoutError):
            log.debug("%s: the source does not hear of it", self.migration)
        if self.handover is not None:
            await self.handover.abort(str(error))
            return
        if self._guest is not None:
            await self._guest.discard()
        await self._enter(DestinationState.ABORTED)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
