"""Both sessions joined in one process, over real loopback sockets, around a guest that follows a script.

``ScriptedGuest`` has real RAM in a memfd, mapped and tracked by the kernel (userfaultfd) in this process: a
store through its mapping is logged, a pwrite through the descriptor is not. Its device state is what it knows
of its pages, so the guest that arrives (``ArrivedGuest``) checks its RAM against that and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np

from migd.destination.handover import HandOver
from migd.destination.reception import Reception
from migd.destination.session import DestinationServices, DestinationSession
from migd.errors import GuestError, LiveUnsupported
from migd.guest.hint_receiver import SocketHints
from migd.host import MonotonicClock, SystemEntropy, ThreadWorker
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.migration.journal import Journal
from migd.migration.ports import HintChannel, HintSink, Passage, PauseReport, Resumption, SelfCheck
from migd.migration.stats import Arrival, Iteration, Result
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.contract import FreeContract
from migd.ram.digest import frame_digest
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog, WriteProtection
from migd.ram.layout import RamLayout
from migd.source.attempt import Attempt, SourceOptions, SourceServices
from migd.source.peer import DestinationPeer
from migd.source.session import SourceSession
from migd.transport.bandwidth import MigrationBandwidth, SharedBandwidth
from migd.transport.in_flight import SharedRoom
from migd.transport.link import Dialogue
from migd.transport.tcp import Listener, TcpConnector
from migd.wire import handshake, messages

MIGRATION = "5e" * 16
PAGES = 512

Act = Callable[[], object]
_digests = msgspec.json.Decoder(dict[int, str])


class ScriptedHints:
    """A hint channel whose guest answers when the script says so."""

    rejected = 0
    distrusted = False
    answer_bytes = 0

    def __init__(self, contract: FreeContract) -> None:
        self._contract = contract
        self.on_request: Callable[[int, HintSink], object] = lambda _epoch, _sink: None
        self.epochs: list[int] = []
        self.done_count = 0

    async def declare(self, timeout_s: float) -> FreeContract:
        return self._contract

    async def request(self, epoch: int, sink: HintSink) -> None:
        self.epochs.append(epoch)
        self.on_request(epoch, sink)

    def reach(self, epoch: int) -> int:
        """The script has answered within the request."""
        return PAGES

    async def reached(self, epoch: int, page: int, timeout_s: float) -> None: ...

    def answered(self, epoch: int) -> bool:
        return bool(epoch)

    async def done(self) -> None:
        self.done_count += 1


class _ScriptedLog:
    """The kernel's log, with the script's turn before each harvest."""

    name = "userfaultfd"
    sees_writes = True
    cost_s = 0.0

    def __init__(self, log: KernelDirtyLog, before: Callable[[], None]) -> None:
        self._log = log
        self._before = before

    async def harvest(self) -> PageBitmap:
        self._before()
        return await self._log.harvest()

    def close(self) -> None:
        self._log.close()


class ScriptedGuest:
    """See ``migd.migration.ports.SourceGuest``. Page 0 to ``owned`` are its own from the beginning."""

    name = "scripted"

    def __init__(
        self, *, owned: int = 200, contract: FreeContract = FreeContract.ANYTHING, bitmap: bool = True
    ) -> None:
        block = RamBlock.create(BlockShape("ram", PAGES))
        self.ram = RamLayout([block])
        self._fd = block.fd
        self._mapping = mmap.mmap(block.fd, block.bytes)
        self._memory = np.frombuffer(self._mapping, np.uint8).reshape(PAGES, PAGE_BYTES)
        self._protection: WriteProtection | None = None
        self._bitmap = bitmap
        self.reports_free_at_pause = bitmap
        self.handover_s = 0.0
        self._random = np.random.default_rng(1)
        self.scripted_hints = ScriptedHints(contract)
        self.hints: HintChannel | None = self.scripted_hints
        self.knows: dict[int, str] = {}
        """The digest of each page it owns, taken from what it stored, never from RAM."""
        self.calls: list[str] = []
        self.at_harvest: dict[int, Act] = {}
        """What it does right before the n-th harvest; 1 is the one behind the bulk stage."""
        self.at_harvest_after_pause: dict[int, Act] = {}
        self._harvests = 0
        self.at_pause: Act = lambda: None
        self.can_arm = True
        self.awaits_verdict = False
        self.judgement: Callable[[], Awaitable[object]] = asyncio.Event().wait
        """Of the migration that it arrived by, if it awaits a verdict."""
        self._gone = asyncio.Event()
        self.write(*range(owned))

    # -- what the script lets it do -------------------------------------------------------------------

    def write(self, *pages: int) -> None:
        """Own these pages and store new content, as a guest does."""
        for page in pages:
            self.store(page, self._random.bytes(PAGE_BYTES))

    def store(self, page: int, content: bytes) -> None:
        """Own this page and store this content, which may be what is there already."""
        self.knows[page] = frame_digest(content).hex()
        self._memory[page] = np.frombuffer(content, np.uint8)

    def content(self, page: int) -> bytes:
        return bytes(self._memory[page])

    def touch(self, page: int) -> None:
        """Store what is there already."""
        self._memory[page] = self._memory[page].copy()

    def clear(self, page: int) -> None:
        """Own a page of zeros."""
        self.knows[page] = frame_digest(bytes(PAGE_BYTES)).hex()
        self._memory[page] = 0

    def free(self, *pages: int) -> None:
        """Own them no more; what they hold stays there."""
        for page in pages:
            del self.knows[page]

    def smuggle(self, page: int) -> None:
        """Change an owned page behind the log's back (W13)."""
        content = self._random.bytes(PAGE_BYTES)
        self.knows[page] = frame_digest(content).hex()
        os.pwrite(self._fd, content, page * PAGE_BYTES)

    def die(self) -> None:
        self._gone.set()

    @property
    def mapping(self) -> mmap.mmap:
        """Its RAM, through the mapping that it arms."""
        return self._mapping

    @property
    def free_pages(self) -> PageBitmap:
        return PageBitmap.full(PAGES) - PageBitmap.of(PAGES, self.knows)

    @property
    def running(self) -> bool:
        """Neither paused nor let go."""
        moves = [call for call in self.calls if call in ("pause", "resume", "release")]
        return not moves or moves[-1] == "resume"

    # -- SourceGuest ----------------------------------------------------------------------------------

    async def arm(self) -> _ScriptedLog:
        self.calls.append("arm")
        if not self.can_arm:
            raise LiveUnsupported("the kernel cannot track writes (the script says so)")
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._protection = WriteProtection([(address, len(self._mapping))])
        pagemap_fd = os.dup(self._protection.pagemap_fd)
        log = KernelDirtyLog(pagemap_fd, [ArmedRange(address, PAGES, 0)], PAGES)
        log.begin()
        return _ScriptedLog(log, self._before_harvest)

    def _before_harvest(self) -> None:
        paused = "pause" in self.calls
        script = self.at_harvest_after_pause if paused else self.at_harvest
        self._harvests += 1
        script.get(self._harvests, lambda: None)()

    async def disarm(self) -> None:
        self.calls.append("disarm")
        self._unprotect()

    async def verdict(self) -> None:
        self.calls.append("verdict")
        await self.judgement()

    async def pause(self, migration: str) -> PauseReport:
        self.at_pause()
        self.calls.append("pause")
        self._harvests = 0
        return PauseReport(msgspec.json.encode(self.knows), self.free_pages if self._bitmap else None)

    async def resume(self) -> None:
        self.calls.append("resume")

    async def release(self) -> None:
        self.calls.append("release")

    async def lost(self) -> None:
        await self._gone.wait()

    def _unprotect(self) -> None:
        if self._protection is not None:
            self._protection.close()
            self._protection = None

    def close(self) -> None:
        self._unprotect()
        if isinstance(self.hints, SocketHints):
            self.hints.close()
        self.ram.close()


class ArrivedGuest:
    """See ``migd.migration.ports.DestinationGuest``."""

    checks_itself = True

    def __init__(self, name: str, ram: RamLayout) -> None:
        self.name = name
        self.ram = ram
        self.knows: dict[int, str] = {}
        self.calls: list[str] = []
        self.judgements = 0
        self.pause_takes_s = 0.0
        self.check_takes_s = 0.0
        self._gone = asyncio.Event()

    async def attached(self) -> None:
        return

    async def load(self, device_state: bytes) -> None:
        self.calls.append("load")
        self.knows = _digests.decode(device_state)

    @property
    def gone(self) -> bool:
        return self._gone.is_set()

    async def start(self) -> Resumption:
        if self._gone.is_set():
            raise GuestError("the guest is gone")
        self.calls.append("start")
        return Resumption(1, 2)

    async def pause(self, migration: str) -> PauseReport:
        await asyncio.sleep(self.pause_takes_s)
        self.calls.append("pause")
        return PauseReport(b"", None)

    async def resume(self) -> None:
        if self._gone.is_set():
            raise GuestError("the guest is gone")
        self.calls.append("resume")

    def judged(self) -> None:
        self.judgements += 1

    async def self_check(self) -> SelfCheck:
        await asyncio.sleep(self.check_takes_s)
        wrong = [page for page, digest in self.knows.items() if frame_digest(self.page(page)).hex() != digest]
        return SelfCheck(len(self.knows), len(wrong), wrong[0] if wrong else -1)

    async def lost(self) -> None:
        await self._gone.wait()

    async def discard(self) -> None:
        self.calls.append("discard")

    def die(self) -> None:
        self._gone.set()

    def page(self, page: int) -> bytes:
        return bytes(self.ram.read(np.array([page]), np.empty((1, PAGE_BYTES), np.uint8)))

    @property
    def running(self) -> bool:
        return bool(self.calls) and self.calls[-1] in ("start", "resume")


class Host:
    """See ``migd.migration.ports.GuestHost``."""

    def __init__(self) -> None:
        self.guests: list[ArrivedGuest] = []

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> ArrivedGuest:
        guest = ArrivedGuest(name, RamLayout([RamBlock.create(shape) for shape in shapes]))
        self.guests.append(guest)
        return guest


class Observed:
    """An observer that lets the script act in a state, once for each time it is entered."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.calls: list[str] = []
        """Everything it was told, in order."""
        self.at: dict[str, Callable[[], object | Awaitable[object]]] = {}

    def began(self, passage: Passage) -> None:
        self.calls.append("began")

    def iterated(self, passage: Passage, iteration: Iteration) -> None:
        self.calls.append("iterated")

    async def finished(self, passage: Passage, record: Result | Arrival) -> None:
        self.calls.append("finished")

    async def entered(self, passage: Passage, state: str) -> None:
        self.states.append(state)
        self.calls.append(state)
        if state in self.at:
            result = self.at[state]()
            if isinstance(result, Awaitable):
                await result


class Joined:
    """A source and a destination, their journals, and one migration between them."""

    def __init__(self, guest: ScriptedGuest, directory: Path, limits: Limits) -> None:
        self.guest = guest
        self.limits = limits
        self.source_journal = directory / "source"
        self.destination_journal = directory / "destination"
        self.at_source = Observed()
        self.at_destination = Observed()
        self.host = Host()
        self.clock = MonotonicClock()
        self.worker = ThreadWorker(2)
        self.ledger: Ledger[PageBitmap] = Ledger(PAGES, PageBitmap)
        self.peer: DestinationPeer | None = None
        self.bandwidth: MigrationBandwidth | None = None
        self.session: SourceSession | None = None
        services = DestinationServices(
            clock=self.clock,
            worker=self.worker,
            entropy=SystemEntropy(),
            journal=Journal(self.destination_journal),
            limits=limits,
            guests=self.host,
            observer=self.at_destination,
            max_streams=8,
            room=SharedRoom(4).open,
        )
        self.reception = Reception(services, self._converse, self._revive, self._about)
        self.listener = Listener("127.0.0.1:0", self.reception.serve, limits)
        self.address = self.listener.address
        """Where the source connects to; whoever listens in puts itself between."""

    def _converse(self, link: object, migration: str) -> Dialogue:
        return Dialogue(link, migration, self.clock, self.limits)  # type: ignore[arg-type]

    async def _revive(self, migration: str) -> HandOver:
        raise GuestError(f"{migration}: nothing was here before")

    def _about(self, question: messages.Probe) -> messages.About:
        return handshake.about(question, realtime_ns=1, free_bytes=PAGES * PAGE_BYTES, max_streams=8)

    @property
    def arrived(self) -> ArrivedGuest:
        return self.host.guests[-1]

    @property
    def arrival(self) -> DestinationSession:
        return next(reversed(self.reception.sessions.values()))

    async def migrate(self, options: SourceOptions | None = None, migration: str = MIGRATION) -> Result:
        """Run both sides to their ends."""
        self.bandwidth = SharedBandwidth(0, self.clock).open()
        connector = TcpConnector(self.address, self.clock, self.limits, bandwidth=self.bandwidth)
        self.peer = DestinationPeer(connector, migration, self.clock, self.limits)
        services = SourceServices(
            self.clock,
            self.worker,
            Journal(self.source_journal),
            self.limits,
            self.at_source,
            SystemEntropy(),
            SharedRoom(2).open,
        )
        attempt = Attempt(migration, self.guest, self.ledger, self.peer, options or SourceOptions(), services)
        self.session = SourceSession(attempt)
        result = await self.session.run()
        if self.reception.sessions:
            async with asyncio.timeout(10):
                await self.arrival.over.wait()
        return result

    async def until(self, look: Callable[[], object], what: str) -> None:
        """Poll, bounded."""
        deadline = time.monotonic() + 10
        while not look():
            assert time.monotonic() < deadline, f"waited for {what}"
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.worker.close()
        self.guest.close()
        for guest in self.host.guests:
            guest.ram.close()


@contextlib.asynccontextmanager
async def joined(
    guest: ScriptedGuest, directory: Path, limits: Limits | None = None
) -> AsyncIterator[Joined]:
    """Both sides, listening; everything is closed in the end."""
    sides = Joined(guest, directory, limits or Limits(go_s=2.0, check_s=5.0))
    serving = asyncio.create_task(sides.listener.run())
    try:
        yield sides
    finally:
        serving.cancel()
        await asyncio.wait({serving})
        sides.close()
