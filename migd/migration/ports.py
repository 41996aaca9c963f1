"""What the two roles need from outside, as protocols: sessions own no socket, clock, thread or process.

The daemon plugs in the real ones (``migd.transport``, ``migd.guest``); a simulation may own all of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeAlias, TypeVar

from migd.migration.stats import Arrival, Iteration, Result
from migd.ram.bitmap import PageBitmap, Run
from migd.ram.block import BlockShape
from migd.ram.contract import FreeContract
from migd.ram.layout import RamLayout
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


class Bandwidth(Protocol):
    """What one migration may put on the wire, beside all others of its daemon in its direction."""

    @property
    def rate_bytes_s(self) -> float:
        """The most that it may send at present; infinite without a limit."""

    @property
    def frame_bytes(self) -> float:
        """What may go at once, over all its streams, so that no turn takes long; infinite without a limit."""

    async def take(self, size_bytes: float) -> None:
        """Pay for so many bytes: returns when they are within the limits. Cancelled, it takes nothing."""

    def close(self) -> None:
        """The migration is over."""


class Slot(Protocol):
    """A stream's claim to one buffer for a frame in flight."""

    @property
    def wanted(self) -> bool:
        """Others wait for what is held here."""

    async def take(self) -> memoryview:
        """2 MiB, as soon as the daemon has room for one frame more; the same until they are given back."""

    def give_back(self) -> None:
        """The frame is on its way no longer; nothing if none was taken."""


class Room(Protocol):
    """One migration's part of the memory for frames in flight (``migd.migration.in_flight``)."""

    def slot(self) -> Slot: ...
    def close(self) -> None:
        """The migration is over: its slots were given back."""


class Link(Protocol):
    """Frames over one connection. Any method raises PeerLost when the connection is gone.

    Bulk data does not change hands between thread and loop: a job run by ``in_thread`` may use the ``_now``
    methods of its link, which nobody else uses meanwhile. They never wait for long.
    """

    sent: StreamAccount
    received: StreamAccount
    sent_bytes: int
    received_bytes: int

    async def turn(self) -> None:
        """Returns when all that was sent so far is within the bandwidth: more may be.

        ``send_runs`` and ``send_state`` wait for it themselves. Messages never do: pings go on.
        """

    async def send(self, message: Message) -> None: ...
    async def send_runs(self, kind: FrameType, runs: list[Run]) -> None: ...
    async def send_state(self, chunk: memoryview) -> None: ...
    async def receive(self, lend: Callable[[], Awaitable[memoryview]] | None = None) -> Frame:
        """The next frame. ``lend`` is asked for a buffer if the link is starved, or will be."""

    def lend(self, buffer: memoryview | None) -> None:
        """Payloads go into this buffer; after None, until the next is lent, the link is starved by a payload.

        Without any call they go into a buffer of the link's own. Not while a payload is being read.
        """

    @property
    def starved(self) -> bool:
        """A payload is due and has no buffer: ``receive_now`` returns None until one is lent."""

    @property
    def at_boundary(self) -> bool:
        """Between two frames."""

    async def in_thread(
        self, worker: Worker, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T: ...
    @property
    def congested(self) -> bool:
        """Something that a job sent has not left yet: it had better end, and ``flush`` be awaited."""

    async def flush(self) -> None:
        """Everything that jobs sent has left, and its memory may be used again."""

    def send_pages_now(self, runs: list[Run], digests: bytes, codec: Codec, payload: memoryview) -> None: ...
    def send_runs_now(self, kind: FrameType, runs: list[Run]) -> None: ...
    def receive_now(self) -> Frame | None:
        """The next frame; None if it is not here yet, and may be awaited with ``receive``, or is starved."""

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

    async def applied(self, up_to_bytes: int) -> None:
        """Returns when the peer's PONG says that it has applied so much; it is asked until it does."""

    def close(self) -> None: ...


class Connector(Protocol):
    """Opens connections to the destination daemon; ``address`` is for messages to people."""

    address: str
    bandwidth: Bandwidth
    """All of them together may use this."""

    async def connect(self) -> Link: ...
    async def converse(self, migration: str) -> Conversation: ...


class DirtyLog(Protocol):
    """Pages written since the last harvest; armed when a session gets it."""

    @property
    def name(self) -> str: ...
    @property
    def sees_writes(self) -> bool:
        """True for a log of every store; False for one that compares content with what was sent (R19)."""

    @property
    def cost_s(self) -> float:
        """What harvesting the paused guest will take, by the last harvest; 0 where it is next to nothing."""

    async def harvest(self) -> PageBitmap:
        """Get and clear (R3), behind a barrier. Hints may come meanwhile (``migd/source/tracking.py``)."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class PauseReport:
    """A paused guest's last words: its opaque device state and, if it can tell, its free pages (R14).

    Without the device state it is to be asked for, with ``SourceGuest.save``.
    """

    device_state: bytes | None
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

    @property
    def answer_bytes(self) -> int:
        """RAM that the guest writes for an answer: it is to be sent again."""

    async def declare(self, timeout_s: float) -> FreeContract: ...
    async def request(self, epoch: int, sink: HintSink) -> None: ...
    def reach(self, epoch: int) -> int:
        """Below which page the answer has spoken, the lowest first; all of RAM if no more of it will come."""

    async def reached(self, epoch: int, page: int, timeout_s: float) -> None:
        """Returns when ``reach`` is ``page`` at least; at the latest after ``timeout_s``."""

    def answered(self, epoch: int) -> bool:
        """Whether the answer is complete."""

    async def done(self) -> None: ...


class SourceGuest(Protocol):
    """The guest a source session moves. Methods raise GuestError in bounded time."""

    name: str
    ram: RamLayout

    @property
    def hints(self) -> HintChannel | None: ...
    @property
    def handover_s(self) -> float:
        """What saving it here and loading and starting it there takes of the pause, beyond what every guest's
        takes."""

    @property
    def reports_free_at_pause(self) -> bool:
        """Whether its pause reports will have the free pages (R14); the compare log asks beforehand (R19)."""

    async def arm(self) -> DirtyLog: ...
    async def disarm(self) -> None: ...
    @property
    def awaits_verdict(self) -> bool:
        """It arrived here, and its source has not said yet whether it missed a write."""

    async def verdict(self) -> None:
        """Returns when that was said, or after ``verdict_s``. GuestError if the guest is paused for it."""

    async def pause(self, migration: str) -> PauseReport: ...
    async def save(self) -> bytes:
        """The device state of the paused guest, where its report did not bring it."""

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


class LoadedGuest(Protocol):
    """A guest process at its destination from READY on, as far as the hand-over needs it."""

    name: str

    @property
    def checks_itself(self) -> bool:
        """Whether a self-check is worth waiting for."""

    @property
    def gone(self) -> bool:
        """Its process has ended, or was given up."""

    async def start(self) -> Resumption: ...
    async def pause(self, migration: str) -> PauseReport: ...
    async def resume(self) -> None:
        """Go on after a pause; nothing if it runs."""

    def judged(self) -> None:
        """The verdict on its arrival has come, or is waited for no longer: it may move on."""

    async def self_check(self) -> SelfCheck: ...
    async def discard(self) -> None:
        """End a guest process that does not run here, and let its RAM go."""


class DestinationGuest(LoadedGuest, Protocol):
    """The guest process spawned for an incoming migration; it holds the RAM and survives its daemon."""

    ram: RamLayout

    async def attached(self) -> None: ...
    async def load(self, device_state: bytes) -> None: ...
    async def lost(self) -> None: ...


class GuestHost(Protocol):
    """Makes room for incoming guests."""

    def create(self, name: str, migration: str, shapes: tuple[BlockShape, ...]) -> DestinationGuest:
        """Fresh zero RAM (R11) and a process spawned for it. Refused: no room, or the name is taken."""


@dataclass(frozen=True)
class Passage:
    """Which migration this is, seen from the side that it leaves from (out) or arrives at (in)."""

    migration: str
    guest: str
    direction: Literal["out", "in"]
    peer: str
    """Out: the destination's address; in: the software that the source says it is."""


class Observer(Protocol):
    """Is told what sessions do, while they do it. No method may raise."""

    def began(self, passage: Passage) -> None:
        """Before anything is done."""

    async def entered(self, passage: Passage, state: str) -> None:
        """Awaited with every state a session enters, the first one included, before it acts in it."""

    def iterated(self, passage: Passage, iteration: Iteration) -> None:
        """An iteration at the source is over, its figures are final."""

    async def finished(self, passage: Passage, record: Result | Arrival) -> None:
        """Nothing more will happen. Again for an unknown outcome that was resolved."""
