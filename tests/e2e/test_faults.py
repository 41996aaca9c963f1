"""Faults of single connections: the guest runs on somewhere, whole, and nothing is left behind.

A proxy between the daemons does to one connection of a migration what networks do, for many migrations at
once; the tests then ask what became of each. ``tests/kills/faults.py`` says which test is for which fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.kills.outcome import Outcome
from tests.kills.settling import Where, ask_to_resolve, in_doubt, over, second_end, where
from tests.support import remains
from tests.support.fault_proxy import Fault, FaultProxy, Kind
from tests.support.pair import DaemonPair, Nursery, daemon_pair, eventually
from tests.support.scene import running, running_in_time

LIMITS = (
    "[limits]\nhello_s = 6\nbegin_s = 6\nready_s = 10\nping_s = 0.3\ndead_s = 5\nprogress_s = 5\n"
    "go_s = 3\nverdict_s = 8\ncheck_s = 8\n"
)
"""Short enough for faults that only a time-out ends, long enough for a machine that does much else."""

CONNECTING_AT_ONCE = 6
"""The destination listens to 8 strangers."""

IN_STREAM = 20_000
"""A byte in the middle of a record: a guest here sends ten times as much at least."""

BROKEN = [
    *(Fault(kind, 1, IN_STREAM) for kind in Kind if kind not in (Kind.NEVER, Kind.DRIBBLE, Kind.SLOW)),
    *(Fault(Kind.FLIP, 1, at) for at in (5, 60, 1000)),
    Fault(Kind.NEVER, 0),
    Fault(Kind.NEVER, 2),
]
"""Nothing can come of these migrations."""

BORNE = [
    Fault(Kind.DRIBBLE, 0),
    Fault(Kind.DRIBBLE, 0, back=True),
    Fault(Kind.DRIBBLE, 1),
    Fault(Kind.SLOW, 2),
]
"""They only take longer."""

CONTROL = [
    *(Fault(Kind.RST, 0, at) for at in (0, 30, 250, 420, 600, 900, 1300, 1600)),
    *(Fault(Kind.RST, 0, at, back=True) for at in (0, 40, 150, 260, 330, 400, 460, 520)),
    *(Fault(kind, 0, at) for kind in (Kind.BLACK_HOLE, Kind.FLIP) for at in (30, 900)),
    *(Fault(kind, 0, at, back=True) for kind in (Kind.BLACK_HOLE, Kind.FLIP) for at in (150, 330)),
]
"""The control connection, cut or damaged in every message on it: before GO or behind, so it may be either."""

FAULTS = [*BROKEN, *BORNE, *CONTROL]


@dataclass
class Swept:
    """What became of one guest, and how its migration ended."""

    outcome: Outcome
    state: str = ""
    error: str = ""


class Sweep:
    """A guest for every fault, all of them at the same time in one pair."""

    def __init__(self, pair: DaemonPair, faults: list[Fault]) -> None:
        self._pair = pair
        self._before = remains.ready(pair)
        self.swept = {str(fault): Swept(Outcome(_allowed(fault))) for fault in faults}
        self._proxies = {str(fault): FaultProxy(pair.address, fault) for fault in faults}

    def run(self) -> None:
        self._guests()
        for name, proxy in self._proxies.items():
            eventually(self._may_connect, "others to be through")
            streams = 1 + name.startswith((Kind.SLOW, f"{Kind.NEVER}-2"))
            self._pair.launch(name, to=proxy.address, streams=streams, compression="none", hints=False)
        self._look()
        for name, found in self.swept.items():
            self._settle(name, found)
        self._look_again()
        self._move_again()
        for name in self.swept:
            self._pair.discard(name)
        eventually(lambda: remains.remains(self._pair) == self._before, "nothing to be left", 15, self._left)

    def _may_connect(self) -> bool:
        states = [found.state for found in self._pair.source.status().migrations]
        return states.count("connecting") < CONNECTING_AT_ONCE

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()

    def _guests(self) -> None:
        nursery = Nursery(self._pair.source.directory / "guest.sock", self._pair.source.directory)
        for name in self.swept:
            self._pair.guests[name] = nursery.start(
                name, ram_bytes=(4 << 20,), workload="churn", rate_bytes_s=1_000_000
            ).ready()
        nursery.close()

    def _look(self) -> None:
        for name, pids in running(self._pair, list(self.swept)).items():
            self.swept[name].outcome.running.append(len(pids))

    def _look_again(self) -> None:
        for name, pids in running_in_time(self._pair, list(self.swept), list(self.swept)).items():
            self.swept[name].outcome.running.append(len(pids))

    def _settle(self, name: str, found: Swept) -> None:
        ended = self._pair.ended(name)
        found.state, found.error = ended.state, ended.error
        if in_doubt(self._pair.source, name):
            ask_to_resolve(self._pair.source, name)
        with contextlib.suppress(AssertionError):
            eventually(lambda: over(self._pair.source, name) and where(self._pair, name), f"{name} to settle")
        found.outcome.where = where(self._pair, name)

    def _move_again(self) -> None:
        stayed = [name for name, found in self.swept.items() if found.outcome.where is Where.SOURCE]
        for name in stayed:
            self._await_forgotten(name)
            eventually(self._may_connect, "others to be through")
            self._pair.launch(name)
        for name, found in self.swept.items():
            if name in stayed:
                found.outcome.moved_again = second_end(self._pair, name)
            if found.outcome.where is Where.DESTINATION or found.outcome.moved_again == "completed":
                found.outcome.checked = self._pair.checked(name)

    def _await_forgotten(self, name: str) -> None:
        eventually(lambda: self._pair.destination.guest(name) is None, f"{name} to be forgotten")

    def bugs(self) -> list[str]:
        return [*remains.bugs(self._pair.source), *remains.bugs(self._pair.destination)]

    def _left(self) -> str:
        return f"{remains.remains(self._pair)}, before: {self._before}"


def _allowed(fault: Fault) -> frozenset[Where]:
    if fault in BROKEN:
        return frozenset({Where.SOURCE})
    if fault in BORNE:
        return frozenset({Where.DESTINATION})
    return frozenset({Where.SOURCE, Where.DESTINATION})


@pytest.fixture(scope="module")
def sweep() -> Iterator[Sweep]:
    with (
        daemon_pair(source=LIMITS, destination=LIMITS) as pair,
        contextlib.closing(Sweep(pair, FAULTS)) as found,
    ):
        found.run()
        yield found


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_connection_that_is_treated_badly(sweep: Sweep, fault: Fault) -> None:
    found = sweep.swept[str(fault)]
    assert found.outcome.faults() == [], found
    if fault in BROKEN:
        assert found.state == "failed"
        assert found.error, "the cause is named"
    if fault in BORNE:
        assert found.state == "completed"


def test_no_fault_of_a_connection_is_taken_for_a_bug(sweep: Sweep) -> None:
    assert sweep.bugs() == []
