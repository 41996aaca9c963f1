"""Agents that are silent, dead, slow or hostile: a guest arrives whole, and no later than without them.

One guest, and an agent in it that changes its manners when told (``tampered_agent.py``); in each test it goes
on to the other site, or there and back.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.guest import agent
from migd.lab.image import image
from migd.migration.state import SourceState
from tests.qemu_guest.severing import sever
from tests.support.pair import eventually
from tests.support.vm import Journey, route
from tests.support.vm_site import WAIT_S, Lab

pytestmark = pytest.mark.timeout(300)

_TAMPERED = Path(__file__).with_name("tampered_agent.py")
_MANNERS = ("HONEST", "LIES", "NOISE", "FLOOD", "HALF", "NO_END", "ALL")

_ITERATES = {"downtime_limit_ms": 13.0, "max_iterations": 3}
"""A guest that always writes is not paused before it has been iterated for."""
_HALF_PAGES = 2 * agent.WINDOW_PAGES
"""What half an answer speaks of."""
_TRIES = 4
_SLACK_PAGES = 2048
"""What the guest may free between a question and an answer."""


@pytest.fixture(scope="module")
def journey(lab: Lab) -> Iterator[Journey]:
    extra = {"migd/agent.py": _TAMPERED.read_bytes(), "migd/honest.py": Path(agent.__file__).read_bytes()}
    with route(hint_first_s=2.0) as road:
        yield road.journey("vm1", lab.recipe(image=image(extra))).boot()


@pytest.fixture(autouse=True)
def littered(journey: Journey) -> None:
    """There is something to be left behind, or not, in each test."""
    journey.litter()


def _manner(journey: Journey, name: str) -> None:
    journey.signal_agent(signal.SIGRTMIN + _MANNERS.index(name))


def _free_pages(journey: Journey) -> int:
    return int(journey.ask("status")["mem_free_bytes"]) // 4096


def _move_until_hinted(journey: Journey) -> None:
    """An agent has been started, and takes a while."""
    journey.signal_agent(0)
    for _ in range(_TRIES):
        if journey.move(hints=None).hints == "used":
            return
    pytest.fail(f"no hints in {_TRIES} migrations")


def test_what_is_no_ram_or_was_not_asked_for_is_not_skipped(journey: Journey) -> None:
    _manner(journey, "LIES")
    free = _free_pages(journey)
    result = journey.move()
    assert result.hints_stale > 0, "it names all of RAM in epochs that nobody asked for"
    assert 0 < result.skipped_free_pages < free + _SLACK_PAGES
    _manner(journey, "HONEST")


def test_what_is_true_among_noise_is_understood(journey: Journey) -> None:
    _manner(journey, "NOISE")
    free = _free_pages(journey)
    result = journey.move()
    assert 0 < result.skipped_free_pages < free + _SLACK_PAGES
    _manner(journey, "HONEST")


def test_an_answer_without_an_end_is_an_answer(journey: Journey) -> None:
    _manner(journey, "NO_END")
    assert journey.move().hints_applied > 0
    _manner(journey, "HONEST")


def test_a_flood_is_refused_and_everything_sent(journey: Journey) -> None:
    _manner(journey, "FLOOD")
    leg = journey.begin(SourceState.ITERATING, **_ITERATES)
    with leg.held(SourceState.ITERATING):
        log = leg.source.daemon
        eventually(lambda: "hint channel closed" in log.log, "the daemon to have enough", WAIT_S)
        _manner(journey, "HONEST")
    result = leg.arrive(hints=None)
    assert result.hints.startswith("refused: the guest sent"), result
    assert result.skipped_free_pages == 0
    assert journey.move().skipped_free_pages > 0, "another daemon believes it again"


def test_an_answer_may_be_cut_in_two_by_the_switchover(journey: Journey) -> None:
    _manner(journey, "HALF")
    leg = journey.begin(SourceState.PAUSING)
    with leg.held(SourceState.PAUSING):
        pass
    leg.arrive()
    assert leg.compared is not None
    assert 0 < max(leg.compared.left_behind) < _HALF_PAGES
    journey.signal_agent(signal.SIGUSR1)  # the rest of the answer, to somebody who has asked nothing
    _manner(journey, "HONEST")
    journey.move()


def test_the_second_half_of_an_answer_may_come_with_the_pause(journey: Journey) -> None:
    _manner(journey, "HALF")
    leg = journey.begin(SourceState.PAUSING)
    with leg.held(SourceState.PAUSING):
        journey.signal_agent(signal.SIGUSR1)
    leg.arrive()
    _manner(journey, "HONEST")
    journey.move()


def test_a_silent_agent_costs_a_wait_and_spares_nothing(journey: Journey) -> None:
    journey.signal_agent(signal.SIGSTOP)
    assert journey.move(hints="none came in time").skipped_free_pages == 0
    assert journey.move(hints="the guest declared no free-page contract").skipped_free_pages == 0
    journey.signal_agent(signal.SIGCONT)
    journey.move()


def test_an_agent_that_is_killed_comes_back(journey: Journey) -> None:
    leg = journey.begin(SourceState.ITERATING, **_ITERATES)
    with leg.held(SourceState.ITERATING):
        journey.signal_agent(signal.SIGKILL)
    leg.arrive()
    _move_until_hinted(journey)


def test_an_agent_in_whose_place_another_comes_may_take_the_question_with_it(journey: Journey) -> None:
    journey.signal_agent(signal.SIGSTOP)
    journey.move(hints="none came in time")
    journey.signal_agent(signal.SIGKILL)  # with the destination's GREET, which it has not read
    _move_until_hinted(journey)


def test_a_port_may_be_cut_off_in_the_middle_of_an_answer(journey: Journey) -> None:
    _manner(journey, "HALF")
    leg = journey.begin(SourceState.ITERATING, **_ITERATES)
    with leg.held(SourceState.ITERATING):
        sever(leg.source.companion(journey.name), leg.source.directory(journey.name) / "hints")
        journey.signal_agent(signal.SIGUSR1)
        _manner(journey, "HONEST")
    leg.arrive()
    journey.move()


def test_a_guest_that_calls_all_of_its_memory_free_harms_nobody_but_itself(journey: Journey) -> None:
    """It asked for that. What is not written afterwards reads as zero, and never as anything else."""
    _manner(journey, "ALL")
    leg = journey.begin()
    compared = leg.compare()  # nothing of the first MiB is among it
    leg.release()
    result = leg.result()
    assert (result.outcome, result.hints) == ("completed", "used")
    assert compared.left > compared.pages // 8
    assert compared.left <= result.skipped_free_pages
