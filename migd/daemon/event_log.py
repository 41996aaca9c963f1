"""EventLog: the last events of a daemon, numbered, for any number of readers that may be slow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from migd.control.events import Event, Missed
from migd.host import utc_now

REMEMBERED = 1000
"""Events; a migration without much iterating has about 15."""


class EventLog:
    """A bounded ring. Readers have a place in it and no queue of their own, so a slow one costs nothing."""

    def __init__(self, daemon: str, remembered: int = REMEMBERED) -> None:
        """``daemon`` is the role that stands in every event."""
        self._daemon = daemon
        self._ring: deque[Event] = deque(maxlen=remembered)
        self._last_seq = 0
        self._news = asyncio.Event()

    def add(self, event: Event) -> None:
        """Number and date an event, and wake the readers."""
        self._last_seq += 1
        self._ring.append(self._dated(event, self._last_seq))
        self._news.set()
        self._news = asyncio.Event()

    def since(self, seq: int) -> list[Event]:
        """All that are remembered after number ``seq``; first, if any are forgotten, how many.

        A number that was not given yet is from before a restart of the daemon: then all of them.
        """
        after = seq if seq <= self._last_seq else 0
        found = [event for event in self._ring if event.seq > after]
        missed = self._last_seq - after - len(found)
        if missed:
            return [self._dated(Missed(events=missed), after + missed), *found]
        return found

    async def follow(self, seq: int, silence_s: float) -> AsyncIterator[list[Event]]:
        """The same, and then whatever comes, without end; an empty list after ``silence_s`` without any."""
        while True:
            news = self._news
            found = self.since(seq)
            if found:
                seq = found[-1].seq
                yield found
                continue
            try:
                async with asyncio.timeout(silence_s):
                    await news.wait()
            except TimeoutError:
                yield []

    def _dated(self, event: Event, seq: int) -> Event:
        return msgspec.structs.replace(event, seq=seq, time=utc_now(), daemon=self._daemon)
