"""World: everything that one seed consists of, and the trace of all that happens in it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from migd.config import Config
from migd.migration.journal import Mark
from migd.migration.ports import Passage
from migd.migration.stats import Arrival, Iteration, Result
from tests.simulation.guest import GuestProcess, Temper
from tests.simulation.host import Host
from tests.simulation.life import Life
from tests.simulation.memory import Image
from tests.simulation.network import Network
from tests.simulation.oracle import Oracle

_STATE_BYTES = 24
_INTERLUDES = 0.3


class World:
    """See ``tests.simulation.host.Events``. ``said`` is called with everything; triggers listen to it."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.trace: list[str] = []
        self.wrongs: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.listeners: list[Callable[[str, str], object]] = []
        self.journal_moment: Callable[[Host, str, Mark], str] = lambda _host, _when, _mark: ""
        self.oracle = Oracle(self.wrong)
        self.network = Network(self._dice(), self._interlude)
        self._directory = directory
        self._tempers: dict[str, Temper] = {}
        self._images: dict[bytes, Image] = {}
        self.hosts: list[Host] = []
        self.processes: list[GuestProcess] = []
        """Those that run, or ran."""
        self.tasks: list[asyncio.Task[None]] = []
        """Of the world itself."""

    def _dice(self) -> random.Random:
        return random.Random(self.dice.random())

    def add_host(self, name: str, config: Config) -> Host:
        disk = self._directory / name
        host = Host(name, disk, self.network, self, config, self._dice(), self._tempers)
        self.hosts.append(host)
        return host

    def add_guest(self, host: Host, temper: Temper) -> GuestProcess:
        self._tempers[temper.name] = temper
        return host.new_guest(temper.name)

    @property
    def lives(self) -> list[Life]:
        """Of all daemons that ever were."""
        return [life for host in self.hosts for life in host.lives]

    # -- the trace --------------------------------------------------------------------------------------

    def said(self, who: str, what: str) -> None:
        self.trace.append(f"{self.loop.time() * 1e3:12.3f} ms  {who}: {what}")
        for listener in list(self.listeners):
            listener(who, what)

    def wrong(self, what: str) -> None:
        """A promise is broken."""
        self.trace.append(f"{self.loop.time() * 1e3:12.3f} ms  WRONG: {what}")
        self.wrongs.append(what)

    @property
    def digest(self) -> str:
        """Of the trace: the same for the same seed, on every machine."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=16).hexdigest()

    # -- what guests do -----------------------------------------------------------------------------------

    def _interlude(self) -> None:
        """A thread moves bytes: guests do not stand still meanwhile."""
        for process in self.processes:
            if process.running and self.dice.random() < _INTERLUDES:
                process.step()

    def spawned(self, process: GuestProcess) -> None:
        self.oracle.of(process)

    def paused(self, process: GuestProcess, image: Image) -> None:
        self.said(f"guest {process.name} at {process.place.name}", "is paused")
        self.oracle.paused(process, image)

    def runs(self, process: GuestProcess, image: Image | None) -> None:
        if process not in self.processes:
            self.processes.append(process)
        self.said(f"guest {process.name} at {process.place.name}", "runs" if image is None else "STARTS")
        self.oracle.runs(process, image)

    def ended(self, process: GuestProcess) -> None:
        self.oracle.of(process)
        self.said(f"guest {process.name} at {process.place.name}", f"ends, {process.state}")

    def ship(self, image: Image) -> bytes:
        state = len(self._images).to_bytes(4, "little") + self.dice.randbytes(
            _STATE_BYTES + self.dice.randrange(9000)
        )
        self._images[state] = image
        return state

    def unship(self, state: bytes) -> Image | None:
        return self._images.get(state)

    # -- what daemons do ----------------------------------------------------------------------------------

    def at_journal(self, host: Host, life: Life, when: str, mark: Mark) -> str:
        if when == "after":
            self.said(host.name, f"journal {mark}")
        return self.journal_moment(host, when, mark)

    def observer(self, host: Host, life: Life) -> Witness:
        return Witness(self, host, life)


class Witness:
    """See ``migd.migration.ports.Observer``: of one daemon."""

    def __init__(self, world: World, host: Host, life: Life) -> None:
        self._world = world
        self._host = host
        self._life = life

    def _said(self, passage: Passage, what: str) -> None:
        self._life.check()
        self._world.said(self._host.name, f"{passage.guest} {passage.direction} {what}")
        self._life.check()

    def began(self, passage: Passage) -> None:
        self._said(passage, f"began {passage.migration[:6]}")

    async def entered(self, passage: Passage, state: str) -> None:
        self._said(passage, f"-> {state}")
        self._world.states[f"{passage.direction} {state}"] += 1

    def iterated(self, passage: Passage, iteration: Iteration) -> None:
        self._said(
            passage,
            f"iteration {iteration.number}: {iteration.sent_pages} sent, {iteration.zero_pages} zero, "
            f"{iteration.free_records} FREE, {iteration.dirty_pages} dirty",
        )

    async def finished(self, passage: Passage, record: Result | Arrival) -> None:
        self._said(passage, f"finished {record.outcome} {record.error}")
        self._world.outcomes[f"{passage.direction} {record.outcome}"] += 1
        self._world.oracle.finished(record)
