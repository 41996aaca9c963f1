"""Scene: one guest for every phase of both enums, all held there at the same moment in one daemon pair.

So a fault that hits a daemon, or every guest, hits every phase at once, and one restart serves them all.
``SOURCE_REACH`` and ``DESTINATION_REACH`` say how a phase is reached where holding there is not enough.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator

from migd.control import commands
from migd.migration.state import DestinationState, SourceState
from tests.support.pair import DaemonPair, Nursery, daemon_pair, eventually, ram_digest

Phase = SourceState | DestinationState

PHASES: list[Phase] = [
    *(state for state in SourceState if state is not SourceState.WAITING),
    *DestinationState,
]
"""A guest waits only where it has just arrived: ``tests/e2e/test_serve.py``."""

_PATIENT = "hello_s = 60\nbegin_s = 60\nready_s = 60\ndead_s = 60\nprogress_s = 60\nguest_s = 20\n"
SOURCE_LIMITS = f"[limits]\n{_PATIENT}go_s = 2\ncheck_s = 10\n"
DESTINATION_LIMITS = f"[limits]\n{_PATIENT}go_s = 60\ncheck_s = 10\n"
"""No session may end by itself while the others are being brought into place."""

_SAMPLE_S = 0.25
"""A guest here does 30 operations a second: one that shows none in this time does not run."""


def name_of(phase: Phase) -> str:
    """The guest that is held in this phase."""
    role = "source" if isinstance(phase, SourceState) else "destination"
    return f"{role}-{phase}"


class Scene:
    """A pair whose sessions stand still, each in its phase."""

    def __init__(self, pair: DaemonPair, phases: list[Phase]) -> None:
        self.pair = pair
        self.phases = phases
        self.migrations: dict[str, str] = {}

    def guests_ready(self) -> None:
        """A guest for every phase, slow enough that all of them run on one core."""
        directory = self.pair.source.directory
        nursery = Nursery(directory / "guest.sock", directory)
        for name in map(name_of, self.phases):
            self.pair.guests[name] = nursery.start(
                name, ram_bytes=(16 << 20,), workload="churn", rate_bytes_s=4_000_000
            )
        nursery.close()
        for guest in self.pair.guests.values():
            guest.ready()

    def reach(self, phase: Phase) -> None:
        """Bring a phase's guest into it, and leave it there."""
        name = name_of(phase)
        if isinstance(phase, SourceState):
            SOURCE_REACH.get(phase, _hold_source)(self, phase, name)
        else:
            DESTINATION_REACH.get(phase, _hold_destination)(self, phase, name)

    def launch(self, name: str, **options: object) -> None:
        self.migrations[name] = self.pair.launch(name, **options)

    def ask_cancel(self, name: str) -> None:
        reply = self.pair.source.client.ask_once(commands.Cancel(target=name))
        assert isinstance(reply, commands.Done), reply

    def kill_copy(self, name: str, *, arrived: bool) -> None:
        """kill -9 of the guest's process at the destination, or at the source."""
        mine = self.pair.guests[name]
        if not arrived:
            mine.kill()
            return
        for pid in self.pair.copies(name):
            if pid != mine.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def running(self) -> dict[str, list[int]]:
        """For each guest, the processes in which it runs: by its RAM, not by what anybody says."""
        copies = {name: self.pair.copies(name) for name in map(name_of, self.phases)}
        before = {pid: ram_digest(pid) for pids in copies.values() for pid in pids}
        time.sleep(_SAMPLE_S)
        return {
            name: [pid for pid in pids if (after := ram_digest(pid)) and after != before[pid]]
            for name, pids in copies.items()
        }


def _hold_source(scene: Scene, phase: Phase, name: str) -> None:
    scene.pair.source.hold(phase, name)
    scene.launch(name)
    scene.pair.source.wait_held(name)


def _iterating(scene: Scene, phase: Phase, name: str) -> None:
    """Held in the bulk stage until it has written something, so that there is something to iterate for."""
    source = scene.pair.source
    source.hold(SourceState.BULK, f"{name}-bulk")
    scene.launch(name, downtime_limit_ms=0.001)
    source.wait_held(f"{name}-bulk")
    pid = scene.pair.guests[name].pid
    before = ram_digest(pid)
    eventually(lambda: ram_digest(pid) != before, f"{name} to write")
    source.hold(phase, name)
    source.release(f"{name}-bulk")
    source.wait_held(name)


def _verifying(scene: Scene, phase: Phase, name: str) -> None:
    """With the verification still to come."""
    scene.pair.source.hold(phase, name)
    scene.launch(name, verify="late")
    scene.pair.source.wait_held(name)


def _unknown(scene: Scene, phase: Phase, name: str) -> None:
    """GO is sent, and the destination does not get round to answering."""
    scene.pair.destination.hold(DestinationState.STARTING, name)
    scene.pair.source.hold(phase, name)
    scene.launch(name)
    scene.pair.destination.wait_held(name)
    scene.pair.source.wait_held(name)


def _cancelled(scene: Scene, phase: Phase, name: str) -> None:
    _cancel_in_bulk(scene, name, lambda: scene.pair.source.hold(phase, name))
    scene.pair.source.wait_held(name)


def _source_failed(scene: Scene, phase: Phase, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    scene.pair.source.hold(phase, name)
    scene.launch(name, to=address)
    scene.pair.source.wait_held(name)


def _hold_destination(scene: Scene, phase: Phase, name: str) -> None:
    scene.pair.destination.hold(phase, name)
    scene.launch(name)
    scene.pair.destination.wait_held(name)


def _aborted(scene: Scene, phase: Phase, name: str) -> None:
    _cancel_in_bulk(scene, name, lambda: scene.pair.destination.hold(phase, name))
    scene.pair.destination.wait_held(name)


def _destination_failed(scene: Scene, phase: Phase, name: str) -> None:
    """Its process dies between STARTED in the journal and START."""
    destination = scene.pair.destination
    destination.hold(DestinationState.STARTING, f"{name}-starting")
    scene.launch(name)
    destination.wait_held(f"{name}-starting")
    scene.kill_copy(name, arrived=True)
    eventually(lambda: destination.guest(name) is None, f"{name} to be missed")
    destination.hold(phase, name)
    destination.release(f"{name}-starting")
    destination.wait_held(name)


def _cancel_in_bulk(scene: Scene, name: str, hold: Callable[[], None]) -> None:
    source = scene.pair.source
    source.hold(SourceState.BULK, f"{name}-bulk")
    scene.launch(name)
    source.wait_held(f"{name}-bulk")
    hold()
    scene.ask_cancel(name)


_Reach = Callable[[Scene, Phase, str], None]

SOURCE_REACH: dict[SourceState, _Reach] = {
    SourceState.ITERATING: _iterating,
    SourceState.UNKNOWN: _unknown,
    SourceState.VERIFYING: _verifying,
    SourceState.ABORTING: _cancelled,
    SourceState.CANCELLED: _cancelled,
    SourceState.FAILED: _source_failed,
}
DESTINATION_REACH: dict[DestinationState, _Reach] = {
    DestinationState.ABORTED: _aborted,
    DestinationState.FAILED: _destination_failed,
}


@contextlib.contextmanager
def scene(phases: list[Phase]) -> Iterator[Scene]:
    """A pair with every phase's guest held in it."""
    with daemon_pair(source=SOURCE_LIMITS, destination=DESTINATION_LIMITS, held=True) as pair:
        found = Scene(pair, phases)
        found.guests_ready()
        for phase in phases:
            found.reach(phase)
        yield found
