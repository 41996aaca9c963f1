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
from enum import StrEnum

from migd.control import commands
from migd.migration.state import DestinationState, SourceState
from tests.support import remains
from tests.support.fault_proxy import FaultProxy
from tests.support.pair import DaemonPair, DaemonProcess, Nursery, daemon_pair, eventually, ram_digest, spoil


class Aftermath(StrEnum):
    """What is no state of a session, and still must not be undone by whatever happens to a daemon."""

    CONDEMNED = "condemned"
    """A late verdict was bad: the guest is paused on both sides."""


Phase = SourceState | DestinationState | Aftermath

PHASES: list[Phase] = [*SourceState, *DestinationState, *Aftermath]

_PATIENT = "hello_s = 60\nbegin_s = 60\nready_s = 60\nprogress_s = 60\nguest_s = 20\ncheck_s = 10\n"
"""No session may end by itself while the others are being brought into place."""
_VERDICT = "verdict_s = 8\n"
"""What was lost with a daemon or a connection: whoever has just arrived waits no longer for it."""
_UNWATCHFUL = "dead_s = 60\n"
_WATCHFUL = "ping_s = 0.3\ndead_s = 3\n"
"""For scenes in which a side is to notice that the other has fallen silent."""

_PATIENCE_S = 10.0
_SAMPLE_S = 0.25
"""A guest here does 30 operations a second: one that shows none in this time does not run."""


def name_of(phase: Phase) -> str:
    """The guest that is held in this phase."""
    if isinstance(phase, Aftermath):
        return phase.value
    role = "source" if isinstance(phase, SourceState) else "destination"
    return f"{role}-{phase}"


class Scene:
    """A pair whose sessions stand still, each in its phase."""

    def __init__(self, pair: DaemonPair, phases: list[Phase], network: FaultProxy) -> None:
        """``network`` is what lies between the source and the destination."""
        self.pair = pair
        self.network = network
        self.phases = phases
        self.migrations: dict[str, str] = {}
        self.at_rest = remains.ready(pair)
        """What both daemons held before the first guest."""

    def guests_ready(self) -> None:
        """A guest for every phase, slow enough that all of them run on one core."""
        for daemon in (self.pair.source, self.pair.destination):
            names = [name_of(phase) for phase in self.phases if self._begins_at(phase) is daemon]
            if names:
                self._start(daemon, names)
        for guest in self.pair.guests.values():
            guest.ready()

    def _begins_at(self, phase: Phase) -> DaemonProcess:
        """Only what has just arrived at the source is waiting there."""
        return self.pair.destination if phase is SourceState.WAITING else self.pair.source

    def _start(self, daemon: DaemonProcess, names: list[str]) -> None:
        nursery = Nursery(daemon.directory / "guest.sock", daemon.directory)
        for name in names:
            self.pair.guests[name] = nursery.start(
                name, ram_bytes=(8 << 20,), workload="churn", rate_bytes_s=4_000_000
            )
        nursery.close()

    def reach(self, phase: Phase) -> None:
        """Bring a phase's guest into it, and leave it there."""
        name = name_of(phase)
        if isinstance(phase, SourceState):
            SOURCE_REACH.get(phase, _hold_source)(self, phase, name)
        elif isinstance(phase, DestinationState):
            DESTINATION_REACH.get(phase, _hold_destination)(self, phase, name)
        else:
            _condemned(self, name)

    def launch(self, name: str, *, back: bool = False, **options: object) -> None:
        way = {} if back else {"to": self.network.address}
        self.migrations[name] = self.pair.launch(name, back=back, **{**way, **options})

    def ask_cancel(self, name: str) -> None:
        reply = self.pair.source.client.ask_once(commands.Cancel(target=name))
        assert isinstance(reply, commands.Done), reply

    def processes(self, phase: Phase, *, there: bool) -> list[int]:
        """Pids of a phase's guest at the destination, or at the source, whether it runs in them or not."""
        side = self.pair.destination if there else self.pair.source
        mine = self.pair.guests[name_of(phase)]
        started = [mine.pid] if self._begins_at(phase) is side and mine.alive else []
        return started + self.pair.arrived(side, name_of(phase))

    def kill(self, phase: Phase, *, there: bool) -> None:
        """kill -9 of the guest's process on one side."""
        for pid in self.processes(phase, there=there):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def running(self) -> dict[str, list[int]]:
        """For each guest, the processes in which it runs: by its RAM, not by what anybody says."""
        return running(self.pair, [name_of(phase) for phase in self.phases])


def running(pair: DaemonPair, names: list[str]) -> dict[str, list[int]]:
    """For each of these guests, the processes in which it runs: by its RAM, not by what anybody says."""
    copies = pair.copies_of(names)
    before = {pid: ram_digest(pid) for pids in copies.values() for pid in pids}
    time.sleep(_SAMPLE_S)
    return {
        name: [pid for pid in pids if (after := ram_digest(pid)) and after != before[pid]]
        for name, pids in copies.items()
    }


def running_in_time(pair: DaemonPair, names: list[str], due: list[str]) -> dict[str, list[int]]:
    """The same, with more time for those that are due to run: on a busy machine a guest may not get far."""
    found = running(pair, names)
    deadline = time.monotonic() + _PATIENCE_S
    while (still := [name for name in due if not found[name]]) and time.monotonic() < deadline:
        found |= running(pair, still)
    return found


def _hold_source(scene: Scene, phase: Phase, name: str) -> None:
    scene.pair.source.hold(phase, name)
    scene.launch(name)
    scene.pair.source.wait_held(name)


def _waiting(scene: Scene, phase: Phase, name: str) -> None:
    """It came from the destination, which still owes the verdict, and is to go back there."""
    scene.pair.destination.hold(SourceState.VERIFYING, name)
    scene.launch(name, back=True, verify="late")
    scene.pair.destination.wait_held(name)
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
    eventually(lambda: scene.processes(phase, there=True), f"the process of {name}")
    scene.kill(phase, there=True)
    eventually(lambda: destination.guest(name) is None, f"{name} to be missed", why=lambda: destination.log)
    destination.hold(phase, name)
    destination.release(f"{name}-starting")
    destination.wait_held(name)


def _condemned(scene: Scene, name: str) -> None:
    """Somebody writes to the paused RAM before it is verified."""
    source, destination = scene.pair.source, scene.pair.destination
    source.hold(SourceState.VERIFYING, name)
    scene.launch(name, verify="late")
    source.wait_held(name)
    spoil(scene.pair.guests[name].pid)
    source.release(name)
    eventually(
        lambda: (there := destination.guest(name)) is not None and there.state == "paused",
        f"the verdict on {name}",
        why=lambda: destination.log,
    )
    eventually(lambda: source.migrations(name)[-1].over, f"the end of {name}", why=lambda: source.log)


def _cancel_in_bulk(scene: Scene, name: str, hold: Callable[[], None]) -> None:
    source = scene.pair.source
    source.hold(SourceState.BULK, f"{name}-bulk")
    scene.launch(name)
    source.wait_held(f"{name}-bulk")
    hold()
    scene.ask_cancel(name)


_Reach = Callable[[Scene, Phase, str], None]

SOURCE_REACH: dict[SourceState, _Reach] = {
    SourceState.WAITING: _waiting,
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
def scene(phases: list[Phase], *, watchful: bool = False) -> Iterator[Scene]:
    """A pair with every phase's guest held in it; daemons of both roles where a guest is to come and go."""
    limits = f"[limits]\n{_PATIENT}{_VERDICT}{_WATCHFUL if watchful else _UNWATCHFUL}"
    source, destination, both = f"{limits}go_s = 1\n", f"{limits}go_s = 60\n", SourceState.WAITING in phases
    with (
        daemon_pair(source=source, destination=destination, held=True, serve=both) as pair,
        contextlib.closing(FaultProxy(pair.address)) as network,
    ):
        found = Scene(pair, phases, network)
        found.guests_ready()
        for phase in phases:
            found.reach(phase)
        yield found
