"""Scenario: what a seed decides, which guests, migrations and faults, and when; ``Play`` plays it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from migd.config import Config, DaemonConfig, MigrationConfig
from migd.control.commands import Migrate
from migd.limits import Limits
from migd.ram.contract import FreeContract
from tests.simulation.faults import Fault, Faults, draw_faults
from tests.simulation.guest import GuestProcess, Temper
from tests.simulation.hints import Manners
from tests.simulation.host import Daemon, Host
from tests.simulation.network import Nature
from tests.simulation.world import World

_BEGIN_S = 0.05
_FAULTY_S = 30.0
"""How long faults may go on after the last migration was asked for."""
_SETTLE_S = 400.0
"""By then every session has ended, faults or not: its time-outs in a row, and two restarts, take 200 s."""
_LOOK_S = 0.5


@dataclass(frozen=True)
class Journey:
    """A guest is to go to the other host."""

    guest: str
    at_s: float


@dataclass(frozen=True)
class Plan:
    """All of it; ``str`` tells people."""

    tempers: tuple[Temper, ...]
    contracts: tuple[FreeContract, ...]
    owned: tuple[float, ...]
    """The share of its RAM that each guest owns at the beginning."""
    journeys: tuple[Journey, ...]
    options: MigrationConfig
    bandwidth: int
    nature: Nature
    faults: tuple[Fault, ...]
    limits: Limits = field(default_factory=Limits)

    def __str__(self) -> str:
        guests = ", ".join(
            f"{temper.name} {sum(temper.block_pages)} pages ({contract.name})"
            for temper, contract in zip(self.tempers, self.contracts, strict=True)
        )
        journeys = ", ".join(f"{trip.guest} at {trip.at_s * 1e3:.0f} ms" for trip in self.journeys)
        options = f"{self.options.streams} streams, {self.options.dirty_log}, verify {self.options.verify}"
        faults = ", ".join(str(fault) for fault in self.faults) or "none"
        return f"guests: {guests}; leave: {journeys}; {options}; faults: {faults}"


def draw_plan(dice: random.Random, *, faults: bool = True) -> Plan:
    count = 2 if dice.random() < 0.25 else 1
    names = [f"g{number}" for number in range(count)]
    journeys = [Journey(name, _BEGIN_S + dice.random() * 0.02) for name in names]
    journeys += [Journey(name, 0.1 + dice.random() ** 2 * 8) for name in names if dice.random() < 0.25]
    smuggles = dice.random() < 0.04
    verify: Literal["auto", "strict", "late", "off"] = dice.choice(["auto", "strict", "late", "late"])
    if not smuggles and dice.random() < 0.3:
        verify = "off"  # nothing but the log stands between a missed write and a wrong guest
    number = 0 if not faults or smuggles else dice.choice([0, 1, 1, 2, 2, 3])
    return Plan(
        tempers=tuple(_temper(dice, name, smuggles=smuggles) for name in names),
        contracts=tuple(_contract(dice) for _ in names),
        owned=tuple(dice.choice([0.2, 0.5, 0.9]) for _ in names),
        journeys=tuple(journeys),
        options=MigrationConfig(
            streams=dice.choice([1, 1, 2, 2, 3]),
            compression=dice.choice(["auto", "lz4", "none"]),
            verify=verify,
            dirty_log="compare" if dice.random() < 0.15 else "auto",
            hints=dice.random() < 0.9,
            downtime_limit_ms=dice.choice([1.0, 10.0, 300.0]),
            max_iterations=dice.choice([2, 5, 30]),
        ),
        bandwidth=dice.choice([0, 0, 0, 200_000, 2_000_000]),
        nature=_nature(dice),
        faults=tuple(draw_faults(dice, number)),
    )


def _contract(dice: random.Random) -> FreeContract:
    return dice.choice([FreeContract.ANYTHING, FreeContract.ANYTHING, FreeContract.ZERO, FreeContract.NONE])


def _temper(dice: random.Random, name: str, *, smuggles: bool) -> Temper:
    pages = dice.choice([16, 24, 32, 64])
    blocks = (pages,) if dice.random() < 0.7 else (pages // 4, pages - pages // 4)
    rude = dice.random() < 0.1
    manners = Manners(
        silent=dice.choice([0, 0, 0.5]),
        slow=dice.choice([0, 0.1, 0.5]),
        twice=dice.choice([0, 0.3]),
        stale=dice.choice([0, 0.5]),
        garbage=0.3 if rude else 0.0,
        flood=0.3 if rude else 0.0,
    )
    return Temper(
        name=name,
        block_pages=blocks,
        steps_s=dice.choice([100.0, 1000.0, 5000.0]),
        steps=dice.choice([0, 50, 150]),
        hints=manners,
        slow_answers=0.05 if dice.random() < 0.1 else 0.0,
        can_arm=dice.random() < 0.95,
        smuggles=smuggles,
        checks=dice.random() < 0.7,
    )


def _nature(dice: random.Random) -> Nature:
    latency_s = dice.choice([1e-5, 1e-4, 2e-3])
    return Nature(
        latency_s=latency_s,
        jitter_s=latency_s * dice.choice([0, 1, 10]),
        room_bytes=dice.choice([16 << 10, 64 << 10, 1 << 20]),
        bite_bytes=dice.choice([5000, 1 << 20, 1 << 20]),
    )


class Play:
    """One seed, from two booted hosts to the verdict of the oracle."""

    def __init__(self, world: World, plan: Plan) -> None:
        self._world = world
        self._plan = plan
        config = Config(
            daemon=DaemonConfig(max_bandwidth=plan.bandwidth), migration=plan.options, limits=plan.limits
        )
        world.network.natures = lambda: plan.nature
        self.hosts = (world.add_host("A", config), world.add_host("B", config))

    async def run(self) -> None:
        """All of it."""
        for host in self.hosts:
            host.boot()
        await asyncio.sleep(0)
        for temper, contract, owned in zip(
            self._plan.tempers, self._plan.contracts, self._plan.owned, strict=True
        ):
            self._begin(self._world.add_guest(self.hosts[0], temper), contract, owned)
        faults = Faults(self._world, list(self._plan.faults))
        for journey in sorted(self._plan.journeys, key=lambda journey: journey.at_s):
            await asyncio.sleep(max(0.0, journey.at_s - self._world.loop.time()))
            await self._send(journey.guest)
        await self._idle(_FAULTY_S)
        faults.end()
        await self._settle()
        self._world.oracle.judge()
        await self._again()
        await self._close()

    def _begin(self, process: GuestProcess, contract: FreeContract, owned: float) -> None:
        memory = process.memory
        assert memory is not None
        memory.contract = contract
        memory.fill(page for page in range(memory.pages) if self._world.dice.random() < owned)

    def _home(self, guest: str) -> Host | None:
        """Where it runs, or ran last."""
        home = self._world.oracle.guests[guest].home
        return next((host for host in self.hosts if home is not None and host is home.place), None)

    async def _send(self, guest: str) -> str:
        """To the other host. What the operator is told."""
        here = self._home(guest)
        assert here is not None
        there = self.hosts[1] if here is self.hosts[0] else self.hosts[0]
        request = Migrate(guest=guest, to=there.address, detach=True)
        answer = await here.command(lambda daemon: daemon.migrate(request))
        self._world.said("operator", f"migrate {guest} from {here.name}: {answer[:100]}")
        return answer

    async def _idle(self, most_s: float) -> bool:
        """Until no session acts, and every daemon is up."""
        deadline = self._world.loop.time() + most_s
        while self._world.loop.time() < deadline:
            await asyncio.sleep(_LOOK_S)
            if all(host.up and host.daemon is not None and host.daemon.idle for host in self.hosts):
                return True
        return False

    async def _settle(self) -> None:
        """Nothing is broken now: sessions end, orphans too, and the operator resolves what is unknown."""
        if not await self._idle(_SETTLE_S):
            self._world.wrong(f"a session goes on for {_SETTLE_S:g} s after the last fault: {self._going()}")
        await asyncio.sleep(70.0)
        for _ in range(3):
            left = self._world.oracle.left_paused
            if not left:
                return
            for process in left:
                host = next(host for host in self.hosts if host is process.place)
                answer = await host.command(partial(Daemon.resolve, target=process.name))
                self._world.said("operator", f"resolve {process.name} at {host.name}: {answer[:200]}")
            await self._idle(_SETTLE_S)
            await asyncio.sleep(20.0)

    def _going(self) -> str:
        found = []
        for host in self.hosts:
            if host.daemon is not None:
                found += [f"out {session.state}" for session in host.daemon.departures.sessions.values()]
                found += [f"in {session.state}" for session in host.daemon.reception.sessions.values()]
        return ", ".join(found)

    async def _again(self) -> None:
        """G5: whatever became of the first attempts, the next one succeeds."""
        for known in self._world.oracle.guests.values():
            if known.home is None or not known.home.running or known.tainted_by or self._world.wrongs:
                continue
            before = known.home
            await self._send(known.name)
            await self._idle(_SETTLE_S)
            await asyncio.sleep(10.0)
            if known.home is before and not self._may_fail(known.home):
                self._world.wrong(f"{known.name} cannot leave {before.place.name} although nothing is broken")
        self._world.oracle.judge()

    def _may_fail(self, process: GuestProcess) -> bool:
        """It takes longer to obey than anybody waits, or what it writes is not logged."""
        return process.temper.slow_answers > 0 or process.temper.smuggles

    async def _close(self) -> None:
        """Both daemons end in order, and leave nothing."""
        for host in self.hosts:
            await host.stop()
        await asyncio.sleep(1.0)
        for host in self.hosts:
            left = [task for life in host.lives for task in life.tasks if not task.done()]
            if left:
                self._world.wrong(f"{len(left)} tasks are left of {host.name}: {left[0].get_coro()}")
        for known in self._world.oracle.guests.values():
            for copy in known.copies:
                copy.kill()
