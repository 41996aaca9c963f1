"""Faults: what goes wrong, and when; drawn from the seed, and over when the scenario says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from migd.migration.journal import Mark
from migd.migration.state import DestinationState, SourceState
from tests.simulation.host import Host
from tests.simulation.network import Cable
from tests.simulation.world import World

_MOST_DOWN_S = 40.0


@dataclass(frozen=True)
class When:
    """After a state was entered, after so many events, or at a time; ``delay_s`` later."""

    state: str = ""
    """``out`` or ``in`` and the state."""
    events: int = 0
    at_s: float = 0.0
    delay_s: float = 0.0

    def __str__(self) -> str:
        what = self.state or (f"event {self.events}" if self.events else f"{self.at_s * 1e3:.1f} ms")
        return f"{what} + {self.delay_s * 1e3:.1f} ms"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once."""

    kind: str
    when: When

    def __str__(self) -> str:
        return f"{self.kind} at {self.when}"


Act = Callable[[World, random.Random], None]

_STATES = (
    *(f"out {state}" for state in SourceState if state is not SourceState.WAITING),
    *(f"in {state}" for state in DestinationState),
)
"""A new state is hit by faults without anybody's doing."""

_HAND_OVER = (
    "out awaiting-ready",
    "out going",
    "out verifying",
    "in loading",
    "in ready",
    "in starting",
    "in running",
)
"""It takes a few milliseconds, and what goes wrong there is worst."""


def draw_faults(dice: random.Random, count: int) -> list[Fault]:
    return [Fault(dice.choice(KINDS), _when(dice)) for _ in range(count)]


def _when(dice: random.Random) -> When:
    delay_s = 0.0 if dice.random() < 0.4 else dice.random() ** 3 * 0.02
    draw = dice.random()
    if draw < 0.3:
        return When(state=dice.choice(_HAND_OVER), delay_s=delay_s / 4)
    if draw < 0.65:
        return When(state=dice.choice(_STATES), delay_s=delay_s)
    if draw < 0.85:
        return When(events=dice.randint(1, 120), delay_s=delay_s)
    return When(at_s=dice.random() ** 4 * 20)


class Faults:
    """Watches a world, and does what was drawn. ``end`` undoes whatever still is broken."""

    def __init__(self, world: World, faults: list[Fault]) -> None:
        self._world = world
        self._dice = random.Random(world.dice.random())
        self._over = False
        self._events = 0
        self._waiting = list(faults)
        self._full: set[Host] = set()
        self._deadly: dict[tuple[str, str], str] = {}
        world.listeners.append(self._listen)
        world.journal_moment = self._at_journal
        for fault in faults:
            if fault.when.at_s:
                world.loop.call_later(fault.when.at_s, self._strike, fault)

    def _listen(self, _who: str, what: str) -> None:
        self._events += 1
        for fault in list(self._waiting):
            when = fault.when
            if when.events == self._events or (when.state and what.endswith(_entered(when.state))):
                if when.delay_s:
                    self._waiting.remove(fault)
                    self._world.loop.call_later(when.delay_s, self._do, fault)
                else:
                    self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        if fault in self._waiting:
            self._waiting.remove(fault)
            self._do(fault)

    def _do(self, fault: Fault) -> None:
        if self._over:
            return
        self._world.faults[fault.kind] += 1
        self._world.said("fault", fault.kind)
        getattr(self, f"_{fault.kind}")()

    def end(self) -> None:
        """Nothing goes wrong any more, and what was broken is whole."""
        self._over = True
        self._waiting.clear()
        self._full.clear()
        self._deadly.clear()
        self._world.network.mend()
        for process in self._world.processes:
            process.go_on()
        for host in self._world.hosts:
            if host.daemon is not None:
                host.daemon.guests.full = False
            host.boot()

    def _later(self, act: Callable[[], object], most_s: float = _MOST_DOWN_S) -> None:
        self._world.loop.call_later(self._dice.random() ** 3 * most_s, lambda: self._over or act())

    # -- the network ----------------------------------------------------------------------------------

    def _cable(self) -> Cable | None:
        cables = self._world.network.open_cables
        return self._dice.choice(cables) if cables else None

    def _reset(self) -> None:
        if cable := self._cable():
            cable.reset()

    def _end_in_mid_frame(self) -> None:
        if cable := self._cable():
            self._dice.choice(cable.pipes).cut_after = self._dice.randrange(1, 6000)

    def _flip_a_bit(self) -> None:
        if cable := self._cable():
            self._dice.choice(cable.pipes).flip_after = self._dice.randrange(20_000)

    def _stall(self) -> None:
        if cable := self._cable():
            cable.freeze()
            self._later(cable.thaw)

    def _slow_stream(self) -> None:
        if cable := self._cable():
            for pipe in cable.pipes:
                pipe.slow_down(self._dice.choice([2e3, 2e4, 2e5]))

    def _lose_the_network(self) -> None:
        self._world.network.lose()
        self._later(self._world.network.mend)

    def _reset_all(self) -> None:
        for cable in self._world.network.open_cables:
            cable.reset()

    # -- daemons --------------------------------------------------------------------------------------

    def _kill(self, host: Host) -> None:
        host.kill()
        self._later(host.boot)

    def _kill_a_daemon(self) -> None:
        self._kill(self._dice.choice(self._world.hosts))

    def _kill_both_daemons(self) -> None:
        for host in self._world.hosts:
            self._kill(host)

    def _restart_a_daemon(self) -> None:
        host = self._dice.choice(self._world.hosts)
        stopping = self._world.loop.create_task(host.stop())
        stopping.add_done_callback(lambda _: host.boot() if self._over else self._later(host.boot, 5.0))
        self._world.tasks.append(stopping)

    def _kill_at_a_record(self) -> None:
        """At the next record of a kind: before it, in its middle, or when it is durable."""
        mark = self._dice.choice(list(Mark))
        self._deadly[self._dice.choice(["before", "torn", "after"]), mark] = "kill"

    def _journal_full(self) -> None:
        host = self._dice.choice(self._world.hosts)
        self._full.add(host)
        self._later(lambda: self._full.discard(host), 5.0)

    def _at_journal(self, host: Host, when: str, mark: Mark) -> str:
        if when == "before" and host in self._full:
            self._world.said(host.name, f"journal {mark} finds no room")
            return "full"
        if when == "before" and self._deadly.pop(("torn", mark), ""):
            self._world.said(host.name, f"journal {mark} is torn")
            return "torn"
        if when == "torn" or self._deadly.pop((when, mark), ""):
            self._kill(host)
        return ""

    # -- guests, operator -----------------------------------------------------------------------------

    def _kill_a_guest(self) -> None:
        alive = [copy for known in self._world.oracle.guests.values() for copy in known.copies if copy.alive]
        if alive:
            process = self._dice.choice(alive)
            self._world.oracle.of(process).wounded = True
            process.kill()

    def _stop_a_guest(self) -> None:
        alive = [process for process in self._world.processes if process.alive]
        if alive:
            process = self._dice.choice(alive)
            process.stop()
            self._later(process.go_on, 10.0)

    def _cancel(self) -> None:
        for host in self._world.hosts:
            if host.daemon is not None and host.up:
                for session in host.daemon.departures.sessions.values():
                    session.cancel()

    def _no_room(self) -> None:
        host = self._dice.choice(self._world.hosts)
        daemon = host.daemon
        if daemon is not None:
            daemon.guests.full = True
            self._later(lambda: setattr(daemon.guests, "full", False), 5.0)


def _entered(state: str) -> str:
    direction, name = state.split()
    return f"{direction} -> {name}"


KINDS = (
    "reset",
    "reset_all",
    "end_in_mid_frame",
    "flip_a_bit",
    "stall",
    "slow_stream",
    "lose_the_network",
    "kill_a_daemon",
    "kill_a_daemon",
    "kill_both_daemons",
    "restart_a_daemon",
    "kill_at_a_record",
    "kill_at_a_record",
    "journal_full",
    "kill_a_guest",
    "stop_a_guest",
    "cancel",
    "no_room",
)
"""Those that tear a hand-over apart come more often."""
