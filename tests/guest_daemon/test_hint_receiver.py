"""SocketHints over a real socket: what a guest's answer means, and what a hostile one cannot do (R7, G6)."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from migd.guest import hints
from migd.guest.hint_receiver import MAX_REJECTED, SocketHints
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
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract
from tests.support.answers import complete

PAGES = 1000
RAM = PAGES * 4096
HELLO = Hello(FreeContract.ANYTHING, Strength.STRONG, 4096, PAGES)
Runs = list[tuple[int, int]]


@dataclass
class Guest:
    """The guest's end of the hint socket, the daemon's end, and what reached the session."""

    channel: SocketHints
    sock: socket.socket
    found: list[tuple[int, Runs]] = field(default_factory=list)
    _decoder: HintDecoder = field(default_factory=HintDecoder)
    _heard: list[HintFrame] = field(default_factory=list)

    def sink(self, epoch: int, free: PageBitmap) -> None:
        self.found.append((epoch, list(free.runs())))

    async def request(self, epoch: int = 7) -> None:
        await self.channel.request(epoch, self.sink)

    async def say(self, *frames: HintFrame | bytes) -> None:
        """Everything, and then wait until the daemon has read it all."""
        data = b"".join(one if isinstance(one, bytes) else hints.encode(one) for one in frames)
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)
        except (BrokenPipeError, ConnectionResetError):
            return
        await self.read()

    async def read(self) -> None:
        """Until the daemon has nothing left to read."""
        for _ in range(3):
            await asyncio.sleep(0)
        while self.channel._open and unread(self.channel._sock):  # noqa: ASYNC110  # a socket sets no event
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def hear(self) -> HintFrame:
        while not self._heard:
            self._heard = self._decoder.feed(await asyncio.get_running_loop().sock_recv(self.sock, 4096))
        return self._heard.pop(0)

    async def runs(self, *frames: HintFrame, epoch: int = 7) -> Runs:
        """What an answer of these frames says, as one set."""
        await self.say(*frames, End(epoch, 0))
        assert await complete(self.channel, epoch, 10)
        together = PageBitmap(PAGES)
        for _, runs in self.found:
            for start, stop in runs:
                together.add_run(start, stop)
        return list(together.runs())


def unread(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@asynccontextmanager
async def hinting(pages: int = PAGES, **limits: float) -> AsyncIterator[Guest]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = SocketHints(ours, pages, Limits(**limits))
    try:
        yield Guest(channel, theirs)
    finally:
        channel.close()
        theirs.close()


def ranges(*pairs: tuple[int, int], epoch: int = 7) -> Ranges:
    """In bytes: start, one behind the last."""
    return Ranges(epoch, tuple((start, stop - start) for start, stop in pairs))


def bits(*pages: int, size: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(-(-size // 8), "little")


# -- the conversation -----------------------------------------------------------------------------------


async def test_the_guest_is_greeted_asked_and_told_when_it_is_over() -> None:
    async with hinting() as guest:
        assert await guest.hear() == Greet()
        await guest.request(7)
        assert await guest.hear() == Request(7)
        await guest.request(8)
        assert await guest.hear() == Request(8)
        await guest.channel.done()
        assert await guest.hear() == Done(8)
        await guest.channel.done()  # nothing to end, nothing to say
        await guest.request(9)
        assert await guest.hear() == Request(9)


@pytest.mark.parametrize(
    ("hello", "contract"),
    [
        (HELLO, FreeContract.ANYTHING),
        (Hello(FreeContract.ZERO, Strength.WEAK, 4096, PAGES), FreeContract.ZERO),
        (Hello(FreeContract.NONE, Strength.STRONG, 4096, PAGES), FreeContract.NONE),
        (Hello(77, Strength.STRONG, 4096, PAGES), FreeContract.NONE),
        (Hello(FreeContract.ANYTHING, Strength.STRONG, 65536, PAGES), FreeContract.NONE),
        (Hello(FreeContract.ANYTHING, Strength.STRONG, 4096, PAGES + 1), FreeContract.NONE),
        (Hello(FreeContract.ANYTHING, Strength.STRONG, 4096, 0), FreeContract.NONE),
        (Hello(FreeContract.ANYTHING, Strength.STRONG, 4096, PAGES, version=2), FreeContract.NONE),
    ],
)
async def test_the_contract_holds_only_if_everything_fits(hello: Hello, contract: FreeContract) -> None:
    async with hinting() as guest:
        await guest.say(hello)
        assert await guest.channel.declare(10) is contract


async def test_the_newest_declaration_counts_as_the_guest_may_have_been_restarted() -> None:
    async with hinting() as guest:
        await guest.say(HELLO, Hello(FreeContract.NONE, 1, 4096, PAGES))
        assert await guest.channel.declare(10) is FreeContract.NONE


async def test_no_declaration_in_time_is_none_and_a_later_one_counts_next_time() -> None:
    async with hinting() as guest:
        assert await guest.channel.declare(0.01) is FreeContract.NONE
        await guest.say(HELLO)
        assert await guest.channel.declare(10) is FreeContract.ANYTHING


async def test_a_guest_that_has_declared_nothing_is_greeted_again_as_the_first_time_may_be_lost() -> None:
    """An agent that ended with the greeting unread took it along: the next one never heard of it."""
    async with hinting() as guest:
        assert await guest.hear() == Greet()
        assert await guest.channel.declare(0.01) is FreeContract.NONE
        assert await guest.hear() == Greet()
        await guest.say(HELLO)
        assert await guest.channel.declare(10) is FreeContract.ANYTHING
        await guest.request(7)
        assert await guest.hear() == Request(7)


# -- what an answer means ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pairs", "pages", "rejected"),
    [
        ("whole pages", [(4096, 12288)], [(1, 3)], 0),
        ("all of RAM", [(0, RAM)], [(0, PAGES)], 0),
        ("the last page", [(RAM - 4096, RAM)], [(PAGES - 1, PAGES)], 0),
        ("a byte more in front", [(4095, 12288)], [(1, 3)], 0),
        ("a byte less in front", [(4097, 12288)], [(2, 3)], 0),
        ("a byte less behind", [(4096, 12287)], [(1, 2)], 0),
        ("a byte more behind", [(4096, 12289)], [(1, 3)], 0),
        ("within a page", [(5000, 6000)], [], 0),
        ("all of a page but a byte", [(4096, 8191)], [], 0),
        ("over an edge, no whole page", [(4000, 9000)], [(1, 2)], 0),
        ("two halves of a page", [(4096, 6144), (6144, 8192)], [], 0),
        ("two that touch", [(0, 4096), (4096, 8192)], [(0, 2)], 0),
        ("in any order", [(8192, 12288), (0, 4096)], [(0, 1), (2, 3)], 0),
        ("one of no length", [(4096, 4096), (8192, 12288)], [(2, 3)], 1),
        ("one that overlaps", [(0, 8192), (4096, 12288)], [(0, 2)], 1),
        ("the same twice", [(0, 4096), (0, 4096)], [(0, 1)], 1),
        ("beyond RAM", [(0, 4096), (RAM, RAM + 4096)], [(0, 1)], 1),
        ("partly beyond RAM", [(RAM - 4096, RAM + 4096), (0, 4096)], [(0, 1)], 1),
        ("far beyond RAM", [((1 << 64) - 4096, (1 << 64) - 1), (0, 4096)], [(0, 1)], 1),
        ("a sum beyond 64 bits", [((1 << 64) - 4096, (1 << 65) - 4097), (0, 4096)], [(0, 1)], 1),
        ("everything there could be", [(0, (1 << 64) - 1), (4096, 8192)], [(1, 2)], 1),
    ],
)
async def test_ranges_are_rounded_inwards_and_bad_ones_refused_one_by_one(
    name: str, pairs: Runs, pages: Runs, rejected: int
) -> None:
    """Outwards would free a page that the guest uses (W05)."""
    async with hinting() as guest:
        await guest.request()
        assert await guest.runs(ranges(*pairs)) == pages
        assert guest.channel.rejected == rejected
        assert not guest.channel.distrusted


async def test_sub_page_ranges_never_hint_a_page_however_they_are_cut() -> None:
    rng = random.Random(5)
    async with hinting() as guest:
        await guest.request()
        said: Runs = []
        free = [False] * RAM
        for _ in range(200):
            start = rng.randrange(RAM - 20_000)
            stop = start + rng.randrange(1, 20_000)
            if not any(free[start:stop]):
                free[start:stop] = [True] * (stop - start)
                said.append((start, stop))
        found = await guest.runs(ranges(*said))
        assert found
        for first, last in found:
            assert all(free[first * 4096 : last * 4096])


@pytest.mark.parametrize(
    ("name", "frame", "pages", "rejected"),
    [
        ("from the beginning", Bitmap(7, 0, 20, bits(0, 1, 19, size=20)), [(0, 2), (19, 20)], 0),
        ("from a later page", Bitmap(7, 64 * 4096, 3, b"\x05"), [(64, 65), (66, 67)], 0),
        ("to the last page", Bitmap(7, 960 * 4096, 40, b"\xff" * 5), [(960, 1000)], 0),
        ("all of RAM", Bitmap(7, 0, PAGES, b"\xff" * 125), [(0, 1000)], 0),
        ("empty", Bitmap(7, 0, 8, b"\0"), [], 0),
        ("not at a page", Bitmap(7, 100, 8, b"\xff"), [], 1),
        ("not at a multiple of 64 pages", Bitmap(7, 4096, 8, b"\xff"), [], 1),
        ("a page beyond RAM", Bitmap(7, 960 * 4096, 41, b"\xff" * 5 + b"\1"), [], 1),
        ("far beyond RAM", Bitmap(7, 1 << 50, 8, b"\xff"), [], 1),
        ("at the end of all addresses", Bitmap(7, (1 << 64) - 64 * 4096, 8, b"\xff"), [], 1),
    ],
)
async def test_bitmaps(name: str, frame: Bitmap, pages: Runs, rejected: int) -> None:
    async with hinting() as guest:
        await guest.request()
        assert await guest.runs(frame) == pages
        assert guest.channel.rejected == rejected


async def test_a_page_named_in_two_frames_of_an_answer_is_refused_the_second_time() -> None:
    async with hinting() as guest:
        await guest.request()
        found = await guest.runs(ranges((0, 8192)), Bitmap(7, 0, 8, b"\x06"), ranges((12288, 16384)))
        assert found == [(0, 2), (3, 4)]
        assert guest.channel.rejected == 1


async def test_a_next_answer_may_name_the_same_pages_again() -> None:
    async with hinting() as guest:
        for epoch in (7, 8):
            await guest.request(epoch)
            await guest.say(ranges((0, 4096), epoch=epoch), End(epoch, 1))
            assert await complete(guest.channel, epoch, 10)
        assert guest.found == [(7, [(0, 1)]), (8, [(0, 1)])]
        assert guest.channel.rejected == 0


async def test_hints_arrive_as_they_come_and_the_answer_is_complete_with_its_end_only() -> None:
    async with hinting() as guest:
        await guest.request()
        await guest.say(ranges((0, 4096)))
        assert guest.found == [(7, [(0, 1)])]
        assert not await complete(guest.channel, 7, 0.01)
        await guest.say(End(7, 1))
        assert await complete(guest.channel, 7, 10)
        assert not await complete(guest.channel, 6, 0.01)
        await guest.channel.done()
        assert not await complete(guest.channel, 7, 10)


async def test_an_answer_reaches_as_far_as_it_has_spoken() -> None:
    async with hinting() as guest:
        channel = guest.channel
        assert channel.reach(7) == PAGES, "nothing was asked for"
        await guest.request()
        assert (channel.reach(7), channel.reach(6)) == (0, PAGES)
        await channel.reached(7, 1, 0.01)
        await channel.reached(6, 1, 10)
        await guest.say(ranges((8192, 12288)), ranges((0, 4096)))
        assert channel.reach(7) == 3
        await channel.reached(7, 3, 10)
        waiting = asyncio.ensure_future(channel.reached(7, PAGES + 1, 10))
        await guest.say(Bitmap(7, 64 * 4096, 3, b"\x05"))
        assert channel.reach(7) == 67
        assert not waiting.done()
        await guest.say(End(7, 4))
        await waiting
        assert channel.reach(7) == PAGES
        await guest.request(8)
        assert (channel.reach(7), channel.reach(8)) == (PAGES, 0)
        await channel.done()
        assert channel.reach(8) == PAGES


# -- at the wrong time --------------------------------------------------------------------------------------


async def test_hints_that_nobody_asked_for_are_dropped() -> None:
    async with hinting() as guest:
        await guest.say(HELLO, ranges((0, 4096)), End(7, 1))
        await guest.request()
        await guest.channel.done()
        await guest.say(ranges((4096, 8192)), End(7, 1))
        assert guest.found == []
        await guest.request(8)
        assert await guest.runs(ranges((8192, 12288), epoch=8), epoch=8) == [(2, 3)]


async def test_another_epoch_is_for_the_ledger_to_refuse_and_does_not_end_the_answer() -> None:
    async with hinting() as guest:
        await guest.request(7)
        await guest.say(ranges((0, 4096), epoch=6), End(6, 1), End(8, 1))
        assert guest.found == [(6, [(0, 1)])]
        assert not await complete(guest.channel, 7, 0.01)
        assert guest.channel.rejected == 0
        # Nor does it count as named already.
        await guest.say(ranges((0, 4096), epoch=7))
        assert guest.found[-1] == (7, [(0, 1)])


async def test_an_answer_after_its_window_does_not_count() -> None:
    async with hinting(hint_window_s=0.03) as guest:
        await guest.request()
        await guest.say(ranges((0, 4096)))
        await asyncio.sleep(0.05)
        await guest.say(ranges((4096, 8192)), End(7, 2))
        assert guest.found == [(7, [(0, 1)])]
        assert not await complete(guest.channel, 7, 0.01)


async def test_a_silent_guest_costs_the_time_it_is_given_and_no_more() -> None:
    async with hinting() as guest:
        assert await guest.channel.declare(0.01) is FreeContract.NONE
        await guest.request()
        assert not await complete(guest.channel, 7, 0.01)
        await guest.channel.done()


async def test_a_guest_that_does_not_read_is_asked_without_waiting() -> None:
    async with hinting() as guest:
        for epoch in range(20_000):  # beyond any socket buffer
            await guest.request(epoch)
        await guest.channel.done()


# -- a guest that ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(0, 60, 7))
async def test_the_end_of_the_channel_at_any_byte(cut: int) -> None:
    async with hinting() as guest:
        await guest.request()
        await guest.say(hints.encode(ranges((0, 4096), (8192, 12288)))[:cut])
        guest.sock.close()
        await guest.read()
        assert not await complete(guest.channel, 7, 0.01)
        assert await guest.channel.declare(0.01) is FreeContract.NONE
        await guest.request(8)
        assert not await complete(guest.channel, 8, 0.01)
        await guest.channel.done()
        assert not guest.channel.distrusted
        assert guest.found == [(7, [(0, 1), (2, 3)])] * (cut == 60)


async def test_closing_twice_and_speaking_afterwards() -> None:
    async with hinting() as guest:
        guest.channel.close()
        guest.channel.close()
        await guest.request()
        await guest.channel.done()
        assert guest.sock.recv(100)[:4] == b"fpH1"
        assert guest.sock.recv(100) == b""


# -- a guest that lies --------------------------------------------------------------------------------------


async def test_garbage_is_skipped_and_counted() -> None:
    async with hinting() as guest:
        await guest.request()
        assert await guest.runs(ranges((0, 4096))) == [(0, 1)]
        await guest.request(8)
        await guest.say(b"garbage", ranges((4096, 8192), epoch=8), b"fpH1" * 9, End(8, 1))
        assert await complete(guest.channel, 8, 10)
        assert guest.found[-1] == (8, [(1, 2)])
        assert 0 < guest.channel.rejected < 5
        assert not guest.channel.distrusted


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ranges beyond RAM", hints.encode(ranges((RAM, RAM + 4096)))),
        ("ranges of no length", hints.encode(Ranges(7, ((0, 0),)))),
        ("bitmaps beyond RAM", hints.encode(Bitmap(7, 1 << 40, 8, b"\xff"))),
        ("a daemon's frames", hints.encode(Request(7))),
        ("frames of a wrong length", hints.encode(Ranges(7, ((0, 4096),)))),
    ],
)
async def test_after_too_many_bad_records_the_channel_is_closed(name: str, bad: bytes) -> None:
    if name == "frames of a wrong length":
        head = struct.pack("<4sBBHIQI", b"fpH1", 4, 0, 0, 3, 7, zlib.crc32(b"abc"))
        bad = head + struct.pack("<I", zlib.crc32(head)) + b"abc"
    async with hinting() as guest:
        await guest.request()
        await guest.say(bad * MAX_REJECTED)
        assert guest.channel.rejected == MAX_REJECTED
        assert not guest.channel.distrusted
        assert await guest.runs(ranges((0, 4096))) == [(0, 1)]
        await guest.say(bad)
        assert guest.channel.distrusted
        assert not guest.channel._open
        # Whoever waited waits no more, and nothing else counts.
        assert await complete(guest.channel, 7, 10)
        before = list(guest.found)
        await guest.request(8)
        assert not await complete(guest.channel, 8, 0.01)
        assert guest.found == before


async def test_a_frame_with_one_record_too_many_bad_ones() -> None:
    bad = Ranges(7, ((RAM, 4096),) * (MAX_REJECTED + 1))
    async with hinting() as guest:
        await guest.request()
        await guest.say(bad, ranges((0, 4096)))
        assert guest.channel.distrusted


async def test_garbage_without_end_closes_the_channel() -> None:
    noise = random.Random(3).randbytes(1 << 20)
    async with hinting() as guest:
        await guest.request()
        for _ in range(20):
            await guest.say(noise)
        assert guest.channel.distrusted
        assert guest.found == []


async def test_valid_frames_without_end_are_a_flood() -> None:
    empty = hints.encode(Ranges(7, ())) * 1000
    async with hinting() as guest:
        await guest.request()
        sent = 0
        while not guest.channel.distrusted:
            await guest.say(empty)
            sent += 1
        assert (4 << 20) // len(empty) <= sent < (5 << 20) // len(empty)


@pytest.mark.parametrize("asked", ["and has time", "and the time is over", "never"])
async def test_a_flood_of_bitmaps_is_measured_by_what_they_unpack_to(asked: str) -> None:
    """A few kilobytes that unpack to a megabyte cost a millisecond, and as bytes few of them are no flood."""
    pages = hints.MAX_BITMAP_PAGES
    frame = hints.encode(Bitmap(7, 0, pages, bytes(pages // 8)))
    assert len(frame) < 5000
    window_s = 0.001 if asked == "and the time is over" else 60
    async with hinting(pages, hint_window_s=window_s) as guest:
        if asked != "never":
            await guest.request()
        await asyncio.sleep(0.01)
        sent = 0
        while not guest.channel.distrusted:
            await guest.say(frame)
            sent += 1
        enough = ((4 << 20) + 16 * pages) // (len(frame) + pages // 8)
        assert enough < sent <= enough + 2


async def test_the_worst_honest_answer_is_no_flood() -> None:
    """Every second page free, as ranges."""
    pairs = [(page * 4096, 4096) for page in range(0, 200_000, 2)]
    async with hinting(200_000) as guest:
        await guest.request()
        for frame in hints.encode_ranges(7, pairs):
            await guest.say(frame)
        await guest.say(End(7, len(pairs)))
        assert await complete(guest.channel, 7, 10)
        assert not guest.channel.distrusted
        assert guest.channel.rejected == 0
        assert sum(len(runs) for _, runs in guest.found) == len(pairs)


async def test_no_frame_holds_the_loop_up_for_longer_than_its_ranges_are_worth() -> None:
    """The other tasks of the loop run between two reads: a megabyte of ranges is not taken in at one go."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with hinting(1 << 20) as guest:
        await guest.request()
        other = asyncio.create_task(turn())
        pairs = [(page * 4096, 4096) for page in range(0, 131_072, 2)]
        data = b"".join(hints.encode_ranges(7, pairs))
        at_most = max(len(one) for one in hints.encode_ranges(7, pairs))
        assert at_most == 28 + 16 * hints.MAX_RANGES_PER_FRAME
        sending = asyncio.get_running_loop().sock_sendall(guest.sock, data)
        before = turns
        await sending
        await guest.say(End(7, len(pairs)))
        assert turns - before >= len(data) // (1 << 16)
        assert sum(len(runs) for _, runs in guest.found) == len(pairs)
        other.cancel()
        await asyncio.wait({other})


async def test_a_thousand_mutated_answers_raise_nothing_and_hint_nothing_outside() -> None:
    good = b"".join(
        hints.encode(one)
        for one in (
            HELLO,
            ranges((0, 8192), (20_000, 60_000)),
            Bitmap(7, 64 * 4096, 100, b"\x55" * 12 + b"\x05"),
            End(7, 9),
        )
    )
    rng = random.Random(11)
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    async with hinting() as guest:
        for epoch in range(1000):
            if guest.channel.distrusted:
                break
            await guest.request(7 if epoch % 2 else 8)
            data = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.choice((0, 1, 4))] = rng.randbytes(rng.choice((0, 1, 4)))
            await guest.say(bytes(data))
        allowed = PageBitmap(PAGES)
        for start, stop in ((0, 2), (5, 14), (64, 164)):
            allowed.add_run(start, stop)
        for _, runs in guest.found:
            for start, stop in runs:
                assert all(page in allowed for page in range(start, stop))
    assert errors == []
