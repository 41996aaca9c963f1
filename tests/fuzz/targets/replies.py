"""The destination as its source hears it: from ACCEPT to the answer to GO."""

from __future__ import annotations

from random import Random

from migd.errors import OutcomeUnknown, PeerError
from migd.limits import Limits
from migd.migration.bandwidth import Unlimited
from migd.migration.ports import Bandwidth
from migd.ram.block import BlockShape
from migd.source.peer import DestinationPeer
from migd.transport.link import Dialogue, FrameLink
from migd.wire import handshake, messages
from tests.fuzz import frames, reading
from tests.fuzz.clockless import ClocklessLoop
from tests.fuzz.played import PlayedChannel
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome
from tests.support.scripted_guest import MIGRATION, PAGES

_STARTED, _ABORTED = 36, 37


class _Connector:
    """See ``migd.migration.ports.Connector``: the first conversation is the recorded one, others just end."""

    address = "a recording"
    bandwidth: Bandwidth = Unlimited()

    def __init__(self, data: bytes, loop: ClocklessLoop, limits: Limits) -> None:
        self._data: bytes | None = data
        self._loop = loop
        self._limits = limits

    async def connect(self) -> FrameLink:
        return FrameLink(PlayedChannel(b"", ends=False))

    async def converse(self, migration: str) -> Dialogue:
        data, self._data = self._data, None
        link = FrameLink(PlayedChannel(data or b"", ends=data is None))
        return Dialogue(link, migration, self._loop, self._limits)


class Replies:
    """Nobody takes a guest for started, or given up, unless the destination said so, whole and by its id."""

    name = "replies"
    shared = 40

    def __init__(self) -> None:
        self.seeds = recorded("replies")
        self._loop = ClocklessLoop()
        self._limits = Limits(ping_s=1.0, dead_s=2.0, go_s=1.0)
        self._hello = handshake.hello(MIGRATION, "scripted", (BlockShape("ram", PAGES),), streams=1)

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return frames.mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        return self._loop.run(self._talk(data))

    async def _talk(self, data: bytes) -> Outcome:
        connector = _Connector(data, self._loop, self._limits)
        peer = DestinationPeer(connector, MIGRATION, self._loop, self._limits)
        depth = 0
        try:
            await peer.connect()
            await peer.open(self._hello)
            depth += 1
            for kind in (messages.Prepared, messages.Ready):
                await peer.expect(kind, 1.0)
                depth += 1
            answer = await peer.go()
        except (PeerError, OutcomeUnknown) as error:
            return Outcome(type(error).__name__, depth)
        finally:
            await peer.close()
        self._judge(data, answer)
        return Outcome(ACCEPTED, depth + 1)

    def _judge(self, data: bytes, answer: messages.Message) -> None:
        kind = _STARTED if isinstance(answer, messages.Started) else _ABORTED
        try:
            for frame in reading.frames(data):
                if frame.kind == kind and MIGRATION.encode() in frame.metadata:
                    return
        except reading.Unreadable:
            pass
        raise Broken(f"{type(answer).__name__}, and nobody said so")

    def close(self) -> None:
        self._loop.close()
