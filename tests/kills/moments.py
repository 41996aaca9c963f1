"""Kills at random moments: guests under churn migrate, something is killed, everything is brought back.

Unlike the matrix, nothing stands still: the kill hits whatever is going on, also between two phases.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from migd.migration.state import SourceState
from tests.kills.cells import KILLS, Blow
from tests.kills.outcome import Outcome
from tests.kills.settling import RUNNING, Where, in_doubt, over, resolve, second_end, where
from tests.support import remains
from tests.support.pair import DaemonPair, DaemonProcess, Nursery, daemon_pair, eventually
from tests.support.scene import running, running_in_time

AT_ONCE = 6
"""Migrations of one batch: one kill of a daemon hits them all, each wherever it is."""

_LIMITS = "[limits]\ngo_s = 2\ncheck_s = 10\n"
_RAM_BYTES = 8 << 20
_BANDWIDTH_BYTES_S = 16_000_000
_WITHIN_S = 0.6
"""Launches are spread over this, and kills by the clock; undisturbed, a migration takes 0.3 s."""
_BEHIND_S = 0.01
"""A kill by state comes up to this much later: states behind the pause last for milliseconds."""
_LOOK_S = 0.002
_SETTLE_S = 20.0

_OF_GUESTS = (Blow.GUEST_KILLED_HERE, Blow.GUEST_KILLED_THERE)


@dataclass
class Batch:
    """What became of migrations that one kill hit."""

    blow: Blow
    outcomes: dict[str, Outcome]
    states: Counter[str] = field(default_factory=Counter)
    """Of the sessions at the source right before the kill; with `not begun`."""
    faults: list[str] = field(default_factory=list)
    """Of the daemons."""


def batches(migrations: int, seed: int) -> Iterator[Batch]:
    """At least so many migrations, hit by kills of random victims; one daemon pair for all."""
    chance = random.Random(seed)
    with daemon_pair(source=_LIMITS, destination=_LIMITS) as pair:
        nursery = Nursery(pair.source.directory / "guest.sock", pair.source.directory)
        try:
            for number in range(-(-migrations // AT_ONCE)):
                batch = _Play(pair, nursery, chance, [f"kill{number}-{guest}" for guest in range(AT_ONCE)])
                yield batch.run()
        finally:
            nursery.close()


class _Play:
    """One batch, from its guests' beginning to their end."""

    def __init__(self, pair: DaemonPair, nursery: Nursery, chance: random.Random, names: list[str]) -> None:
        self._pair = pair
        self._nursery = nursery
        self._chance = chance
        self._names = names
        self._batch = Batch(chance.choice(KILLS), {name: Outcome(frozenset()) for name in names})

    def run(self) -> Batch:
        for name in self._names:
            self._pair.guests[name] = self._nursery.start(
                name, ram_bytes=(_RAM_BYTES,), workload="churn", rate_bytes_s=8_000_000
            )
        for name in self._names:
            self._pair.guests[name].ready()
        self._launch_until_the_kill()
        self._kill()
        for name, outcome in self._batch.outcomes.items():
            self._settle(name, outcome)
        for name, outcome in self._batch.outcomes.items():
            outcome.where = where(self._pair, name)
            outcome.allowed = self._allowed()
        self._look_again()
        self._move_again()
        self._check()
        self._end()
        return self._batch

    # -- the kill -----------------------------------------------------------------------------------

    def _launch_until_the_kill(self) -> None:
        """Launches at random moments. The kill comes by the clock, or behind a random state of the first."""
        launches = sorted((self._chance.uniform(0, _WITHIN_S), name) for name in self._names)
        by_state = self._chance.choice([None, *SourceState])
        killed_s = self._chance.uniform(0, 2 * _WITHIN_S)
        behind_s = self._chance.uniform(0, _BEHIND_S)
        began = time.monotonic()
        while (passed_s := time.monotonic() - began) < killed_s:
            while launches and launches[0][0] <= passed_s:
                self._pair.launch(launches.pop(0)[1], max_bandwidth_bytes_s=_BANDWIDTH_BYTES_S)
            if by_state is not None and by_state in self._states().values():
                time.sleep(behind_s)
                break
            time.sleep(_LOOK_S)
        self._batch.states = Counter(self._states().get(name, "not begun") for name in self._names)

    def _states(self) -> dict[str, str]:
        mine = set(self._names)
        return {
            found.guest: found.state for found in self._pair.source.status().migrations if found.guest in mine
        }

    def _kill(self) -> None:
        source, destination = self._pair.source, self._pair.destination
        killed: dict[Blow, list[DaemonProcess]] = {
            Blow.SOURCE_KILLED: [source],
            Blow.DESTINATION_KILLED: [destination],
            Blow.BOTH_KILLED_SOURCE_FIRST: [source, destination],
            Blow.BOTH_KILLED_DESTINATION_FIRST: [destination, source],
        }
        if self._batch.blow in _OF_GUESTS:
            for name in self._names:
                self._kill_guest(name)
        for daemon in killed.get(self._batch.blow, []):
            daemon.kill()
        self._look()
        for daemon in killed.get(self._batch.blow, []):
            daemon.restart()
        self._look()

    def _look(self) -> None:
        for name, pids in running(self._pair, self._names).items():
            self._batch.outcomes[name].running.append(len(pids))

    def _look_again(self) -> None:
        """Those that are said to run have time to show it."""
        due = [name for name, found in self._batch.outcomes.items() if found.where in RUNNING]
        for name, pids in running_in_time(self._pair, list(self._batch.outcomes), due).items():
            self._batch.outcomes[name].running.append(len(pids))

    def _kill_guest(self, name: str) -> None:
        mine = self._pair.guests[name].pid
        here, there = [mine], self._pair.arrived(self._pair.destination, name)
        for pid in here if self._batch.blow is Blow.GUEST_KILLED_HERE else there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # -- what became of them ------------------------------------------------------------------------

    def _settle(self, name: str, outcome: Outcome) -> None:
        pair = self._pair
        _within(lambda: self._is_settled(name))
        if in_doubt(pair.source, name):
            outcome.resolved.append(resolve(pair.source, name))
            if outcome.resolved[-1].exit_code == 0:
                _within(lambda: self._is_settled(name))

    def _is_settled(self, name: str) -> bool:
        pair = self._pair
        match where(pair, name):
            case Where.SOURCE | Where.DESTINATION:
                return over(pair.source, name)
            case Where.NOWHERE:  # or, after a restart, not back yet
                return not pair.copies(name)
        return in_doubt(pair.source, name)

    def _allowed(self) -> frozenset[Where]:
        """Only a guest that was itself killed may end nowhere, or in doubt."""
        lost = {Where.NOWHERE, Where.UNKNOWN} if self._batch.blow in _OF_GUESTS else set()
        return RUNNING | lost

    def _move_again(self) -> None:
        """Whatever stayed, once the destination has forgotten the first attempt."""
        stayed = [name for name, found in self._batch.outcomes.items() if found.where is Where.SOURCE]
        for name in stayed:
            self._await_forgotten(name)
            self._pair.launch(name)
        for name in stayed:
            self._batch.outcomes[name].moved_again = second_end(self._pair, name)

    def _await_forgotten(self, name: str) -> None:
        _within(lambda: self._pair.destination.guest(name) is None)

    def _check(self) -> None:
        for name, outcome in self._batch.outcomes.items():
            if outcome.where is Where.DESTINATION or outcome.moved_again == SourceState.COMPLETED:
                outcome.checked = self._pair.checked(name)

    def _end(self) -> None:
        for name in self._names:
            self._pair.discard(name)
        eventually(
            lambda: not any(map(self._pair.copies, self._names)), "the end of all guests", timeout_s=_SETTLE_S
        )
        for daemon in (self._pair.source, self._pair.destination):
            self._batch.faults += [f"{daemon.role}: {error}" for error in remains.bugs(daemon)]


def _within(look: Callable[[], bool], timeout_s: float = _SETTLE_S) -> None:
    """Wait for it; what there is instead is judged afterwards."""
    with contextlib.suppress(AssertionError):
        eventually(look, "", timeout_s)
