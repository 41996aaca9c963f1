"""What the two roles need from outside, as protocols: sessions own no socket, clock, thread or process.

The daemon plugs in the real ones (``migd.transport``, ``migd.guest``); a simulation may own all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

from migd.ram.bitmap import PageBitmap, Run
from migd.ram.block import BlockShape, RamLayout
from migd.ram.contract import FreeContract
from migd.wire.framing import Frame, StreamAccount
from migd.wire.messages import Message
from migd.wire.protocol import Codec, FrameType

P = ParamSpec("P")
T = TypeVar("T")


class Clock(Protocol):
    """Monotonic time."""

    def now(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class Worker(Protocol):
    """Runs CPU-heavy functions off the event loop's thread."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


class Entropy(Protocol):
    """Unguessable bytes."""

    def token(self, size: int) -> bytes: ...


class Link(Protocol):
    """Frames over one connection. Any method raises PeerLost when the connection is gone."""

    sent: StreamAccount
    received: StreamAccount
    sent_bytes: int

    async def send(self, message: Message) -> None: ...
    async def send_pages(
        self, runs: list[Run], digests: bytes, codec: Codec, payload: memoryview
    ) -> None: ...
    async def send_runs(self, kind: FrameType, runs: list[Run]) -> None: ...
    async def send_state(self, chunk: memoryview) -> None: ...
    async def receive(self) -> Frame: ...
    def close(self) -> None: ...


M = TypeVar("M", bound=Message)


class Conversation(Protocol):
    """The control connection of one migration: messages in order, pings and pongs taken care of.

    ``run`` must be running for anything to arrive; it ends only by raising PeerLost (also after ``dead_s``
    of silence), ProtocolError, Refused or, on ABORT, PeerError with the peer's reason.
    """

    peer_applied_bytes: int
    """Of guest RAM, as the destination's last PONG said."""
    applied_bytes: int
    """What this side says in its PONGs."""

    async def run(self) -> None: ...
    async def send(self, message: Message) -> None: ...
    async def send_state(self, chunk: memoryview) -> None: ...
    async def expect(self, kind: type[M], timeout_s: float) -> M: ...
    async def next(self, what: str, timeout_s: float | None) -> Frame | Message:
        """The next message or STATE frame; ``what`` was due, for the error after ``timeout_s``.

        None waits as long as the peer gives signs of life.
        """

    def close(self) -> None: ...


class Connector(Protocol):
    """Opens connections to the destination daemon; ``address`` is for messages to people."""

    address: str

    async def connect(self) -> Link: ...
    async def converse(self, migration: str) -> Conversation: ...


class DirtyLog(Protocol):
    """Pages written since the last harvest. Arming is awaited, harvesting is not."""

    name: str

    def harvest(self) -> PageBitmap: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class PauseReport:
    """A paused guest's last words: its opaque device state and, if it can tell, its free pages (R14)."""

    device_state: bytes
    free: PageBitmap | None


HintSink: TypeAlias = Callable[[int, PageBitmap], object]
"""Called on the event loop with (epoch, free pages) as answers arrive."""


class HintChannel(Protocol):
    """Free-page hints of one guest. No method ever raises because the guest is slow, dead or hostile (G6)."""

    @property
    def rejected(self) -> int:
        """Records refused so far (R7)."""

    @property
    def distrusted(self) -> bool:
        """Too many were refused: the channel is closed, and what it said no longer counts."""

    async def declare(self, timeout_s: float) -> FreeContract: ...
    async def request(self, epoch: int, sink: HintSink) -> None: ...
    async def answered(self, epoch: int, timeout_s: float) -> bool: ...
    async def done(self) -> None: ...


class SourceGuest(Protocol):
    """The guest a source session moves. Methods raise GuestError in bounded time."""

    name: str
    ram: RamLayout

    @property
    def hints(self) -> HintChannel | None: ...
    async def arm(self) -> DirtyLog: ...
    async def disarm(self) -> None: ...
    async def pause(self, migration: str) -> PauseReport: ...
    async def resume(self) -> None: ...
    async def release(self) -> None: ...
    async def lost(self) -> None:
        """Returns when the guest process is gone."""


@dataclass(frozen=True)
class Resumption:
    """The guest's clock (realtime, ns) at its last instruction before and its first after the pause."""

    stopped_at_ns: int
    resumed_at_ns: int


@dataclass(frozen=True)
class SelfCheck:
    """A guest's own check of the pages it owns against its journal."""

    pages: int
    wrong: int
    first_wrong: int


class DestinationGuest(Protocol):
    """The guest process spawned for an incoming migration; it holds the RAM and survives its daemon."""

    name: str
    ram: RamLayout

    @property
    def gone(self) -> bool:
        """Its process has ended, or was given up."""

    async def attached(self) -> None: ...
    async def load(self, device_state: bytes) -> None: ...
    async def start(self) -> Resumption: ...
    async def pause(self, migration: str) -> PauseReport: ...
    async def self_check(self) -> SelfCheck: ...
    async def lost(self) -> None: ...
    async def discard(self) -> None:
        """End a guest process that never ran here, and let its RAM go."""


class GuestHost(Protocol):
    """Makes room for incoming guests."""

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> DestinationGuest:
        """Fresh zero RAM (R11) and a process spawned for it. Refused: no room, or the name is taken."""


Observer: TypeAlias = Callable[[str], Awaitable[None]]
"""Awaited with the name of every state a session enters, before it acts in it."""
