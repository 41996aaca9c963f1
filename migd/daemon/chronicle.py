"""Chronicle: what happens in a daemon, told to its event log and, once over, to its history."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from migd.control import events
from migd.control.commands import Remembered
from migd.daemon.event_log import EventLog
from migd.daemon.history import History
from migd.guest.hosted import HostedGuest
from migd.host import utc_now
from migd.migration.ports import Passage, Worker
from migd.migration.stats import Arrival, Iteration, Result

Gate: TypeAlias = Callable[[str], Awaitable[None]]
"""Awaited with every state that a session enters, before it acts in it: tests hold it there."""


async def open_gate(_state: str) -> None:
    """Nobody holds anything."""


class Chronicle:
    """See ``migd.migration.ports.Observer`` and ``migd.guest.registry.GuestObserver``."""

    def __init__(self, log: EventLog, history: History, worker: Worker, gate: Gate = open_gate) -> None:
        self._log = log
        self._history = history
        self._worker = worker
        self._gate = gate

    def attached(self, guest: HostedGuest) -> None:
        self._log.add(
            events.GuestAttached(
                guest=guest.name, state=str(guest.state), pid=guest.pid, ram_bytes=guest.ram.bytes
            )
        )

    def detached(self, guest: HostedGuest) -> None:
        self._log.add(events.GuestDetached(guest=guest.name, pid=guest.pid))

    def began(self, passage: Passage) -> None:
        self._log.add(
            events.MigrationBegan(
                migration=passage.migration,
                guest=passage.guest,
                direction=passage.direction,
                peer=passage.peer,
            )
        )

    async def entered(self, passage: Passage, state: str) -> None:
        self._log.add(
            events.StateEntered(
                migration=passage.migration,
                guest=passage.guest,
                direction=passage.direction,
                state=str(state),
            )
        )
        await self._gate(state)

    def iterated(self, passage: Passage, iteration: Iteration) -> None:
        self._log.add(
            events.IterationEnded(migration=passage.migration, guest=passage.guest, iteration=iteration)
        )

    async def finished(self, passage: Passage, record: Result | Arrival) -> None:
        """Into the history first: who hears of the end finds it there."""
        await self._worker.run(self._history.append, Remembered(ended=utc_now(), record=record))
        self._log.add(
            events.MigrationFinished(
                migration=passage.migration,
                guest=passage.guest,
                direction=passage.direction,
                outcome=record.outcome,
                error=record.error,
                exit_code=record.exit_code,
            )
        )
