"""HintRelay between real sockets: QEMU's end of the hint port, and the daemon's own receiver of hints."""

from __future__ import annotations

import asyncio
import random
import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migd.guest import hints
from migd.guest.hint_receiver import SocketHints
from migd.guest.hints import (
    Bitmap,
    Done,
    End,
    Greet,
    Hello,
    HintDecoder,
    HintFrame,
    Ranges,
    Request,
    Strength,
)
from migd.limits import Limits
from migd.qemu import hint_relay
from migd.qemu.hint_relay import HintRelay
from migd.qemu.ram_map import RamMap, Segment
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract

MIB = 1 << 20
GIB = 1 << 30

LOW_PAGES, HIGH_PAGES = 1024, 2048
HIGH_AT = 4 * GIB
RAM = RamMap([Segment(0, LOW_PAGES * 4096, 0), Segment(HIGH_AT, HIGH_PAGES * 4096, LOW_PAGES * 4096)],
             (LOW_PAGES + HIGH_PAGES) * 4096)  # fmt: skip
"""Split as a pc is, only smaller: 4 MiB below a hole, 8 MiB from 4 GiB on."""

END_PAGES = HIGH_AT // 4096 + HIGH_PAGES
HELLO = Hello(FreeContract.ANYTHING, Strength.WEAK, 4096, END_PAGES)

Runs = list[tuple[int, int]]


class Daemon:
    """What a daemon has of a guest's hints, and the socket that its guest is given."""

    def __init__(self, **limits: float) -> None:
        ours, self.theirs = socket.socketpair()
        self.channel = SocketHints(ours, RAM.ram_bytes // PAGE_BYTES, Limits(**limits))
        self.found = PageBitmap(RAM.ram_bytes // PAGE_BYTES)

    async def request(self, epoch: int) -> None:
        await self.channel.request(epoch, self._take)

    def _take(self, _epoch: int, free: PageBitmap) -> None:
        self.found |= free

    async def answer(self, epoch: int) -> Runs:
        """What has been found when the answer is complete."""
        async with asyncio.timeout(10):
            while not self.channel.answered(epoch):  # noqa: ASYNC110  # END may come after what is ahead
                await asyncio.sleep(0.001)
        return list(self.found.runs())

    def close(self) -> None:
        """The other end is the relay's."""
        self.channel.close()


@dataclass
class Agent:
    """A connection to the port as QEMU accepts it: what is sent here a guest's agent has said."""

    sock: socket.socket
    _decoder: HintDecoder = field(default_factory=HintDecoder)
    _heard: list[HintFrame] = field(default_factory=list)

    async def say(self, *frames: HintFrame | bytes) -> None:
        data = b"".join(one if isinstance(one, bytes) else hints.encode(one) for one in frames)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hear(self) -> HintFrame:
        async with asyncio.timeout(10):
            while not self._heard:
                data = await asyncio.get_running_loop().sock_recv(self.sock, 4096)
                assert data, "the relay closed its end"
                self._heard = self._decoder.feed(data)
        return self._heard.pop(0)

    async def closed(self) -> bool:
        """The relay has let go, perhaps after a few words."""
        async with asyncio.timeout(10):
            while await asyncio.get_running_loop().sock_recv(self.sock, 4096):
                pass
        return True

    async def hear_until(self, last: HintFrame) -> list[HintFrame]:
        """Everything up to this one."""
        heard = [await self.hear()]
        while heard[-1] != last:
            heard.append(await self.hear())
        return heard


class Port:
    """QEMU's end of the hint port: a unix socket that listens, for one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.agents: list[Agent] = []
        self._listening: socket.socket | None = None

    def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen(1)
        self._listening.setblocking(False)

    async def accept(self) -> Agent:
        """The next connection; the relay looks every half second."""
        assert self._listening is not None
        async with asyncio.timeout(10):
            sock, _ = await asyncio.get_running_loop().sock_accept(self._listening)
        sock.setblocking(False)
        self.agents.append(Agent(sock))
        return self.agents[-1]

    @property
    def is_called(self) -> bool:
        """Somebody has connected and was not accepted yet."""
        return bool(select.select([self._listening], [], [], 0)[0])

    def close(self) -> None:
        if self._listening is not None:
            self._listening.close()
        for agent in self.agents:
            agent.sock.close()


@dataclass
class Scene:
    relay: HintRelay
    port: Port
    daemons: list[Daemon] = field(default_factory=list)

    def daemon(self, **limits: float) -> Daemon:
        """A new daemon, for which the relay carries from now on."""
        made = Daemon(**limits)
        self.daemons.append(made)
        self.relay.serve(made.theirs)
        return made


@asynccontextmanager
async def scene(
    directory: Path, ram: Callable[[], RamMap] = lambda: RAM, *, opened: bool = True
) -> AsyncIterator[Scene]:
    port = Port(directory / "hints")
    if opened:
        port.open()
    relay = HintRelay(str(port.path), ram)
    running = asyncio.create_task(relay.run())
    set_up = Scene(relay, port)
    try:
        yield set_up
        assert not running.done(), "the relay ended by itself"
    finally:
        running.cancel()
        await asyncio.wait({running})
        port.close()
        for daemon in set_up.daemons:
            daemon.close()
        assert running.cancelled()


@asynccontextmanager
async def conversation(directory: Path) -> AsyncIterator[tuple[Scene, Agent, Daemon]]:
    """With an agent that has said HELLO, and a daemon that has asked with epoch 7."""
    async with scene(directory) as set_up:
        daemon = set_up.daemon(hint_window_s=60)
        agent = await set_up.port.accept()
        await agent.say(HELLO)
        assert await daemon.channel.declare(10) is FreeContract.ANYTHING
        await daemon.request(7)
        await agent.hear_until(Request(7))
        yield set_up, agent, daemon


def ranges(*pairs: tuple[int, int], epoch: int = 7) -> Ranges:
    """In bytes: start, one behind the last."""
    return Ranges(epoch, tuple((start, stop - start) for start, stop in pairs))


def bits(*pages: int, size: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(-(-size // 8), "little")


# -- what is said ---------------------------------------------------------------------------------------


async def test_greetings_requests_and_their_end_reach_the_agent(place: Path) -> None:
    async with scene(place) as set_up:
        daemon = set_up.daemon()
        agent = await set_up.port.accept()
        assert await agent.hear() == Greet()
        await daemon.request(7)
        await agent.hear_until(Request(7))
        await daemon.channel.done()
        assert await agent.hear() == Done(7)


@pytest.mark.parametrize("pages", [1, LOW_PAGES + HIGH_PAGES, END_PAGES])
async def test_an_agent_whose_memory_ends_within_ram_is_one_of_this_guest(place: Path, pages: int) -> None:
    """It names the end of its memory map, holes and all; the daemon wants to hear of pages of RAM."""
    async with scene(place) as set_up:
        daemon, agent = set_up.daemon(), await set_up.port.accept()
        await agent.say(Hello(FreeContract.ZERO, Strength.WEAK, 4096, pages))
        assert await daemon.channel.declare(10) is FreeContract.ZERO


@pytest.mark.parametrize(
    "hello",
    [
        Hello(FreeContract.ZERO, Strength.WEAK, 4096, END_PAGES + 1),
        Hello(FreeContract.ZERO, Strength.WEAK, 4096, (1 << 64) - 1),
        Hello(FreeContract.ZERO, Strength.WEAK, 4096, 0),
        Hello(FreeContract.ZERO, Strength.WEAK, 16384, END_PAGES),
        Hello(FreeContract.ZERO, Strength.WEAK, 4096, END_PAGES, version=2),
        Hello(77, Strength.WEAK, 4096, END_PAGES),
    ],
    ids=["beyond RAM", "beyond all", "no pages", "other pages", "another version", "unknown contract"],
)
async def test_an_agent_of_another_guest_is_not_believed(place: Path, hello: Hello) -> None:
    async with scene(place) as set_up:
        daemon, agent = set_up.daemon(), await set_up.port.accept()
        await agent.say(hello)
        assert await daemon.channel.declare(10) is FreeContract.NONE


async def test_answers_are_translated_across_the_hole(place: Path) -> None:
    async with conversation(place) as (_, agent, daemon):
        await agent.say(
            ranges((2 * MIB, 2 * MIB + 8192), (3 * MIB, HIGH_AT + 4096)),  # the second one over the hole
            Bitmap(7, HIGH_AT + 64 * 4096, 128, bits(0, 5, 127, size=128)),
            Bitmap(7, 0, 2 * LOW_PAGES, bits(600, 601, LOW_PAGES + 3, size=2 * LOW_PAGES)),
            End(7, 0),
        )
        first_high = LOW_PAGES
        assert await daemon.answer(7) == [
            (512, 514),
            (600, 602),
            (768, first_high + 1),
            (first_high + 64, first_high + 65),
            (first_high + 69, first_high + 70),
            (first_high + 191, first_high + 192),
        ]
        assert daemon.channel.rejected == 0


async def test_nothing_below_one_mib_and_nothing_outside_of_ram_is_passed_on(place: Path) -> None:
    async with conversation(place) as (_, agent, daemon):
        await agent.say(
            ranges((0, MIB + 4096), (8 * MIB, 3 * GIB), (HIGH_AT + HIGH_PAGES * 4096, HIGH_AT + GIB)),
            Bitmap(7, 0, 256, b"\xff" * 32),
            Bitmap(7, 1 << 40, 64, b"\xff" * 8),
            Ranges(7, (((1 << 64) - 4096, (1 << 64) - 1),)),
            End(7, 0),
        )
        assert await daemon.answer(7) == [(256, 257)]
        assert daemon.channel.rejected == 0


async def test_a_frame_whose_ranges_all_lie_across_the_hole_becomes_several(place: Path) -> None:
    """The relay is not to make a frame that its own protocol refuses."""
    low = [(MIB + at * 8192, 4096) for at in range(370)]
    across = [(4 * MIB - 4096, HIGH_AT + 4096 - 4 * MIB + 4096)]
    high = [(HIGH_AT + 8192 + at * 8192, 4096) for at in range(1000)]
    async with conversation(place) as (_, agent, daemon):
        await agent.say(Ranges(7, tuple(low + across + high)), End(7, 0))
        found = await daemon.answer(7)
        assert daemon.channel.rejected == 0
    assert sum(stop - start for start, stop in found) == 370 + 2 + 1000
    whole = Ranges(7, ((0, 1 << 40),) * hints.MAX_RANGES_PER_FRAME)
    made = list(hint_relay.translate(whole, RAM))
    assert [len(frame.ranges) for frame in made if isinstance(frame, Ranges)] == [4096, 4096]


@pytest.mark.parametrize("start", [1, 4095, HIGH_AT + 8, (1 << 64) - 1])
async def test_a_bitmap_that_begins_within_a_page_is_refused_and_counted(place: Path, start: int) -> None:
    async with conversation(place) as (_, agent, daemon):
        await agent.say(Bitmap(7, start, 64, b"\xff" * 8), ranges((2 * MIB, 2 * MIB + 4096)), End(7, 0))
        assert await daemon.answer(7) == [(512, 513)]
        assert daemon.channel.rejected == 1


async def test_garbage_between_frames_is_passed_over(place: Path) -> None:
    noise = random.Random(7)
    async with conversation(place) as (_, agent, daemon):
        good = hints.encode(ranges((2 * MIB, 2 * MIB + 4096)))
        await agent.say(
            noise.randbytes(3000),
            good[:30],  # a frame cut short, as at a migration
            ranges((3 * MIB, 3 * MIB + 4096)),
            b"fpH1" + noise.randbytes(60),
            bytes(good[:-1]) + b"\x77",  # damaged
            Bitmap(7, HIGH_AT, 64, b"\x01" + bytes(7)),
            noise.randbytes(100),
            End(7, 0),
        )
        assert await daemon.answer(7) == [(768, 769), (LOW_PAGES, LOW_PAGES + 1)]


async def test_an_answer_may_come_byte_by_byte(place: Path) -> None:
    async with conversation(place) as (_, agent, daemon):
        for byte in hints.encode(ranges((2 * MIB, 2 * MIB + 4096))) + hints.encode(End(7, 0)):
            await agent.say(bytes([byte]))
            await asyncio.sleep(0)
        assert await daemon.answer(7) == [(512, 513)]


async def test_the_map_is_looked_at_anew_for_each_frame(place: Path) -> None:
    """Memory may be plugged in, and a BIOS moves things about."""
    maps = [RAM]
    async with scene(place, lambda: maps[-1]) as set_up:
        daemon, agent = set_up.daemon(hint_window_s=60), await set_up.port.accept()
        await daemon.request(7)
        await agent.hear_until(Request(7))
        await agent.say(ranges((2 * MIB, 2 * MIB + 4096)), End(7, 0))
        assert await daemon.answer(7) == [(512, 513)]
        maps.append(RamMap([Segment(0, 3 * MIB, MIB)], RAM.ram_bytes))
        await daemon.request(8)
        await agent.say(ranges((2 * MIB, 2 * MIB + 4096), epoch=8), End(8, 0))
        assert await daemon.answer(8) == [(512, 513), (768, 769)]


# -- who comes and goes ---------------------------------------------------------------------------------


async def test_requests_for_an_agent_that_is_not_there_are_forgotten(place: Path) -> None:
    async with scene(place, opened=False) as set_up:
        daemon = set_up.daemon()
        await daemon.request(7)
        await asyncio.sleep(0.01)
        set_up.port.open()
        agent = await set_up.port.accept()
        assert await agent.hear() == Greet()
        await daemon.request(8)
        assert await agent.hear() == Request(8)


async def test_an_agent_that_comes_back_is_greeted_again(place: Path) -> None:
    async with conversation(place) as (set_up, agent, daemon):
        agent.sock.close()
        again = await set_up.port.accept()
        assert await again.hear() == Greet()
        await again.say(Hello(FreeContract.ZERO, Strength.WEAK, 4096, END_PAGES))  # another kernel
        await daemon.request(8)
        await again.hear_until(Request(8))
        await again.say(ranges((2 * MIB, 2 * MIB + 4096), epoch=8), End(8, 0))
        assert await daemon.answer(8) == [(512, 513)]
        assert await daemon.channel.declare(10) is FreeContract.ZERO


async def test_half_a_frame_of_an_agent_that_went_does_not_spoil_the_next_one(place: Path) -> None:
    async with conversation(place) as (set_up, agent, daemon):
        await agent.say(hints.encode(ranges((2 * MIB, 2 * MIB + 4096)))[:-3])
        agent.sock.close()
        again = await set_up.port.accept()
        await again.say(ranges((3 * MIB, 3 * MIB + 4096)), End(7, 0))
        assert await daemon.answer(7) == [(768, 769)]
        assert daemon.channel.rejected == 0


async def test_one_daemon_takes_the_place_of_another_and_greets_the_agent_anew(place: Path) -> None:
    async with conversation(place) as (set_up, agent, first):
        second = set_up.daemon(hint_window_s=60)
        await agent.hear_until(Greet())
        await agent.say(HELLO)
        assert await second.channel.declare(10) is FreeContract.ANYTHING
        await second.request(8)
        await agent.hear_until(Request(8))
        await agent.say(ranges((3 * MIB, 3 * MIB + 4096), epoch=8), End(8, 0))
        assert await second.answer(8) == [(768, 769)]
        assert not first.channel._open  # it was hung up on


async def test_a_daemon_that_hangs_up_has_the_port_closed_until_the_next_one_comes(place: Path) -> None:
    """R7: nobody reads what a hostile guest goes on to send."""
    async with conversation(place) as (set_up, agent, daemon):
        for epoch in (8, 9):
            daemon.close()
            assert await agent.closed()
            await asyncio.sleep(0.02)
            assert not set_up.port.is_called
            daemon = set_up.daemon(hint_window_s=60)
            agent = await set_up.port.accept()
            assert await agent.hear() == Greet()
            await agent.say(HELLO)
            await daemon.request(epoch)
            await agent.hear_until(Request(epoch))
            await agent.say(ranges((3 * MIB, 3 * MIB + 4096), epoch=epoch), End(epoch, 0))
            assert await daemon.answer(epoch) == [(768, 769)]


async def test_without_a_daemon_an_agent_is_heard_and_forgotten(place: Path) -> None:
    async with scene(place) as set_up:
        agent = await set_up.port.accept()
        assert await agent.hear() == Greet()
        await agent.say(*[ranges((2 * MIB, 2 * MIB + 4096))] * 10_000, HELLO)  # more than sockets hold
        daemon = set_up.daemon()
        assert await agent.hear() == Greet()
        await agent.say(HELLO)
        assert await daemon.channel.declare(10) is FreeContract.ANYTHING
        assert daemon.channel._heard_bytes < 300_000  # what was still on its way


# -- a daemon that does not read ------------------------------------------------------------------------


class Deaf:
    """A daemon that leaves everything where it is until it is told to read."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.sock.setblocking(False)

    def close(self) -> None:
        self.sock.close()


def flood(epoch: int = 7) -> bytes:
    """64 KiB of frames that come out of the relay as large as they went in."""
    return hints.encode(Ranges(epoch, ((2 * MIB, 4096),) * hints.MAX_RANGES_PER_FRAME))


async def stuff(agent: Agent) -> int:
    """Say as much as is taken; how many bytes."""
    sent, quiet = 0, 0
    data = flood()
    at = 0
    while quiet < 50:
        try:
            count = agent.sock.send(data[at:])
        except BlockingIOError:
            quiet += 1
            await asyncio.sleep(0.002)
            continue
        quiet, sent, at = 0, sent + count, (at + count) % len(data)
        assert sent < 64 * MIB, "the relay takes everything"
        await asyncio.sleep(0)
    return sent


async def test_what_waits_for_a_daemon_that_does_not_read_is_bounded(place: Path) -> None:
    async with scene(place) as set_up:
        deaf = Deaf()
        set_up.relay.serve(deaf.theirs)
        agent = await set_up.port.accept()
        sent = await stuff(agent)
        assert sent > 4 * MIB
        assert len(set_up.relay._to_daemon) < 5 * MIB
        decoder, heard = HintDecoder(), 0
        rest = len(flood()) - sent % len(flood())
        saying = asyncio.create_task(agent.say(flood()[-rest:], End(7, 0)))
        async with asyncio.timeout(20):
            while True:  # it reads after all: nothing is lost
                frames = decoder.feed(await asyncio.get_running_loop().sock_recv(deaf.sock, 1 << 20))
                heard += len(frames)
                if End(7, 0) in frames:
                    break
        await saying
        assert heard == sent // len(flood()) + 2
        assert decoder.rejected_frames == decoder.garbage_bytes == 0
        deaf.close()


@pytest.mark.parametrize("how", ["hangs up", "is replaced"])
async def test_an_agent_is_heard_again_when_a_daemon_that_did_not_read_is_gone(place: Path, how: str) -> None:
    async with scene(place) as set_up:
        deaf = Deaf()
        set_up.relay.serve(deaf.theirs)
        agent = await set_up.port.accept()
        await stuff(agent)
        if how == "hangs up":
            deaf.close()
            await asyncio.sleep(0.05)
        daemon = set_up.daemon(hint_window_s=60)
        if how == "hangs up":
            agent = await set_up.port.accept()
        saying = asyncio.create_task(agent.say(bytes(1 << 16), HELLO))  # the rest of a frame is lost
        assert await daemon.channel.declare(10) is FreeContract.ANYTHING
        await saying
        deaf.close()


async def test_an_agent_that_does_not_read_holds_nobody_up(place: Path) -> None:
    async with conversation(place) as (_, agent, daemon):
        for epoch in range(8, 30_000):  # more than sockets hold
            daemon.channel._tell(Request(epoch))
            if epoch % 100 == 0:
                await asyncio.sleep(0)
        await agent.say(ranges((2 * MIB, 2 * MIB + 4096)), End(7, 0))
        assert await daemon.answer(7) == [(512, 513)]
