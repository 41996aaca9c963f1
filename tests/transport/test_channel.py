"""SocketChannel over real TCP: errors become PeerLost, and closing wakes whoever waits, on both loops."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from migd.errors import PeerLost
from migd.tasks import guarded
from migd.transport.channel import USER_TIMEOUT_MS, SocketChannel
from tests.transport.lines import open_fds, tcp_pair

BIG = bytes(64 << 20)
"""More than all socket buffers between two ends hold."""


async def received(channel: SocketChannel, size: int = 100) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: await channel.receive_into(memoryview(buffer))])


async def begun(task: asyncio.Task[object]) -> None:
    """Let a task run until it waits for its socket."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()


async def test_bytes_go_both_ways_and_the_end_is_zero() -> None:
    ours, theirs = tcp_pair()
    a, b = SocketChannel(ours), SocketChannel(theirs)
    await a.send(b"hello")
    assert await received(b) == b"hello"
    await b.send(memoryview(b"there"))
    assert await received(a) == b"there"
    a.close()
    assert await received(b) == b""
    b.close()


async def test_socket_options() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS
    assert ours.gettimeout() == 0
    channel.close()
    theirs.close()


async def test_a_reset_is_peer_lost() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(PeerLost, match="connection lost: Connection reset by peer"):
        await received(channel)
    with pytest.raises(PeerLost, match="connection lost"):
        await channel.send(b"x")
    channel.close()


async def test_closing_wakes_a_waiting_receiver() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    waiting = asyncio.create_task(received(channel))
    await begun(waiting)
    channel.close()
    with pytest.raises(PeerLost, match="closed on this side"):
        await asyncio.wait_for(waiting, 10)
    assert ours.fileno() == -1
    theirs.close()


async def test_closing_wakes_a_waiting_sender() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    sending = asyncio.create_task(channel.send(BIG))
    await begun(sending)
    channel.close()
    with pytest.raises(PeerLost):
        await asyncio.wait_for(sending, 10)
    assert ours.fileno() == -1
    theirs.close()


async def test_closing_wakes_a_sender_and_a_receiver_at_once() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    tasks = [asyncio.create_task(received(channel)), asyncio.create_task(channel.send(BIG))]
    for task in tasks:
        await begun(task)
    channel.close()
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [type(one) for one in ended] == [PeerLost, PeerLost]
    assert ours.fileno() == -1
    theirs.close()


async def test_a_descriptor_that_is_used_again_is_watched_again() -> None:
    """The trap: a loop that still watches a closed descriptor is deaf to the next socket of its number."""
    for _ in range(20):
        ours, theirs = tcp_pair()
        channel = SocketChannel(ours)
        waiting = asyncio.create_task(received(channel))
        await begun(waiting)
        channel.close()
        with pytest.raises(PeerLost):
            await asyncio.wait_for(waiting, 10)
        theirs.close()
        again, far = tcp_pair()
        second = SocketChannel(again)
        waiting = asyncio.create_task(received(second))
        await begun(waiting)
        far.sendall(b"awake")
        assert await asyncio.wait_for(waiting, 10) == b"awake"
        second.close()
        far.close()


async def test_a_task_group_that_fails_beside_a_receiver_leaves_nothing_behind() -> None:
    before = open_fds()
    for _ in range(10):
        ours, theirs = tcp_pair()
        channel = SocketChannel(ours)

        async def fail(channel: SocketChannel = channel) -> None:
            await asyncio.sleep(0)
            channel.close()
            raise PeerLost("elsewhere")

        with pytest.raises(PeerLost, match="elsewhere"):
            await guarded(received(channel), channel.send(BIG), fail())
        theirs.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_fds() <= before


async def test_a_cancelled_receiver_leaves_the_channel_usable() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    waiting = asyncio.create_task(received(channel))
    await begun(waiting)
    waiting.cancel()
    await asyncio.wait({waiting})
    theirs.sendall(b"later")
    assert await received(channel) == b"later"
    channel.close()
    theirs.close()


async def test_cancelled_and_closed_in_the_same_breath() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    waiting = asyncio.create_task(received(channel))
    await begun(waiting)
    waiting.cancel()
    channel.close()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert ours.fileno() == -1
    theirs.close()


async def test_a_closed_channel_says_so() -> None:
    ours, theirs = tcp_pair()
    channel = SocketChannel(ours)
    channel.close()
    channel.close()
    with pytest.raises(PeerLost, match="closed on this side"):
        await received(channel)
    with pytest.raises(PeerLost, match="closed on this side"):
        await channel.send(b"x")
    theirs.close()
