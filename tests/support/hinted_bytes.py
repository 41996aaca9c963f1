"""A guest that hints bytes, not pages: half of every page that it uses is free, and it says so (R7).

What it sends goes through the real decoder and the real receiver. Only what those make of it gets into the
channel of the model.
"""

from __future__ import annotations

import asyncio
import socket
from functools import cache

from migd.guest import hints
from migd.guest.hint_receiver import SocketHints
from migd.limits import Limits
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from tests.support.answers import complete
from tests.support.ledger_model import Model
from tests.support.page_model import Page

_EPOCH = 1
_WHOLE = (0, PAGE_BYTES)
_SECOND_HALF = (PAGE_BYTES // 2, PAGE_BYTES // 2)


class HalfFreePages(Model):
    """The model of a guest with such an allocator; its hints are as good as their ``receiver``."""

    receiver: type[SocketHints] = SocketHints

    def hinted(self, page: Page) -> bool:
        return received(self.receiver, _SECOND_HALF if page.allocated else _WHOLE)


@cache
def received(receiver: type[SocketHints], free: tuple[int, int]) -> bool:
    """Whether the ledger hears of page 0 if the guest answers that these bytes, (start, length), are free."""
    return asyncio.run(_received(receiver, free))


async def _received(receiver: type[SocketHints], free: tuple[int, int]) -> bool:
    ours, theirs = socket.socketpair()
    heard = PageBitmap(2)
    channel = receiver(ours, heard.pages, Limits())
    try:
        await channel.request(_EPOCH, lambda _, pages: heard.__ior__(pages))
        for frame in hints.encode_ranges(_EPOCH, [free]):
            theirs.sendall(frame)
        theirs.sendall(hints.encode(hints.End(_EPOCH, heard.count())))
        assert await complete(channel, _EPOCH, 10)
    finally:
        channel.close()
        theirs.close()
    return 0 in heard
