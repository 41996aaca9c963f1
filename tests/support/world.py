"""A small simulated world around the real Ledger: source RAM, dirty log, FIFO streams that race, destination.

Nothing in it knows the ledger's rules. At the end it compares what the guest holds with what arrived, for
every page whose content matters *to the guest*: never from a bitmap of the ledger. On the way there it says
which pages nobody remembers, by the state invariant of docs/safety.md.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from migd.ledger.ledger import Ledger
from migd.ram.bitmap import PageBitmap
from migd.ram.contract import FreeContract

ZERO = 0
BARRIER = "barrier"


@dataclass
class Batch:
    """Pages a stream has picked, and what it has read of them."""

    stream: int
    pages: list[int]
    free: bool = False
    read: dict[int, int] = field(default_factory=dict)


class World:
    """One guest and one migration after another. The content of a page is a number, each write a new one."""

    sees_writes = True

    def __init__(
        self,
        ledger: type[Ledger[Any]] = Ledger,
        *,
        pages: int = 4,
        contract: FreeContract = FreeContract.ANYTHING,
        free: set[int] | None = None,
        untouched: set[int] | None = None,
        sets: Any = PageBitmap,
        seed: int = 0,
    ) -> None:
        self.pages, self.contract, self.sets = pages, contract, sets
        self.ledger = ledger(pages, sets)
        self.allocated = set(range(pages)) - (free or set())
        self._last = 1000
        self.source = [1 + page for page in range(pages)]
        if contract is FreeContract.ZERO:
            self.source = [self.source[page] if page in self.allocated else ZERO for page in range(pages)]
        self.touched = set(range(pages)) - (untouched or set())
        self.source = [content if page in self.touched else ZERO for page, content in enumerate(self.source)]
        self.kernel: set[int] = set()
        self.found: set[int] = set()
        self.batches: list[Batch] = []
        self.armed = self.paused = self.harvested = False
        self.requests: deque[int] = deque()
        self.streams: list[deque[tuple[int, int] | str]] = [deque(), deque()]
        self.destination = [ZERO] * pages
        self.chance = random.Random(seed)

    def set(self, *pages: int) -> Any:
        return self.sets.of(self.pages, pages)

    # -- the guest ------------------------------------------------------------------------------------

    def write(self, *pages: int, content: int | None = None) -> None:
        """Write to pages, which allocates those that were free."""
        for page in pages:
            self._last += 1
            self.source[page] = self._last if content is None else content
            self.allocated.add(page)
            self.touched.add(page)
            if self.armed:
                self.kernel.add(page)

    def free(self, *pages: int) -> None:
        for page in pages:
            if self.contract is FreeContract.ZERO:
                self.write(page, content=ZERO)
            self.allocated.discard(page)

    def answer(self) -> tuple[int, Any]:
        """The guest reads a request, and only then looks at its free list (R5)."""
        return self.requests.popleft(), self.set(*set(range(self.pages)) - self.allocated)

    # -- the source daemon -----------------------------------------------------------------------------

    def arm(self) -> None:
        self._begin(armed=True)
        for stream in self.streams:
            stream.clear()
        self.destination = [ZERO] * self.pages
        self.ledger.arm(self.contract, sees_writes=self.sees_writes)

    def cancel(self) -> None:
        self._begin(armed=False)
        self.ledger.cancel()

    def _begin(self, *, armed: bool) -> None:
        self.armed, self.paused, self.harvested = armed, False, False
        self.kernel.clear()
        self.found = set()
        self.batches.clear()

    def request(self) -> int:
        epoch = self.ledger.issue()
        self.requests.append(epoch)
        return epoch

    def hint(self, answer: tuple[int, Any]) -> int:
        return self.ledger.hint(*answer)

    def pause(self) -> None:
        """The guest writes no more: the next harvest is the final one."""
        self.paused = True

    def look(self) -> None:
        """The first half of a harvest: read and clear, in one step (R3)."""
        self.found, self.kernel = set(self.kernel), set()

    def tell(self) -> int:
        """The second half: the ledger hears of what was found."""
        found, self.found = self.found, set()
        self.harvested = self.paused
        return self.ledger.harvest(self.set(*found))

    def harvest(self) -> int:
        self.look()
        return self.tell()

    def pick(self, stream: int, limit: int = 100) -> Batch:
        return self._picked(Batch(stream, indices(self.ledger.pick(limit))))

    def pick_free(self, stream: int, limit: int = 100) -> Batch:
        return self._picked(Batch(stream, indices(self.ledger.pick_free(limit)), free=True))

    def _picked(self, batch: Batch) -> Batch:
        if batch.pages:
            self.batches.append(batch)
        return batch

    def read(self, batch: Batch) -> Batch:
        batch.read = {page: ZERO if batch.free else self.source[page] for page in batch.pages}
        return batch

    def push(self, batch: Batch) -> None:
        """The batch's records, to the end of its stream."""
        if batch in self.batches:
            self.batches.remove(batch)
        stream = self.streams[batch.stream]
        if batch.free:
            stream.extend(batch.read.items())
            self.ledger.freed(self.set(*batch.pages))
            return
        zero = self.set(*(page for page, content in batch.read.items() if content == ZERO))
        data = self.set(*(page for page, content in batch.read.items() if content != ZERO))
        stream.extend((page, ZERO) for page in indices(self.ledger.zero_records(zero)))
        self.ledger.zeroed(zero)
        stream.extend((page, content) for page, content in batch.read.items() if content != ZERO)
        self.ledger.sent_pages(data)

    def barrier(self) -> None:
        self.ledger.barrier()
        for stream in self.streams:
            stream.append(BARRIER)

    def iterate(self) -> None:
        """Everything that can be sent in one iteration, over both streams in turn."""
        turn = 0
        while batch := self._next(turn % 2):
            self.push(self.read(batch))
            turn += 1
        self.barrier()

    def _next(self, stream: int) -> Batch | None:
        for pick in (self.pick_free, self.pick):
            if (batch := pick(stream, 3)).pages:
                return batch
        return None

    def finish(self, *, bitmap: bool = True, trim: bool = False) -> set[int]:
        """Pause, final harvest, final send, END, everything arrives. Returns the pages that are lost."""
        self.pause()
        self.harvest()
        if bitmap:
            self.ledger.settle(self.set(*set(range(self.pages)) - self.allocated), trim=trim)
        else:
            self.ledger.close_epoch()
        while self.ledger.to_send or self.ledger.free_pending:
            self.iterate()
        self.ledger.finish()
        self.drain()
        return self.lost()

    # -- the destination -----------------------------------------------------------------------------------

    def drain(self, first: int | None = None) -> None:
        """Apply every record. Streams race, ``first`` ahead of the other if given, but meet at barriers."""
        while any(self.streams):
            ready = [number for number, stream in enumerate(self.streams) if stream and stream[0] != BARRIER]
            if not ready:
                for stream in self.streams:
                    stream.popleft()
                continue
            number = first if first in ready else self.chance.choice(ready)
            page, content = self.streams[number].popleft()  # type: ignore[misc]
            self.destination[page] = content  # type: ignore[call-overload]

    def arrive(self, stream: int, records: int) -> None:
        """Up to so many records of one stream, as far as a barrier lets it."""
        queue = self.streams[stream]
        while records and queue and (queue[0] != BARRIER or all(s and s[0] == BARRIER for s in self.streams)):
            if queue[0] == BARRIER:
                for other in self.streams:
                    other.popleft()
                continue
            page, content = queue.popleft()  # type: ignore[misc]
            self.destination[page] = content  # type: ignore[call-overload]
            records -= 1

    def possible(self) -> list[set[int]]:
        """Of each page: what the destination may hold when every stream has drained, whichever is faster."""
        values = [{content} for content in self.destination]
        for segments in zip(*map(_segments, self.streams), strict=True):
            for page in set().union(*segments):
                values[page] = {segment[page] for segment in segments if page in segment}
        return values

    def remembered(self) -> set[int]:
        """Pages that somebody will still send."""
        return self.kernel | self.found | set(indices(self.ledger.to_send))

    def forgotten(self) -> set[int]:
        """Pages for which the invariant does not hold, and skipped ones that may not read as zero (R11)."""
        possible, remembered = self.possible(), self.remembered()
        held = {page: batch for batch in self.batches for page in batch.pages}
        owed = set(indices(self.ledger.free_pending))
        skipped = set(indices(self.ledger.skipped))
        doubted = set(indices(self.ledger._doubted))
        wrong = {page for page in skipped - owed if possible[page] != {ZERO}}
        matter = self.allocated if self.contract is not FreeContract.ZERO else range(self.pages)
        for page in set(matter) - remembered:
            right, batch = self.source[page], held.get(page)
            if batch is not None:
                reads = ZERO if batch.free else batch.read.get(page, right)
                kept = reads == right or page in doubted
            else:
                kept = possible[page] == {right} or (page in skipped & owed and right == ZERO)
            if not kept:
                wrong.add(page)
        return wrong

    def lost(self) -> set[int]:
        """Pages that are not what the guest expects to find."""
        wrong = {page for page in self.allocated if self.destination[page] != self.source[page]}
        if self.contract is FreeContract.ZERO:
            wrong |= {
                page
                for page in range(self.pages)
                if page not in self.allocated and self.destination[page] != ZERO
            }
        return wrong

    def stale(self) -> set[int]:
        """Pages skipped as free whose old content stayed at the destination after all (R11)."""
        return {page for page in indices(self.ledger.skipped) if self.destination[page] != ZERO}


class CompareWorld(World):
    """The same without a log of writes (R19): a page holds one of three contents, so that bytes come back."""

    sees_writes = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.source = [content and 1 for content in self.source]
        self.digests: dict[int, int] = {}

    def write(self, *pages: int, content: int | None = None) -> None:
        super().write(*pages, content=self.chance.randrange(1, 4) if content is None else content)

    def arm(self) -> None:
        self.digests.clear()
        super().arm()

    def push(self, batch: Batch) -> None:
        if not batch.free:
            self.digests.update(batch.read)  # of the copy, whatever the page holds by now (W25)
        super().push(batch)

    def differing(self) -> set[int]:
        """What a look at all of RAM would find now."""
        sent = {page for page in indices(self.ledger.sent) if self.source[page] != self.digests.get(page)}
        clear = indices(self.ledger.zero) + indices(self.ledger.hole)
        return sent | {page for page in clear if self.source[page] != ZERO}

    def look(self) -> None:
        self.found = self.differing()

    def remembered(self) -> set[int]:
        """Also what differs or is on its way, while one more look is to come; and what is skipped or about
        to be, while the guest's bitmap is to come."""
        pages = self.found | set(indices(self.ledger.to_send))
        if not self.harvested:
            pages |= self.differing() | set(indices(self.ledger.in_flight))
        if not self.ledger._settled:
            pages |= set(indices(self.ledger.skipped)) | set(indices(self.ledger._freeing))
        return pages


def indices(pages: Any) -> list[int]:
    return list(pages) if hasattr(pages, "__iter__") else pages.indices().tolist()


def _segments(stream: deque[tuple[int, int] | str]) -> list[dict[int, int]]:
    """Between every two barriers: the last record of each page."""
    segments: list[dict[int, int]] = [{}]
    for record in stream:
        if isinstance(record, str):
            segments.append({})
        else:
            segments[-1][record[0]] = record[1]
    return segments
