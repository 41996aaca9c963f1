"""Examination: all that `migd doctor` looks at, in the order in which it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from migd.config import Config
from migd.control.commands import GuestStatus
from migd.doctor import ceilings, clock, daemons, directory, kernel, memory, peer
from migd.doctor.finding import Finding
from migd.doctor.system import System
from migd.errors import PeerError
from migd.host import MonotonicClock
from migd.transport import probe


@dataclass(frozen=True)
class Examination:
    """This host, configured so, with daemons in these directories; ``to`` is a destination, or empty."""

    config: Config
    directories: Sequence[Path]
    to: str = ""

    def findings(self) -> Iterator[Finding]:
        """One after the other, as they are found. ConfigError if ``to`` is no address."""
        system = System()
        reports, of_daemons = daemons.statuses(self.directories)
        yield from self._kernel(system)
        yield from self._memory(system)
        yield ceilings.own_descriptors()
        for place in self.directories:
            yield from directory.examine(place)
        yield from of_daemons
        yield from daemons.listening(self.config.destination, reports)
        yield clock.synchronisation()
        yield from self._network(system, [guest for report in reports for guest in report.guests])

    def _kernel(self, system: System) -> Iterator[Finding]:
        yield from kernel.software()
        yield kernel.write_tracking(self.config.migration.dirty_log)
        yield kernel.soft_dirty()
        yield kernel.user_faults(system)
        yield kernel.sealing()
        yield kernel.process_handles()

    def _memory(self, system: System) -> Iterator[Finding]:
        ram = self.config.daemon.ram
        yield memory.room(ram)
        yield memory.huge_pages(system, ram)
        yield memory.swap(system)
        yield memory.memory_limit(system)

    def _network(self, system: System, guests: Sequence[GuestStatus]) -> Iterator[Finding]:
        if not self.to:
            yield ceilings.tcp_buffers(system, self.config, None)
            return
        try:
            answer = asyncio.run(probe.ask(self.to, MonotonicClock(), self.config.limits))
        except PeerError as error:
            yield peer.unreachable(self.to, str(error))
            return
        yield from peer.examine(self.to, answer, self.config.migration, guests)
        yield ceilings.tcp_buffers(system, self.config, answer.round_trip_s)
