"""The compare log against its contract (R19), round by round: dirty is what differs from the bytes last sent.

Unlike the kernel's log it does not say who wrote: a page whose old bytes are back is clean, one that was
changed past every mapping is dirty. Its harvest takes time, in which the guest may write and hints may come.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from migd.host import MonotonicClock, ThreadWorker
from migd.ledger.ledger import Ledger
from migd.ram.bitmap import PageBitmap, runs_of
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.contract import FreeContract
from migd.ram.digest import KEY_BYTES, joined_digests
from migd.ram.layout import RamLayout
from migd.source.compare_log import CompareLog
from migd.source.sent_image import SentImage
from tests.support.armed_writer import ArmedWriter, Manner
from tests.support.placing import put_pages

PAGES = 256
ROUNDS = 150


class Source:
    """RAM in two blocks, an attempt by the compare log, and what the destination has: real bytes."""

    def __init__(self) -> None:
        self.ram = RamLayout([RamBlock.create(BlockShape(name, PAGES // 2)) for name in "ab"])
        self.ledger: Ledger[PageBitmap] = Ledger(PAGES, PageBitmap)
        self.worker = ThreadWorker(2)
        self.image = SentImage(self.ram, self.worker, lanes=2, key=bytes(range(KEY_BYTES)))
        self.log = CompareLog(self.image, self.ledger, MonotonicClock())
        self.destination = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        self.ledger.arm(FreeContract.ANYTHING, sees_writes=False)
        self.ledger.mark_holes(self.ledger.to_send - self.ram.touched())

    def content(self) -> np.ndarray:
        return self.ram.read(np.arange(PAGES), np.empty((PAGES, PAGE_BYTES), np.uint8))

    def store(self, page: int, content: int) -> None:
        put_pages(self.ram, np.array([page]), np.full((1, PAGE_BYTES), content, np.uint8))

    def send(self) -> None:
        """What is to send, as the batcher does: a copy first, and all else from that."""
        while picked := self.ledger.pick(16):
            indices = picked.indices()
            copies = self.ram.read(indices, np.empty((len(indices), PAGE_BYTES), np.uint8)).copy()
            self.destination[indices] = copies
            full = copies.any(axis=1)
            zero, content = PageBitmap.of(PAGES, indices[~full]), copies[full]
            self.image.digests.put(runs_of(indices[full]), content, joined_digests(content))
            self.image.digests.clear(list((zero & self.ledger.zero_records(zero)).runs()))
            self.ledger.zeroed(zero)
            self.ledger.sent_pages(picked - zero)
        self.ledger.barrier()

    def differing(self) -> set[int]:
        """Byte by byte, without any digest."""
        return set(np.flatnonzero((self.content() != self.destination).any(axis=1)).tolist())

    async def harvest(self) -> set[int]:
        dirty = await self.log.harvest()
        self.ledger.harvest(dirty)
        return set(dirty.indices().tolist())

    def close(self) -> None:
        self.worker.close()
        self.ram.close()


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.close()


async def test_each_harvest_is_exactly_what_differs_from_what_was_sent(source: Source) -> None:
    """A page has one of three contents, zeros among them: bytes come back, and pages become zero."""
    chance = random.Random(5)
    came_back = 0
    for _ in range(ROUNDS):
        source.send()
        written = {chance.randrange(PAGES) for _ in range(chance.randrange(30))}
        for page in written:
            source.store(page, chance.randrange(3))
        differing = source.differing()
        came_back += len(written - differing)
        assert differing <= written
        assert await source.harvest() == differing
    assert came_back > ROUNDS


async def test_what_is_not_sent_again_stays_dirty(source: Source) -> None:
    """There is no mark that a harvest could clear: here nothing is sent between two."""
    source.send()
    source.store(3, 1)
    for _ in range(3):
        dirty = await source.log.harvest()
        assert dirty == PageBitmap.of(PAGES, [3])


async def test_skipped_pages_are_none_of_its_business(source: Source) -> None:
    """Until the pause: then the guest's bitmap decides, not the log (W24)."""
    chance = random.Random(6)
    source.send()
    for _ in range(ROUNDS):
        page = chance.randrange(PAGES)
        source.store(page, chance.randrange(1, 250))
        await source.harvest()
        source.ledger.hint(source.ledger.issue(), PageBitmap.of(PAGES, [page]))
        source.store(page, chance.randrange(250))
        assert page not in await source.harvest()
        assert source.ledger.settle(PageBitmap(PAGES), trim=False) > 0
        assert page in source.ledger.to_send
        source.send()


@pytest.mark.parametrize("threads", [1, 3])
async def test_a_race_with_a_writer_loses_nothing(source: Source, threads: int) -> None:
    """What is written behind a harvest, while it runs, is in the next; at the end nothing is left."""
    writer = ArmedWriter(source.ram.blocks)
    writer.race(threads, seed=1)
    for number in range(1, 40):
        writer.turn(number, threads)
        source.send()
        await source.harvest()
    writer.stop()
    writer.write(Manner.ACROSS, [PAGES // 2 - 1], 7)
    writer.close()
    differing = source.differing()
    source.ledger.harvest(await source.log.harvest())
    assert differing <= set(source.ledger.to_send.indices().tolist())
    source.send()
    assert source.differing() == set()
    assert not await source.log.harvest()
