"""The network between the hosts: cables with latency, little room, and whatever is done to them."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from migd.errors import PeerLost
from migd.limits import Limits
from migd.migration.bandwidth import Unlimited
from migd.migration.ports import Bandwidth, Clock
from migd.transport.channel import USER_TIMEOUT_MS
from migd.transport.link import Dialogue, FrameLink
from tests.simulation.life import Life


@dataclass
class Nature:
    """What a cable is like; drawn once for each migration."""

    latency_s: float = 1e-4
    jitter_s: float = 1e-4
    room_bytes: int = 1 << 20
    """In flight and unread, after which a sender waits."""
    bite_bytes: int = 1 << 20
    """The most that one call sends or receives."""
    rate_bytes_s: float = math.inf


@dataclass
class _Pipe:
    """One direction of a cable."""

    nature: Nature
    dice: random.Random
    interlude: Callable[[], object]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    here: bytearray = field(default_factory=bytearray)
    under_way: deque[bytes] = field(default_factory=deque)
    held_up: int = 0
    """Arrivals that were due while it was frozen."""
    used_bytes: int = 0
    arrival_s: float = 0.0
    frozen: bool = False
    ended: bool = False
    broken: str = ""
    cut_after: int | None = None
    """Bytes that still pass; behind them comes the end."""
    flip_after: int | None = None
    _changed: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def room_bytes(self) -> int:
        return max(0, self.nature.room_bytes - self.used_bytes)

    def put(self, data: memoryview) -> int:
        """As many bytes as there is room for now."""
        size = min(len(data), self.room_bytes, self.dice.randint(1, self.nature.bite_bytes))
        if size:
            self._send(bytes(data[:size]))
        return size

    def _send(self, data: bytes) -> None:
        if self.flip_after is not None:
            data = self._flipped(data)
        ends = False
        if self.cut_after is not None:
            data, ends = data[: self.cut_after], len(data) >= self.cut_after
            self.cut_after -= len(data)
        self.used_bytes += len(data)
        self._deliver_later(data)
        if ends:
            self.end()

    def _flipped(self, data: bytes) -> bytes:
        at = self.flip_after
        assert at is not None
        if at >= len(data):
            self.flip_after = at - len(data)
            return data
        self.flip_after = None
        return data[:at] + bytes([data[at] ^ (1 << self.dice.randrange(8))]) + data[at + 1 :]

    def _deliver_later(self, data: bytes) -> None:
        """Empty data is the end."""
        nature, now = self.nature, self.loop.time()
        delay = nature.latency_s + self.dice.random() ** 4 * nature.jitter_s
        busy = len(data) / nature.rate_bytes_s
        self.arrival_s = max(self.arrival_s + busy + 1e-9, now + delay + busy)
        self.under_way.append(data)
        self.loop.call_at(self.arrival_s, self._arrive)

    def slow_down(self, rate_bytes_s: float) -> None:
        """From now on, with as little room as such a line has."""
        self.nature = replace(self.nature, rate_bytes_s=rate_bytes_s, room_bytes=16 << 10)

    def end(self) -> None:
        """Nothing comes after what is under way."""
        self._deliver_later(b"")

    def _arrive(self) -> None:
        if self.frozen:
            self.held_up += 1
        elif self.under_way:
            data = self.under_way.popleft()
            self.here += data
            self.ended |= not data
            self._wake()

    def thaw(self) -> None:
        self.frozen = False
        for _ in range(self.held_up):
            self._arrive()
        self.held_up = 0

    def take(self, view: memoryview) -> int:
        """Bytes that are here; 0 for none, or the end."""
        size = min(len(view), len(self.here), self.dice.randint(1, self.nature.bite_bytes))
        view[:size] = self.here[:size]
        del self.here[:size]
        self.used_bytes -= size
        if size:
            self._wake()
        return size

    def breaks(self, why: str) -> None:
        """Reset: what was under way is lost."""
        self.broken = self.broken or why
        self.under_way.clear()
        self.here.clear()
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, []
        for waiting in changed:
            if not waiting.done():
                waiting.set_result(None)

    async def changed(self) -> None:
        waiting: asyncio.Future[None] = self.loop.create_future()
        self._changed.append(waiting)
        await waiting


class MemoryChannel:
    """One end of a cable; see ``migd.transport.channel.Channel``."""

    def __init__(self, life: Life, outward: _Pipe, inward: _Pipe) -> None:
        self._life = life
        self._out = outward
        self._in = inward
        self._closed = False
        life.hold(self.close)

    def _check(self, pipe: _Pipe) -> None:
        self._life.check()
        if self._closed:
            raise PeerLost("the connection was closed on this side")
        if pipe.broken:
            raise PeerLost(f"connection lost: {pipe.broken}")

    async def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while True:
            self._check(self._out)
            view = view[self._out.put(view) :]
            if not view:
                return
            await self._out.changed()

    async def receive_into(self, view: memoryview) -> int:
        while True:
            self._check(self._in)
            size = self._in.take(view)
            if size or self._in.ended:
                return size
            await self._in.changed()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._check(self._out)
        yield
        self._life.check()
        if self._closed:
            raise PeerLost("the connection was closed on this side")

    def send_now(self, data: bytes | memoryview) -> int:
        self._out.interlude()
        self._check(self._out)
        return self._out.put(memoryview(data))

    def receive_now(self, view: memoryview) -> int | None:
        self._in.interlude()
        self._check(self._in)
        size = self._in.take(view)
        return size if size or self._in.ended else None

    def close(self) -> None:
        """With unread bytes the peer hears RST, as of a TCP socket; else the end."""
        if self._closed:
            return
        self._closed = True
        if self._in.here:
            self._out.breaks("Connection reset by peer")
        else:
            self._out.end()
        self._in.breaks("closed")
        self._out._wake()


class Cable:
    """One connection, from the source's side to the destination's."""

    def __init__(
        self, nature: Nature, dice: random.Random, near: Life, far: Life, interlude: Callable[[], object]
    ) -> None:
        self.there = _Pipe(nature, dice, interlude)
        self.back = _Pipe(nature, dice, interlude)
        self.near = MemoryChannel(near, self.there, self.back)
        self.far = MemoryChannel(far, self.back, self.there)

    @property
    def open(self) -> bool:
        return not (self.near._closed and self.far._closed)

    @property
    def pipes(self) -> tuple[_Pipe, _Pipe]:
        return self.there, self.back

    def reset(self) -> None:
        for pipe in self.pipes:
            pipe.breaks("Connection reset by peer")

    def freeze(self) -> None:
        """Nothing arrives any more. Whoever has sent something and hears nothing gives up in the end."""
        for pipe in self.pipes:
            if not pipe.frozen:
                pipe.frozen = True
                pipe.loop.call_later(USER_TIMEOUT_MS / 1e3, self._give_up, pipe)

    def _give_up(self, pipe: _Pipe) -> None:
        if pipe.frozen and pipe.under_way:
            self.reset()
        elif pipe.frozen and self.open:
            pipe.loop.call_later(USER_TIMEOUT_MS / 1e3, self._give_up, pipe)

    def thaw(self) -> None:
        for pipe in self.pipes:
            pipe.thaw()


Serve = Callable[[MemoryChannel], None]


class Network:
    """Who listens where, and every cable there ever was."""

    def __init__(self, dice: random.Random, interlude: Callable[[], object]) -> None:
        self._dice = dice
        self._interlude = interlude
        self._listening: dict[str, tuple[Life, Serve]] = {}
        self.natures: Callable[[], Nature] = Nature
        self.cables: list[Cable] = []
        self._passing = asyncio.Event()
        self._passing.set()

    def listen(self, address: str, life: Life, serve: Serve) -> None:
        self._listening[address] = (life, serve)

    async def connect(self, address: str, life: Life) -> MemoryChannel:
        """PeerLost if nobody listens; for ever if nothing passes."""
        nature = self.natures()
        await asyncio.sleep(nature.latency_s * (1 + self._dice.random()))
        await self._passing.wait()
        life.check()
        far, serve = self._listening.get(address, (None, None))
        if far is None or serve is None or not far.alive:
            raise PeerLost(f"{address}: Connection refused")
        cable = Cable(nature, random.Random(self._dice.random()), life, far, self._interlude)
        self.cables.append(cable)
        serve(cable.far)
        return cable.near

    def lose(self) -> None:
        """The line between the hosts is down."""
        self._passing.clear()
        for cable in self.open_cables:
            cable.freeze()

    def mend(self) -> None:
        self._passing.set()
        for cable in self.cables:
            cable.thaw()

    @property
    def open_cables(self) -> list[Cable]:
        return [cable for cable in self.cables if cable.open]


class CableConnector:
    """See ``migd.migration.ports.Connector``."""

    def __init__(
        self,
        network: Network,
        address: str,
        life: Life,
        clock: Clock,
        limits: Limits,
        bandwidth: Bandwidth | None,
    ) -> None:
        self._network = network
        self._life = life
        self._clock = clock
        self._limits = limits
        self.address = address
        self.bandwidth = bandwidth or Unlimited()

    async def connect(self) -> FrameLink:
        self._life.check()
        try:
            async with asyncio.timeout(self._limits.connect_s):
                channel = await self._network.connect(self.address, self._life)
        except TimeoutError as error:
            raise PeerLost(f"{self.address}: no connection within {self._limits.connect_s:g} s") from error
        return FrameLink(channel, self.bandwidth)

    async def converse(self, migration: str) -> Dialogue:
        return Dialogue(await self.connect(), migration, self._clock, self._limits)
