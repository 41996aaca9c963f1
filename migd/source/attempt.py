"""Attempt: what the parts of one source migration share: what was asked, what was plugged in, the result."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from migd.errors import MigdError
from migd.ledger.ledger import Ledger
from migd.limits import Limits
from migd.migration.convergence import Policy
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Clock, Entropy, Observer, Passage, Room, SourceGuest, Worker
from migd.migration.state import SourceState, source_progress
from migd.migration.stats import Iteration, Result
from migd.ram.bitmap import PageBitmap
from migd.source.peer import DestinationPeer

log = logging.getLogger(__name__)


class Verify(StrEnum):
    """When the source compares its RAM with what it last sent."""

    AUTO = "auto"
    """Strict while the estimated cost fits the downtime limit, else late."""
    STRICT = "strict"
    LATE = "late"
    OFF = "off"


class Compression(StrEnum):
    AUTO = "auto"
    """Decided for each chunk: lz4 where the link is slower than compressing."""
    LZ4 = "lz4"
    NONE = "none"


class DirtyLogChoice(StrEnum):
    """How writes of a running guest are found."""

    AUTO = "auto"
    """The kernel's log where the guest can arm it, else by comparing content."""
    USERFAULTFD = "userfaultfd"
    COMPARE = "compare"


@dataclass(frozen=True)
class SourceOptions:
    """What the operator asked for."""

    streams: int = 2
    live: bool = True
    hints: bool = True
    verify: Verify = Verify.AUTO
    compression: Compression = Compression.AUTO
    dirty_log: DirtyLogChoice = DirtyLogChoice.AUTO
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class SourceServices:
    """What the daemon plugs in."""

    clock: Clock
    worker: Worker
    journal: Journal
    limits: Limits
    observer: Observer
    entropy: Entropy
    room: Callable[[], Room]
    """For the frames of one migration in flight."""


class Attempt:
    """One migration of one guest to one peer; whoever holds it may move its state and add to its result."""

    def __init__(
        self,
        migration: str,
        guest: SourceGuest,
        ledger: Ledger[PageBitmap],
        peer: DestinationPeer,
        options: SourceOptions,
        services: SourceServices,
    ) -> None:
        self.migration = migration
        self.guest = guest
        self.ledger = ledger
        self.peer = peer
        self.options = options
        self.policy = options.policy
        """Replaced as a whole when an operator changes it; each decision looks at it anew."""
        self.clock = services.clock
        self.worker = services.worker
        self.limits = services.limits
        self.observer = services.observer
        self.entropy = services.entropy
        self.room = services.room()
        self.iterations: list[Iteration] = []
        """Those that are over."""
        self.passage = Passage(migration, guest.name, "out", peer.address)
        self.progress = source_progress(waiting=guest.awaits_verdict)
        self.began_s = services.clock.now()
        self.journal = services.journal
        self.result = Result(
            migration=migration,
            guest=guest.name,
            peer=peer.address,
            live=options.live,
            streams=options.streams,
            ram_pages=guest.ram.pages,
            hints="off" if not options.hints else "none yet",
        )

    @property
    def state(self) -> SourceState:
        return self.progress.state

    @property
    def elapsed_s(self) -> float:
        """Since the request was accepted."""
        return self.clock.now() - self.began_s

    async def enter(self, state: SourceState) -> None:
        """Move on, and let the observer look before anything is done there."""
        self.progress.enter(state)
        log.debug("%s: %s", self.migration, state)
        await self.observer.entered(self.passage, state)

    def iterated(self, iteration: Iteration) -> None:
        """Its figures are final: the line in the log, and the observer's."""
        self.iterations.append(iteration)
        log.info("%s: %s", self.migration, iteration)
        self.observer.iterated(self.passage, iteration)

    def fail(self, error: MigdError, outcome: str) -> None:
        """The result says what went wrong, and what became of the migration."""
        self.result.outcome = outcome
        self.result.error = str(error)
        self.result.exit_code = error.exit_code

    def record(self, mark: Mark, detail: str = "") -> Record:
        """For the journal."""
        return Record(
            migration=self.migration,
            mark=mark,
            guest=self.guest.name,
            peer=self.peer.address,
            detail=detail[:1000],
        )

    async def mark(self, mark: Mark, detail: str = "") -> None:
        """Durable when this returns. While the journal holds no GO the guest is ours."""
        await self.worker.run(self.journal.append, self.record(mark, detail))

    async def note(self, mark: Mark, detail: str = "") -> bool:
        """A record without which a restarted daemon asks the destination once more. Whether it is written."""
        try:
            await self.mark(mark, detail)
        except MigdError as error:
            log.warning("%s: %s", self.migration, error)
            return False
        return True
