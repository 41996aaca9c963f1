"""SentImage against RAM that the test changes page by page: exactly what differs, and no memory touched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from migd.errors import GuestError
from migd.host import ThreadWorker
from migd.ledger.ledger import Ledger
from migd.ram.bitmap import PageBitmap, PageIndices, runs_of
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.contract import FreeContract
from migd.ram.digest import KEY_BYTES, joined_digests
from migd.ram.layout import RamLayout
from migd.source import sent_image
from migd.source.sent_image import SentImage
from tests.support.placing import put_pages

PAGES = 300
KEYS = [b"", bytes(range(KEY_BYTES))]


class Sender:
    """RAM of two blocks, and an attempt in which some of its pages were sent, zero, or never touched."""

    def __init__(self, key: bytes, lanes: int) -> None:
        shapes = (BlockShape("ram0", 77), BlockShape("ram1", PAGES - 77))
        self.ram = RamLayout([RamBlock.create(shape) for shape in shapes])
        self.ledger: Ledger[PageBitmap] = Ledger(PAGES, PageBitmap)
        self.worker = ThreadWorker(2)
        self.image = SentImage(self.ram, self.worker, lanes=lanes, key=key)
        self._random = np.random.default_rng(1)

    def write(self, *pages: int, content: int | None = None) -> None:
        indices = np.array(sorted(pages))
        shape = (len(indices), PAGE_BYTES)
        random = self._random.integers(1, 256, shape, np.uint8)
        put_pages(self.ram, indices, random if content is None else np.full(shape, content, np.uint8))

    def read(self, indices: PageIndices) -> np.ndarray:
        return self.ram.read(indices, np.empty((len(indices), PAGE_BYTES), np.uint8))

    def send(self) -> None:
        """Arm, mark holes, and send the rest as it is."""
        self.ledger.arm(FreeContract.NONE)
        self.ledger.mark_holes(self.ledger.to_send - self.ram.touched())
        while picked := self.ledger.pick(64):
            indices = picked.indices()
            copies = self.read(indices)
            content = copies.any(axis=1)
            zero, copies = PageBitmap.of(PAGES, indices[~content]), copies[content]
            self.image.digests.put(runs_of(indices[content]), copies, joined_digests(copies))
            self.ledger.zeroed(zero)
            self.ledger.sent_pages(picked - zero)
        self.ledger.barrier()

    async def differing(self, pages: PageBitmap | None = None) -> list[int]:
        """Of these, or of all."""
        found = await self.image.differing(PageBitmap.full(PAGES) if pages is None else pages)
        return found.indices().tolist()

    def close(self) -> None:
        self.worker.close()
        self.ram.close()


@pytest.fixture(params=[(key, lanes) for key in KEYS for lanes in (1, 3)], ids=str)
def sender(request: pytest.FixtureRequest) -> Iterator[Sender]:
    sender = Sender(*request.param)
    sender.write(*range(60, 90), *range(200, 260))
    sender.write(5, 250, content=0)
    sender.send()
    yield sender
    sender.close()


async def test_nothing_differs_after_it_was_sent(sender: Sender) -> None:
    assert (sender.ledger.sent.count(), sender.ledger.zero.count(), sender.ledger.hole.count()) == (
        89,
        2,
        209,
    )
    assert await sender.differing() == []


@pytest.mark.parametrize("slice_pages", [1, 7, 1 << 14])
async def test_exactly_what_was_written_since_differs(
    sender: Sender, slice_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent pages, on either side of a block's border and cleared ones; zero pages; holes."""
    monkeypatch.setattr(sent_image, "_SLICE_PAGES", slice_pages)
    sender.write(60, 76, 77, 259)
    sender.write(201, content=0)
    sender.write(5, 0, 299)
    assert await sender.differing() == [0, 5, 60, 76, 77, 201, 259, 299]
    assert await sender.differing() == [0, 5, 60, 76, 77, 201, 259, 299]  # until they are sent again


async def test_zeros_written_to_what_is_zero_are_no_difference(sender: Sender) -> None:
    sender.write(0, 5, 299, content=0)
    assert await sender.differing() == []


async def test_pages_that_were_not_asked_for_are_not_looked_at(sender: Sender) -> None:
    sender.write(0, 1, 5, 60, 61, 62)
    assert await sender.differing(PageBitmap.of(PAGES, [1, 5, 62, 63])) == [1, 5, 62]
    assert await sender.differing(PageBitmap(PAGES)) == []


async def test_what_the_destination_holds_is_known_from_the_records_alone(sender: Sender) -> None:
    """FREE and ZERO take content away; whatever a ledger believes, such a page must be zero here."""
    content = PageBitmap.of(PAGES, [*range(60, 90), *range(200, 250), *range(251, 260)])
    assert sender.image.digests.held() == content
    sender.image.digests.clear([(70, 72), (259, 260)])
    assert sender.image.digests.held() == content - PageBitmap.of(PAGES, [70, 71, 259])
    assert await sender.differing() == [70, 71, 259]
    sender.write(70, 71, 259, content=0)
    assert await sender.differing() == []


async def test_content_that_stayed_there_although_the_page_is_zero_now_differs(sender: Sender) -> None:
    """W09: it was cleared here, and no ZERO record went."""
    sender.write(60, content=0)
    assert await sender.differing() == [60]
    sender.image.digests.clear([(60, 61)])
    assert await sender.differing() == []


async def test_looking_at_holes_allocates_nothing(sender: Sender) -> None:
    before = sender.ram.touched()
    await sender.differing()
    assert sender.ram.touched() == before


async def test_what_goes_wrong_in_a_lane_comes_out_bare(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a file that guests may truncate was truncated."""
    monkeypatch.setattr(sent_image, "_SLICE_PAGES", 7)

    def shrunk(*_: object) -> np.ndarray:
        raise GuestError("the file has shrunk")

    monkeypatch.setattr(sender.ram, "read", shrunk)
    with pytest.raises(GuestError, match="has shrunk"):
        await sender.differing()
