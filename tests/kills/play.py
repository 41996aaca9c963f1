"""Play: one blow's scene, from the blow to the end of every guest in it."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Callable
from typing import ParamSpec

from migd.control.commands import GuestStatus
from migd.errors import MigdError
from migd.migration.state import DestinationState, SourceState
from tests.kills.cells import INTERRUPTIONS, Blow, allowed, row_of
from tests.kills.outcome import Outcome
from tests.kills.settling import (
    RUNNING,
    Where,
    ask_to_resolve,
    in_doubt,
    over,
    resolve,
    second_end,
    start_resolve,
    where,
)
from tests.support import remains
from tests.support.pair import DaemonProcess, eventually, finish
from tests.support.scene import Aftermath, Phase, Scene, name_of, running_in_time, scene

P = ParamSpec("P")

SETTLE_S = 20

_RAM_DESCRIPTORS = 2
"""Of a guest whose outcome is unknown: its session keeps the RAM, as it may be the only copy."""


def play(blow: Blow, phases: list[Phase]) -> Play:
    """Hold a guest in each phase, strike, bring everything back, and look what became of each."""
    hit = [phase for phase in phases if row_of(phase)[blow] or not isinstance(phase, Aftermath)]
    with scene(hit, watchful=blow in INTERRUPTIONS) as stage:
        played = Play(stage, blow)
        played.run()
        return played


class Play:
    """``outcomes`` and ``faults`` are complete when ``run`` has returned."""

    def __init__(self, stage: Scene, blow: Blow) -> None:
        self.blow = blow
        self._stage = stage
        self._pair = stage.pair
        wanted = allowed(blow)
        names = map(name_of, stage.phases)
        self.outcomes = {name: Outcome(wanted[name]) for name in names if wanted[name]}
        self.faults: list[str] = []
        """Of the daemons, not of one guest."""

    def run(self) -> None:
        self._strike()
        self._settle()
        self._look_again()
        self._decide()
        self._restart_in_order()
        self._move_again()
        self._tidy()

    # -- blows --------------------------------------------------------------------------------------

    def _strike(self) -> None:
        source, destination = self._pair.source, self._pair.destination
        match self.blow:
            case Blow.SOURCE_KILLED:
                self._kill_one(source, destination)
            case Blow.DESTINATION_KILLED:
                self._kill_one(destination, source)
            case Blow.BOTH_KILLED_SOURCE_FIRST:
                self._kill_both(source, destination)
            case Blow.BOTH_KILLED_DESTINATION_FIRST:
                self._kill_both(destination, source)
            case Blow.GUEST_KILLED_HERE | Blow.GUEST_KILLED_THERE:
                self._kill_guests(there=self.blow is Blow.GUEST_KILLED_THERE)
            case Blow.NETWORK_RESET | Blow.NETWORK_SILENT:
                self._lose_network(silent=self.blow is Blow.NETWORK_SILENT)
            case Blow.SOURCE_STOPPED:
                self._stop(source, self._is_forgotten)
            case Blow.DESTINATION_STOPPED:
                self._stop(destination, self._has_given_up)

    def _kill_one(self, victim: DaemonProcess, other: DaemonProcess) -> None:
        victim.kill()
        self._look()
        other.release_all()
        self._look()
        victim.restart()

    def _kill_both(self, first: DaemonProcess, second: DaemonProcess) -> None:
        first.kill()
        second.kill()
        self._look()
        first.restart()
        self._look()
        second.restart()

    def _lose_network(self, *, silent: bool) -> None:
        """Until the source has given up whatever it can give up."""
        self._stage.network.cut(silent=silent)
        self._go_on()
        eventually(self._has_given_up, "the source to give up", SETTLE_S, self._told)
        self._look()
        self._stage.network.mend()

    def _stop(self, daemon: DaemonProcess, other_gave_up: Callable[[], bool]) -> None:
        daemon.signal(signal.SIGSTOP)
        self._go_on()
        eventually(other_gave_up, f"the other side to give up {daemon.role}", SETTLE_S, self._told)
        self._look()
        daemon.signal(signal.SIGCONT)

    def _has_given_up(self) -> bool:
        """Every guest that can only stay is said to run at the source again."""
        return all(
            over(self._pair.source, name) and _runs(self._pair.source.guest(name)) for name in self._staying()
        )

    def _told(self) -> str:
        """What the source, if it answers, says of guests that are to stay and do not run there yet."""
        with contextlib.suppress(MigdError):
            away = [name for name in self._staying() if not _runs(self._pair.source.guest(name))]
            return "\n".join(f"{name}: {self._pair.source.migrations(name)}" for name in away)
        return self._pair.destination.log

    def _is_forgotten(self) -> bool:
        """The destination waits for nobody any more, but for GO: that may still come."""
        return all(
            found.over or found.state == DestinationState.READY
            for name in self._staying()
            for found in self._pair.destination.migrations(name)
            if found.direction == "in"
        )

    def _staying(self) -> list[str]:
        return [name for name, found in self.outcomes.items() if found.allowed == {Where.SOURCE}]

    def _go_on(self) -> None:
        self._pair.source.release_all()
        self._pair.destination.release_all()

    def _kill_guests(self, *, there: bool) -> None:
        for phase in self._stage.phases:
            if name_of(phase) in self.outcomes:
                if not self._stage.processes(phase, there=there):
                    self.faults.append(f"{name_of(phase)} has no process {'there' if there else 'here'}")
                self._stage.kill(phase, there=there)
            else:
                self._expect_no_process(phase, there=there)
        self._look()
        self._go_on()

    def _expect_no_process(self, phase: Phase, *, there: bool) -> None:
        """It may be ending yet."""
        eventually(
            lambda: not self._stage.processes(phase, there=there), f"no process of {name_of(phase)}", SETTLE_S
        )

    # -- what becomes of the guests -----------------------------------------------------------------

    def _look(self) -> None:
        running = self._stage.running()
        for name, outcome in self.outcomes.items():
            outcome.running.append(len(running[name]))

    def _look_again(self) -> None:
        """Those that are said to run have time to show it."""
        due = [name for name, found in self.outcomes.items() if found.where in RUNNING]
        for name, pids in running_in_time(self._pair, list(self.outcomes), due).items():
            self.outcomes[name].running.append(len(pids))

    def _settle(self) -> None:
        """Wait until both daemons agree about each guest, asking them to where an operator would have to.

        What there is instead, after ``SETTLE_S``, is judged by the outcomes.
        """
        for name, outcome in self.outcomes.items():
            _within(SETTLE_S, self._is_settled, name, outcome)
        self._resolve()
        for name, outcome in self.outcomes.items():
            _within(SETTLE_S / 2, self._is_placed, name, outcome)
            outcome.where = where(self._pair, name)
            if outcome.where is Where.DESTINATION:
                outcome.checked = self._pair.checked(name)

    def _resolve(self) -> None:
        """Ask about all that is in doubt; by `migd resolve`, at once, where only its words are left."""
        commands = []
        for name, outcome in self.outcomes.items():
            for daemon in (self._pair.source, self._pair.destination):
                if not in_doubt(daemon, name):
                    continue
                if outcome.allowed <= RUNNING:
                    ask_to_resolve(daemon, name)
                else:
                    commands.append((outcome, start_resolve(daemon, name)))
        for outcome, process in commands:
            outcome.resolved.append(finish(process))

    def _decide(self) -> None:
        """A condemned guest stays so until the operator's word: here, that it goes on at the destination."""
        for name, outcome in self.outcomes.items():
            if outcome.where is Where.CONDEMNED:
                outcome.resolved.append(resolve(self._pair.source, name))
                forced = resolve(self._pair.source, name, "--force-dest")
                if forced.exit_code != 0:
                    self.faults.append(f"{name}: migd resolve --force-dest: {forced}")
                    continue
                _within(SETTLE_S / 2, self._runs_there, name)
                outcome.decided = where(self._pair, name)
                outcome.checked = self._pair.checked(name)

    def _is_settled(self, name: str, outcome: Outcome) -> bool:
        source = self._pair.source
        arrived = where(self._pair, name) in outcome.allowed - {Where.UNKNOWN}
        return (arrived and over(source, name)) or in_doubt(source, name)

    def _runs_there(self, name: str) -> bool:
        return where(self._pair, name) is Where.DESTINATION

    def _is_placed(self, name: str, outcome: Outcome) -> bool:
        return where(self._pair, name) in outcome.allowed

    def _restart_in_order(self) -> None:
        """Guests that wait for a GO that never comes are let go of; started ones survive this, too."""
        destination = self._pair.destination
        started = {guest.name for guest in destination.status().guests if guest.state == "running"}
        if destination.stop() != 0:
            self.faults.append("the destination did not stop in order")
        destination.restart()
        eventually(
            lambda: started <= {guest.name for guest in destination.status().guests}, "the started guests"
        )

    def _move_again(self) -> None:
        """Every guest that runs at the source can be migrated, and arrives whole."""
        stayed = {name: found for name, found in self.outcomes.items() if found.where is Where.SOURCE}
        for name, outcome in stayed.items():
            try:
                self._pair.launch(name)
            except AssertionError as error:
                outcome.moved_again = str(error)
        for name, outcome in stayed.items():
            if outcome.moved_again:
                continue
            outcome.moved_again = second_end(self._pair, name)
            if outcome.moved_again == SourceState.COMPLETED:
                outcome.checked = self._pair.checked(name)

    # -- what is left -------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """With every guest gone, the daemons are what they were before the first; no bug was logged."""
        for name in list(self._pair.guests):
            self._pair.discard(name)
        due = copy.deepcopy(self._stage.at_rest)
        unknown = [
            found for found in self._pair.source.status().migrations if found.state == SourceState.UNKNOWN
        ]
        due["source"]["memfd"] += _RAM_DESCRIPTORS * len(unknown)
        _within(SETTLE_S, lambda: remains.remains(self._pair) == due)
        after = remains.remains(self._pair)
        if after != due:
            self.faults.append(f"left behind: {after}, where there should be {due}")
        for daemon in (self._pair.source, self._pair.destination):
            self.faults += [f"{daemon.directory.name}: {error}" for error in remains.bugs(daemon)]


def _runs(guest: GuestStatus | None) -> bool:
    return guest is not None and guest.state == "running"


def _within(timeout_s: float, look: Callable[P, bool], *args: P.args, **kwargs: P.kwargs) -> None:
    """Wait for it; what there is instead is judged afterwards."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: look(*args, **kwargs), "it", timeout_s)
