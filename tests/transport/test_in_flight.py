"""Buffers for frames in flight as tasks wait for them, and frames that are read into them."""

from __future__ import annotations

import asyncio

import numpy as np

from migd.ram.digest import page_digests
from migd.transport.in_flight import MigrationRoom, SharedRoom
from migd.wire.protocol import MAX_PAYLOAD_BYTES, Codec, FrameType
from tests.transport.lines import connected

PAGES = np.arange(2 * 4096, dtype=np.uint64).astype(np.uint8).reshape(2, 4096)
CONTENT = PAGES.tobytes()


async def test_a_slot_is_two_mib_and_the_same_until_it_is_given_back() -> None:
    slot = SharedRoom(4).open().slot()
    buffer = await slot.take()
    assert len(buffer) == MAX_PAYLOAD_BYTES
    assert (await slot.take()).obj is buffer.obj
    slot.give_back()
    slot.give_back()
    assert not slot.wanted


async def test_who_waits_is_seen_and_gets_the_buffer_that_is_given_back() -> None:
    room = SharedRoom(1)
    first, second = room.open().slot(), room.open().slot()
    buffer = await first.take()
    waiting = asyncio.create_task(second.take())
    await asyncio.sleep(0)
    assert first.wanted
    first.give_back()
    assert (await asyncio.wait_for(waiting, 10)).obj is buffer.obj


async def test_one_that_is_cancelled_leaves_its_place_to_the_next() -> None:
    room = SharedRoom(1)
    held = room.open().slot()
    await held.take()
    tasks = [asyncio.create_task(room.open().slot().take()) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()  # while it waits
    held.give_back()
    tasks[1].cancel()  # at the moment when it was granted
    await asyncio.wait_for(tasks[2], 10)
    await asyncio.wait(tasks)


async def test_many_streams_of_many_migrations_with_barriers_come_to_an_end() -> None:
    """64 streams and two buffers: nobody holds one at a barrier that others need to get there."""
    room, sent = SharedRoom(2), []

    async def stream(migration: MigrationRoom, barrier: asyncio.Barrier) -> None:
        slot = migration.slot()
        for _ in range(5):
            for _ in range(3):
                await slot.take()
                await asyncio.sleep(0)
                slot.give_back()
                sent.append(1)
            await barrier.wait()

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for _ in range(8):
            migration, barrier = room.open(), asyncio.Barrier(8)
            for _ in range(8):
                tasks.create_task(stream(migration, barrier))
    assert len(sent) == 8 * 8 * 5 * 3


# -- a link whose payloads are lent their buffers ---------------------------------------------------------


async def test_a_payload_waits_for_its_buffer_and_is_read_into_it() -> None:
    async with connected() as (link, peer):
        link.lend(None)
        digests = page_digests(PAGES).tobytes()
        header = peer.encoder.pages([(3, 5)], digests, Codec.NONE, len(CONTENT))
        await peer.send(header + CONTENT + peer.encoder.runs(FrameType.ZERO, [(0, 1)]))
        assert link.at_boundary
        with link._channel.held():
            while not link.starved:
                assert link.receive_now() is None
            assert link.receive_now() is None
        assert not link.at_boundary
        assert link.received_bytes == len(header)
        buffer = bytearray(MAX_PAYLOAD_BYTES)
        link.lend(memoryview(buffer))
        frame = await link.receive()
        assert bytes(frame.payload) == CONTENT == bytes(buffer[: len(CONTENT)])
        assert link.at_boundary
        link.lend(None)
        assert (await link.receive()).type is FrameType.ZERO, "a record without a payload needs no buffer"


async def test_receive_asks_for_a_buffer_when_a_payload_is_due() -> None:
    asked = []

    async def lend() -> memoryview:
        asked.append(1)
        return memoryview(bytearray(MAX_PAYLOAD_BYTES))

    async with connected() as (link, peer):
        link.lend(None)
        await peer.send(peer.encoder.runs(FrameType.FREE, [(0, 1)]))
        assert (await link.receive(lend)).type is FrameType.FREE
        assert not asked
        for _ in range(2):
            digests = page_digests(PAGES).tobytes()
            await peer.send(peer.encoder.pages([(3, 5)], digests, Codec.NONE, len(CONTENT)) + CONTENT)
            assert bytes((await link.receive(lend)).payload) == CONTENT
        assert len(asked) == 1, "it is kept until it is taken back"
