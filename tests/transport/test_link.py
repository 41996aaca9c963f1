"""FrameLink and Dialogue over real TCP: messages, pings, silence, refusals, wrong ids, back-pressure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from migd.errors import PeerError, PeerLost, ProtocolError, Refused
from migd.host import ThreadWorker
from migd.limits import Limits
from migd.ram.bitmap import Run
from migd.ram.digest import frame_digest
from migd.transport.channel import SocketChannel
from migd.transport.link import FrameLink
from migd.wire import messages
from migd.wire.framing import Frame, FrameEncoder
from migd.wire.protocol import Codec, FrameType
from tests.transport.lines import ID, connected, in_dialogue, open_fds, tcp_pair

OTHER = "f" * 32
READY = messages.Ready(migration=ID)
QUICK = Limits(ping_s=0.02, dead_s=0.1)


# -- FrameLink ------------------------------------------------------------------------------------------


@pytest.fixture
def worker() -> Iterator[ThreadWorker]:
    worker = ThreadWorker(2)
    yield worker
    worker.close()


async def send_pages(
    link: FrameLink, runs: list[Run], digests: bytes, codec: Codec, payload: memoryview
) -> None:
    """As a session does it: in a thread as far as the socket takes it, the rest by the loop."""
    worker = ThreadWorker(1)
    try:
        await link.in_thread(worker, link.send_pages_now, runs, digests, codec, payload)
    finally:
        worker.close()
    await link.flush()


async def test_every_kind_of_frame_crosses_a_link() -> None:
    content = bytes(range(256)) * 32
    async with connected() as (link, peer):
        await link.send(READY)
        await send_pages(link, [(3, 5)], frame_digest(b"") * 2, Codec.NONE, memoryview(content))
        await link.send_runs(FrameType.FREE, [(0, 1), (5, 9)])
        await link.send_state(memoryview(b"state"))
        assert (await peer.hear()).message() == READY
        pages = await peer.hear()
        assert (pages.type, pages.page_runs(10)) == (FrameType.PAGES, [(3, 5)])
        assert bytes(pages.payload) == content
        assert (await peer.hear()).page_runs(10) == [(0, 1), (5, 9)]
        assert (await peer.hear()).metadata == b"state"
        assert peer.decoder.account == link.sent
        assert (link.sent.frames, link.sent.pages, link.sent.free) == (2, 2, 5)
        await peer.say(READY)
        assert (await link.receive()).message() == READY


async def test_sent_bytes_counts_every_byte() -> None:
    async with connected() as (link, peer):
        await link.send(READY)
        await send_pages(link, [(0, 1)], bytes(16), Codec.LZ4, memoryview(b"abc"))
        assert link.sent_bytes == len(FrameEncoder().message(READY)) + 48 + 8 + 16 + 3
        assert (await peer.hear()).type is FrameType.READY


async def test_frames_of_concurrent_senders_do_not_mix() -> None:
    content = memoryview(bytes(2 << 20))
    digests = bytes(16 * 512)
    async with connected() as (link, peer):
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                tasks.create_task(
                    send_pages(link, [(number * 512, number * 512 + 512)], digests, Codec.NONE, content)
                )
                tasks.create_task(link.send(messages.Barrier(migration=ID, iteration=number)))
            kinds = [(await peer.hear()).type for _ in range(16)]
        assert kinds.count(FrameType.PAGES) == kinds.count(FrameType.BARRIER) == 8
        assert peer.decoder.account == link.sent


async def test_a_frame_in_single_bytes_and_several_frames_at_once() -> None:
    async with connected() as (link, peer):
        for byte in peer.encoder.message(READY):
            await peer.send(bytes([byte]))
        assert (await link.receive()).message() == READY
        await peer.send(b"".join(peer.encoder.message(READY) for _ in range(100)))
        for _ in range(100):
            assert (await link.receive()).message() == READY


async def test_the_end_between_two_frames_is_a_lost_peer() -> None:
    async with connected() as (link, peer):
        await peer.say(READY)
        peer.sock.close()
        assert (await link.receive()).message() == READY
        with pytest.raises(PeerLost, match="closed the connection"):
            await link.receive()


@pytest.mark.parametrize("cut", [1, 47, 48, 60])
async def test_the_end_inside_a_frame_is_an_error(cut: int) -> None:
    async with connected() as (link, peer):
        await peer.send(peer.encoder.message(READY)[:cut])
        peer.sock.close()
        with pytest.raises(PeerLost, match="ended inside a frame"):
            await link.receive()


async def test_garbage_is_a_protocol_error() -> None:
    async with connected() as (link, peer):
        await peer.send(b"GET / HTTP/1.0\r\n\r\n" + bytes(100))
        with pytest.raises(ProtocolError, match="does not speak the migd protocol"):
            await link.receive()


# -- Dialogue: messages ---------------------------------------------------------------------------------


async def test_messages_arrive_in_order() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        for iteration in range(5):
            await peer.say(messages.Barrier(migration=ID, iteration=iteration))
        found = [await dialogue.expect(messages.Barrier, 5) for _ in range(5)]
        assert [barrier.iteration for barrier in found] == [0, 1, 2, 3, 4]


async def test_state_frames_arrive_among_messages() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        await peer.send(peer.encoder.state(b"one") + peer.encoder.state(b"two"))
        await peer.say(READY)
        found = [await dialogue.next("STATE", 5) for _ in range(3)]
        assert [one.metadata for one in found[:2] if isinstance(one, Frame)] == [b"one", b"two"]
        assert found[2] == READY


async def test_what_the_dialogue_sends() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        await dialogue.send(READY)
        await dialogue.send_state(memoryview(b"state"))
        assert await peer.heard() == READY
        assert (await peer.hear()).metadata == b"state"


async def test_another_message_than_expected_is_a_protocol_error() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        await peer.say(READY)
        with pytest.raises(ProtocolError, match="READY where STARTED was due"):
            await dialogue.expect(messages.Started, 5)
        await peer.send(peer.encoder.state(b"x"))
        with pytest.raises(ProtocolError, match="STATE where STARTED was due"):
            await dialogue.expect(messages.Started, 5)


async def test_nothing_in_time_is_a_lost_peer() -> None:
    async with in_dialogue() as (dialogue, _, _):
        with pytest.raises(PeerLost, match=r"no STARTED from the peer within 0\.02 s"):
            await dialogue.expect(messages.Started, 0.02)
        with pytest.raises(PeerLost, match=r"no STATE from the peer within 0\.02 s"):
            await dialogue.next("STATE", 0.02)


# -- Dialogue: signs of life ----------------------------------------------------------------------------


async def test_a_ping_is_answered_with_what_was_applied() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        dialogue.applied_bytes = 12345
        await peer.say(messages.Ping(migration=ID, nonce=7))
        assert await peer.heard() == messages.Pong(migration=ID, nonce=7, applied_bytes=12345)


async def test_a_pong_says_what_the_peer_applied() -> None:
    async with in_dialogue(Limits(ping_s=0.02)) as (dialogue, peer, _):
        for nonce in range(3):
            ping = await peer.heard()
            assert ping == messages.Ping(migration=ID, nonce=nonce)
            await peer.say(messages.Pong(migration=ID, nonce=nonce, applied_bytes=1000 * (nonce + 1)))
        await peer.say(READY)
        await dialogue.expect(messages.Ready, 5)
        assert dialogue.peer_applied_bytes == 3000


async def test_a_peer_is_asked_until_it_has_applied_enough() -> None:
    async with in_dialogue() as (dialogue, peer, _):
        waiting = asyncio.ensure_future(dialogue.applied(3000))
        for nonce in range(3):
            assert await peer.heard() == messages.Ping(migration=ID, nonce=nonce)
            assert not waiting.done()
            await peer.say(messages.Pong(migration=ID, nonce=nonce, applied_bytes=1000 * (nonce + 1)))
        await waiting
        await dialogue.applied(3000)  # it is known
        await dialogue.send(READY)
        assert await peer.heard() == READY, "and not asked for again"


async def test_silence_is_a_lost_peer() -> None:
    async with in_dialogue(QUICK) as (_, _, running):
        with pytest.raises(PeerLost, match="no sign of life from the peer for"):
            await asyncio.wait_for(running, 10)


async def test_a_peer_that_speaks_is_not_lost() -> None:
    async with in_dialogue(Limits(ping_s=0.02, dead_s=2)) as (_, peer, running):
        for _ in range(20):
            ping = await peer.heard()
            assert isinstance(ping, messages.Ping)
            await peer.say(messages.Pong(migration=ID, nonce=ping.nonce, applied_bytes=0))
        assert not running.done()


# -- Dialogue: how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        (messages.Abort(migration=ID, reason="operator"), PeerError, "the peer aborted: operator"),
        (messages.Refuse(migration=ID, reason="no room"), Refused, "the destination refused: no room"),
        (messages.Refuse(migration="0" * 32, reason="no room"), Refused, "the destination refused: no room"),
        (messages.Ready(migration=OTHER), ProtocolError, f"a READY of another migration \\({OTHER}\\)"),
        (messages.Ping(migration=OTHER, nonce=1), ProtocolError, "a PING of another migration"),
        (messages.Abort(migration=OTHER, reason="x"), ProtocolError, "an? ABORT of another migration"),
    ],
)
async def test_what_ends_a_dialogue(message: messages.Message, error: type[PeerError], text: str) -> None:
    async with in_dialogue() as (_, peer, running):
        await peer.say(message)
        with pytest.raises(error, match=text):  # bare, not in a group
            await asyncio.wait_for(running, 10)


async def test_page_records_have_no_place_in_a_dialogue() -> None:
    async with in_dialogue() as (_, peer, running):
        await peer.send(peer.encoder.runs(FrameType.ZERO, [(0, 1)]))
        with pytest.raises(ProtocolError, match="a ZERO frame where a message was expected"):
            await asyncio.wait_for(running, 10)


@pytest.mark.parametrize(
    ("data", "error"), [(b"", PeerLost), (b"MIGD", PeerLost), (bytes(48), ProtocolError)]
)
async def test_the_end_of_the_connection_ends_a_dialogue(data: bytes, error: type[PeerError]) -> None:
    async with in_dialogue() as (_, peer, running):
        await peer.send(data)
        peer.sock.close()
        with pytest.raises(error):
            await asyncio.wait_for(running, 10)


async def test_closing_a_dialogue_ends_it() -> None:
    async with in_dialogue() as (dialogue, _, running):
        for _ in range(5):
            await asyncio.sleep(0)
        dialogue.close()
        with pytest.raises(PeerLost, match="closed on this side"):
            await asyncio.wait_for(running, 10)


# -- back-pressure --------------------------------------------------------------------------------------


async def test_a_reader_that_does_not_keep_up_stops_the_sender() -> None:
    """Inbox and socket buffers are bounded: a peer that sends without end does not fill our memory."""
    chunk = bytes(1 << 20)
    async with in_dialogue() as (dialogue, peer, running):
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await peer.send(peer.encoder.state(chunk))
                sent += 1

        flooding = asyncio.create_task(flood())
        before = -1
        while before != sent:  # until it stands still
            before = sent
            await asyncio.sleep(0.1)
        assert not flooding.done()
        assert not running.done()
        assert dialogue._inbox.qsize() == 8
        assert sent < 64
        flooding.cancel()
        await asyncio.wait({flooding})
        for _ in range(sent):  # and all of it is there once somebody reads
            found = await dialogue.next("STATE", 10)
            assert isinstance(found, Frame)
            assert found.metadata == chunk


async def test_a_sender_waits_for_a_peer_that_does_not_read() -> None:
    content = memoryview(bytes(2 << 20))
    async with connected() as (link, peer):

        async def pour() -> None:
            for number in range(50):
                run = (number * 512, number * 512 + 512)
                await send_pages(link, [run], bytes(16 * 512), Codec.NONE, content)

        pouring = asyncio.create_task(pour())
        before = -1
        while before != link.sent_bytes:
            before = link.sent_bytes
            await asyncio.sleep(0.1)
        assert not pouring.done()
        for _ in range(50):
            await peer.hear()
        await pouring
        assert peer.decoder.account == link.sent


async def test_a_job_does_not_wait_for_a_peer_that_does_not_read(worker: ThreadWorker) -> None:
    content = memoryview(bytes(2 << 20))

    def until_congested(link: FrameLink) -> int:
        sent = 0
        while not link.congested:
            link.send_pages_now([(0, 512)], bytes(16 * 512), Codec.NONE, content)
            sent += 1
        return sent

    async with connected() as (link, peer):
        sent = await link.in_thread(worker, until_congested, link)
        assert 0 < sent < 64
        flushing = asyncio.create_task(link.flush())
        barrier = asyncio.create_task(link.send(messages.Barrier(migration=ID, iteration=0)))
        await asyncio.sleep(0.05)
        assert not flushing.done()
        kinds = [(await peer.hear()).type for _ in range(sent + 1)]
        assert kinds == [FrameType.PAGES] * sent + [FrameType.BARRIER]
        await flushing
        await barrier
        assert not link.congested
        assert peer.decoder.account == link.sent


async def test_a_job_takes_what_is_there_and_leaves_the_rest_to_the_loop(worker: ThreadWorker) -> None:
    def take_all(link: FrameLink) -> int:
        taken = 0
        while link.receive_now() is not None:
            taken += 1
        return taken

    async with connected() as (link, peer):
        data = b"".join(peer.encoder.message(READY) for _ in range(10))
        await peer.send(data[:-1])
        taken = 0
        while taken < 9:
            taken += await link.in_thread(worker, take_all, link)
        waiting = asyncio.create_task(link.receive())
        await asyncio.sleep(0)
        await peer.send(data[-1:])
        assert (await waiting).message() == READY
        peer.sock.close()
        with pytest.raises(PeerLost, match="closed the connection"):
            await link.in_thread(worker, take_all, link)


@pytest.mark.parametrize("job", ["sends", "receives"])
async def test_closing_a_link_ends_the_job_that_uses_it(worker: ThreadWorker, job: str) -> None:
    content = memoryview(bytes(2 << 20))
    begun = threading.Event()

    def for_ever(link: FrameLink) -> None:
        while True:
            if job == "sends":
                link.send_pages_now([(0, 512)], bytes(16 * 512), Codec.NONE, content)
                link._backlog.clear()
            else:
                link.receive_now()
            begun.set()

    async with connected() as (link, _):
        working = asyncio.create_task(link.in_thread(worker, for_ever, link))
        await asyncio.to_thread(begun.wait)
        link.close()
        with pytest.raises(PeerLost):
            await working


async def test_nothing_is_left_behind() -> None:
    before = open_fds()
    for _ in range(10):
        async with in_dialogue(QUICK) as (dialogue, peer, _):
            await peer.say(READY)
            await dialogue.expect(messages.Ready, 5)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_fds() <= before


async def test_two_links_face_to_face() -> None:
    ours, theirs = tcp_pair()
    a, b = FrameLink(SocketChannel(ours)), FrameLink(SocketChannel(theirs))
    await a.send_runs(FrameType.ZERO, [(0, 7)])
    await b.send_runs(FrameType.FREE, [(7, 9)])
    assert (await b.receive()).count == 7
    assert (await a.receive()).count == 2
    assert a.sent == b.received
    assert b.sent == a.received
    a.close()
    b.close()
