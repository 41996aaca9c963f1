"""kill -9 of the source, of the destination and of guests, in every phase of both enums (G1, G2, G3).

Each scene holds one guest in every phase, kills, and brings everything back; the tests then ask what became
of the guest of each phase. The tables say where it has to run in the end; a new phase needs a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import pytest

from migd.control.commands import GuestStatus
from migd.migration.state import SOURCE_TRANSITIONS, DestinationState, SourceState
from tests.support.pair import DaemonPair, Output, daemon_pair, eventually, finish
from tests.support.scene import PHASES, Phase, Scene, name_of, scene


class Victim(StrEnum):
    SOURCE = "source"
    DESTINATION = "destination"
    GUEST = "guest"


class Where(StrEnum):
    """Where the guest runs when all is over."""

    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere: it was killed where it ran"
    UNKNOWN = "nowhere: paused at the source, for the operator to decide"


@dataclass
class Outcome:
    """What became of one guest."""

    where: Where | None = None
    runs: list[int] = field(default_factory=list)
    """In how many processes it ran, at each look."""
    resolved: Output | None = None
    """`migd resolve`, where the outcome had stayed unknown."""
    checked: tuple[int, int] | None = None
    """Pages checked and wrong, for a guest that moved, at once or in the second migration."""
    moved_again: str = ""
    """How a second migration of a guest that had stayed ended."""


_S, _D = SourceState, DestinationState

OVER = [state for state, following in SOURCE_TRANSITIONS.items() if not following]


def _rows(source: dict[SourceState, Where], destination: dict[DestinationState, Where]) -> dict[str, Where]:
    """By the name of the guest: the same state has the same value in both enums."""
    return {name_of(phase): where for table in (source, destination) for phase, where in table.items()}


SOURCE_KILLED = _rows(
    {
        _S.CONNECTING: Where.SOURCE,
        _S.ARMING: Where.SOURCE,
        _S.BULK: Where.SOURCE,
        _S.ITERATING: Where.SOURCE,
        _S.PAUSING: Where.SOURCE,
        _S.SWITCHOVER: Where.SOURCE,
        _S.AWAITING_READY: Where.SOURCE,
        _S.GOING: Where.DESTINATION,
        _S.UNKNOWN: Where.DESTINATION,
        _S.VERIFYING: Where.DESTINATION,
        _S.ABORTING: Where.SOURCE,
        _S.COMPLETED: Where.DESTINATION,
        _S.CANCELLED: Where.SOURCE,
        _S.FAILED: Where.SOURCE,
    },
    {
        _D.PREPARING: Where.SOURCE,
        _D.RECEIVING: Where.SOURCE,
        _D.LOADING: Where.SOURCE,
        _D.READY: Where.SOURCE,
        _D.STARTING: Where.DESTINATION,
        _D.RUNNING: Where.DESTINATION,
        _D.COMPLETED: Where.DESTINATION,
        _D.ABORTED: Where.SOURCE,
        _D.FAILED: Where.UNKNOWN,
    },
)

DESTINATION_KILLED = {
    **SOURCE_KILLED,
    name_of(_S.GOING): Where.SOURCE,  # GO was not sent yet, and a restarted destination has aborted
}

GUEST_KILLED = _rows(
    # Of the source's phases: the process at the source.
    {
        _S.CONNECTING: Where.NOWHERE,
        _S.ARMING: Where.NOWHERE,
        _S.BULK: Where.NOWHERE,
        _S.ITERATING: Where.NOWHERE,
        _S.PAUSING: Where.NOWHERE,
        _S.SWITCHOVER: Where.NOWHERE,
        _S.AWAITING_READY: Where.NOWHERE,
        _S.GOING: Where.DESTINATION,
        _S.UNKNOWN: Where.DESTINATION,
        _S.VERIFYING: Where.DESTINATION,
        _S.ABORTING: Where.NOWHERE,
        _S.COMPLETED: Where.DESTINATION,
        _S.CANCELLED: Where.NOWHERE,
        _S.FAILED: Where.NOWHERE,
    },
    # Of the destination's: the process at the destination.
    {
        _D.PREPARING: Where.DESTINATION,  # there is none yet
        _D.RECEIVING: Where.SOURCE,
        _D.LOADING: Where.SOURCE,
        _D.READY: Where.SOURCE,
        _D.STARTING: Where.UNKNOWN,
        _D.RUNNING: Where.NOWHERE,
        _D.COMPLETED: Where.NOWHERE,
        _D.ABORTED: Where.SOURCE,
        _D.FAILED: Where.UNKNOWN,
    },
)

EXPECTED = {
    Victim.SOURCE: SOURCE_KILLED,
    Victim.DESTINATION: DESTINATION_KILLED,
    Victim.GUEST: GUEST_KILLED,
}


class Play:
    """One victim's scene, from the kill to the end of every guest."""

    def __init__(self, stage: Scene, victim: Victim) -> None:
        self.stage = stage
        self.pair: DaemonPair = stage.pair
        self.victim = victim
        self.outcomes = {name_of(phase): Outcome() for phase in stage.phases}

    def run(self) -> None:
        {
            Victim.SOURCE: self.kill_source,
            Victim.DESTINATION: self.kill_destination,
            Victim.GUEST: self.kill_guests,
        }[self.victim]()
        for name, outcome in self.outcomes.items():
            self.settle(name, outcome)
        self.look()
        # Guests that wait for a GO that never comes are let go of; started ones survive this, too.
        assert self.pair.destination.stop() == 0
        self.pair.destination.restart()
        self.move_again()

    def kill_source(self) -> None:
        self.pair.source.kill()
        self.look()
        self.pair.destination.release_all()
        self.look()
        self.pair.source.restart()

    def kill_destination(self) -> None:
        self.pair.destination.kill()
        self.look()
        self.pair.source.release_all()
        self.look()
        self.pair.destination.restart()

    def kill_guests(self) -> None:
        for phase in self.stage.phases:
            self.stage.kill_copy(name_of(phase), arrived=isinstance(phase, DestinationState))
        self.look()
        self.pair.source.release_all()
        self.pair.destination.release_all()

    def look(self) -> None:
        running = self.stage.running()
        for name, outcome in self.outcomes.items():
            outcome.runs.append(len(running[name]))

    def settle(self, name: str, outcome: Outcome) -> None:
        """Wait until both daemons agree about a guest, asking them to where an operator would have to."""
        expected = EXPECTED[self.victim][name]
        with contextlib.suppress(AssertionError):  # then `outcome.where` says what there was instead
            eventually(lambda: self.is_settled(name, expected), f"{name} to settle", 20)
        if self.is_unknown(name):
            outcome.resolved = self.pair.resolve(name)
            with contextlib.suppress(AssertionError):
                eventually(lambda: self.where(name) is expected, f"{name} to be resolved", 10)
        outcome.where = self.where(name)
        if outcome.where is Where.DESTINATION:
            outcome.checked = self.pair.checked(name)

    def is_settled(self, name: str, expected: Where) -> bool:
        sessions = self.pair.source.migrations(name)
        over = not sessions or sessions[-1].state in OVER
        arrived = over and expected is not Where.UNKNOWN and self.where(name) is expected
        return arrived or self.is_unknown(name)

    def where(self, name: str) -> Where | None:
        here, there = self.state(self.pair.source.guest(name)), self.state(self.pair.destination.guest(name))
        match here, there:
            case "running", "running":
                return None
            case "running", _:
                return Where.SOURCE
            case _, "running":
                # Until the source has let go of it, it may still be in doubt about it.
                return Where.DESTINATION if not here else None
            case "paused", "":
                return Where.UNKNOWN
            case "", _:
                return Where.NOWHERE
        return None

    @staticmethod
    def state(guest: GuestStatus | None) -> str:
        return guest.state if guest is not None else ""

    def is_unknown(self, name: str) -> bool:
        """The source says so: by its session, or, restarted, by a guest that stays paused."""
        sessions = self.pair.source.migrations(name)
        if sessions:
            return sessions[-1].state == SourceState.UNKNOWN
        asked = f"guest {name}: GO was sent to {self.pair.address} and no answer came"
        return self.state(self.pair.source.guest(name)) == "paused" and asked in self.pair.source.log

    def move_again(self) -> None:
        """Every guest that runs at the source can be migrated, and arrives whole."""
        stayed = [name for name, outcome in self.outcomes.items() if outcome.where is Where.SOURCE]
        for name in stayed:
            self.pair.launch(name)
        for name in stayed:
            outcome = self.outcomes[name]
            outcome.moved_again = self.pair.ended(name).state
            if outcome.moved_again == SourceState.COMPLETED:
                outcome.checked = self.pair.checked(name)


@pytest.fixture(scope="module", params=list(Victim))
def played(request: pytest.FixtureRequest) -> Iterator[Play]:
    with scene(PHASES) as stage:
        play = Play(stage, request.param)
        play.run()
        yield play


@pytest.mark.parametrize("phase", PHASES, ids=name_of)
def test_a_kill_loses_no_guest_and_makes_no_second(played: Play, phase: Phase) -> None:
    expected = EXPECTED[played.victim][name_of(phase)]
    outcome = played.outcomes[name_of(phase)]
    assert max(outcome.runs) <= 1, outcome
    assert outcome.where is expected, outcome
    if expected is Where.UNKNOWN:
        assert outcome.resolved is not None
        assert outcome.resolved.exit_code == 4
        assert "migd resolve" in outcome.resolved.stderr + outcome.resolved.stdout
    elif outcome.resolved is not None:
        assert outcome.resolved.exit_code in (0, 1), outcome
    if expected is Where.SOURCE:
        assert outcome.moved_again == SourceState.COMPLETED, outcome
    if expected in (Where.SOURCE, Where.DESTINATION):
        assert outcome.runs[-1] == 1, outcome
        assert outcome.checked is not None, outcome
        pages, wrong = outcome.checked
        assert pages > 0
        assert wrong == 0


def test_every_daemon_survived_what_others_suffered(played: Play) -> None:
    assert played.pair.source.status().role == "source"
    assert played.pair.destination.status().role == "destination"
    assert "Traceback" not in played.pair.source.log


def test_the_answer_and_the_check_reach_the_source_through_a_restarted_destination() -> None:
    """G3: GO is sent again until somebody answers, and the guest reports to whichever daemon is there."""
    with daemon_pair(held=True) as pair:
        guest = pair.guest()
        pair.destination.hold(DestinationState.RUNNING)
        migration = pair.start_migration(guest.name)
        pair.destination.wait_held(DestinationState.RUNNING)
        assert pair.checked(guest.name)[1] == 0
        pair.destination.kill()
        pair.destination.restart()
        output = finish(migration)
        assert output.exit_code == 0, output
        result = output.result
        assert (result.outcome, result.wrong_pages) == ("completed", 0)
        assert result.checked_pages
        assert guest.wait() == 0
        there = pair.destination.guest(guest.name)
        assert there is not None
        assert there.state == "running"


def test_both_daemons_are_killed_at_once_after_go() -> None:
    """The journals alone decide: GO was durable, STARTED was not, so the guest comes back to the source."""
    with daemon_pair(held=True) as pair:
        guest = pair.guest()
        pair.source.hold(SourceState.GOING)
        pair.launch(guest.name)
        pair.source.wait_held(SourceState.GOING)
        pair.source.kill()
        pair.destination.kill()
        pair.destination.restart()
        pair.source.restart()
        here = eventually(lambda: pair.source.guest(guest.name), "the guest to come back")
        eventually(
            lambda: (found := pair.source.guest(guest.name)) and found.state == "running", "its resumption"
        )
        eventually(lambda: pair.copies(guest.name) == [here.pid], "the incoming process to end")
        assert pair.migrate(guest.name).result.wrong_pages == 0
