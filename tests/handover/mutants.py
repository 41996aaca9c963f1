"""Wrong versions of the hand-over, one thing wrong in each, and the searches in which they die."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from migd.migration.decision import Asked, Incoming, Paused
from migd.migration.journal import Mark
from tests.handover.bounds import ONE_OF_EACH, ONE_WORD, TWO_ATTEMPTS
from tests.handover.exploration import Exploration
from tests.handover.model import HandOverModel
from tests.handover.world import Budget, Destination, Message, Order, Source, Step, Steps, World, leave_line
from tests.proof.mutant import Death, Mutant

_TEST = "tests/handover/test_handover_mutants.py::test_every_wrong_hand_over_is_noticed"

FAULTS, WORD, TWICE = ONE_OF_EACH.budgets, ONE_WORD.budgets, TWO_ATTEMPTS.budgets


class ResumesOnATimer(HandOverModel):
    """The source resumes its guest when GO gets no answer in time."""

    def give_up_asking(self, world: World) -> World:
        return leave_line(world)._replace(source=Source.RESUME_DUE)


class TakesAbortForAborted(HandOverModel):
    """The source takes ABORT, or a lost line, for the durable ABORTED."""

    def ask_again(self, world: World) -> World:
        return leave_line(world)._replace(source=Source.TAKING_BACK)


class StartsAtEnd(HandOverModel):
    """The destination starts the guest when all of it is there, before GO."""

    def ready(self, world: World) -> World:
        return world._replace(arrived=Mark.READY, destination=Destination.GO_HEARD)


class ObeysALateGo(HandOverModel):
    """The destination obeys a GO on an old connection although it has given up, its guest being there yet."""

    def discard(self, world: World) -> World:
        return world._replace(destination=Destination.ABORTED)

    def hear_go(self, world: World, *, on_line: bool) -> World:
        if world.destination is Destination.ABORTED and not on_line:
            return self.obey_go(world)
        return super().hear_go(world, on_line=on_line)


class StartsWhatWasReady(HandOverModel):
    """A destination that was started again starts a guest that was ready, and GO had not come."""

    def incoming_at_destination(self, world: World) -> Incoming:
        return Incoming.START if world.arrived is Mark.READY else super().incoming_at_destination(world)


class ResumesWhateverIsPaused(HandOverModel):
    """A source that was started again resumes any paused guest."""

    def paused_at_source(self, world: World) -> Paused:
        return Paused.RESUME


class LetsGoWithoutAsking(HandOverModel):
    """A source that was started again and finds GO takes it for done."""

    def paused_at_source(self, world: World) -> Paused:
        return Paused.LET_GO if world.left is Mark.GO else super().paused_at_source(world)


class JournalsAfterStarting(HandOverModel):
    """The destination journals STARTED when its guest runs."""

    def start(self, world: World) -> World:
        return world._replace(destination=Destination.START_DUE)

    def runs(self, world: World) -> World:
        return super().runs(world)._replace(arrived=Mark.STARTED)


class TakesGoOfAnyAttempt(HandOverModel):
    """GO without the migration's id: one of the attempt before is taken for this one's."""

    def hear_stale(self, world: World, message: Message) -> Steps:
        if message is Message.GO:
            yield Step("destination hears GO of the attempt before", self.hear_go(world, on_line=False))


class TakesReadyOfAnyAttempt(HandOverModel):
    """READY without the migration's id: one of the attempt before is taken for this one's."""

    def hears_ready(self, world: World) -> bool:
        return Message.READY in world.stale or super().hears_ready(world)


class KillsItsGuestOnGo(HandOverModel):
    """The source ends its guest when it sends GO."""

    def sent_go(self, world: World, asking: Source) -> World:
        return super().sent_go(world, asking)._replace(orders_here=(*world.orders_here, Order.QUIT))


class SendsGoBeforeItIsDurable(HandOverModel):
    """The source sends GO, then journals it."""

    def mark_go(self, world: World) -> World:
        if Message.GO not in world.to_destination:
            return world._replace(to_destination=(*world.to_destination, Message.GO))
        return super().mark_go(world)._replace(source=Source.ASKING)


class DiscardsWhatRuns(HandOverModel):
    """A destination that was started again discards every guest that a predecessor has started."""

    def found_there(self, world: World) -> World:
        return self.discard(world)


class ForgetsStarted(HandOverModel):
    """A destination that was started again answers ABORTED to any GO."""

    def go_at_destination(self, world: World) -> Asked:
        return Asked.ABORTED


class CondemnsInMemoryOnly(HandOverModel):
    """The source tells a bad verdict without journalling it: after a restart it lets go."""

    def mark_condemned(self, world: World, then: Source) -> World:
        return world._replace(source=then)

    def good_is_refused(self, world: World) -> World:
        return world._replace(source=Source.RELEASE_DUE)


class DeafToALateVerdict(HandOverModel):
    """The destination takes no verdict any more when it has waited long enough for one."""

    def hear_verdict(self, world: World, verdict: Message, *, on_line: bool) -> World:
        if world.destination is Destination.UNJUDGED:
            return world
        return super().hear_verdict(world, verdict, on_line=on_line)


class RunsTheCondemned(HandOverModel):
    """A destination that was started again and is asked by GO has a paused guest go on."""

    def revive(self, world: World) -> World:
        if world.arrived is Mark.CONDEMNED:
            return world._replace(destination=Destination.RESUMING, orders_there=(Order.RESUME,))
        return super().revive(world)


class GivesBackWhatRuns(HandOverModel):
    """The destination gives its guest up for the operator's word alone, although it runs."""

    def gives_back(self, world: World) -> bool:
        return True


def _death(model: type[HandOverModel], bounds: Mapping[Budget, int]) -> Death:
    found = Exploration(model(), bounds).explore()
    return Death(found.reason, tuple(found.trace))


def _mutant(number: str, model: type[HandOverModel], bounds: Mapping[Budget, int]) -> Mutant:
    bug = (model.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return Mutant(number, model.__name__, bug, _TEST, partial(_death, model, bounds))


WRONG: tuple[tuple[str, type[HandOverModel], Mapping[Budget, int]], ...] = (
    ("H1", ResumesOnATimer, FAULTS),
    ("H2", StartsAtEnd, FAULTS),
    ("H3", ObeysALateGo, FAULTS),
    ("H3", StartsWhatWasReady, FAULTS),
    ("H4", ResumesWhateverIsPaused, FAULTS),
    ("H5", JournalsAfterStarting, FAULTS),
    ("H6", TakesGoOfAnyAttempt, TWICE),
    ("H6", TakesReadyOfAnyAttempt, TWICE),
    ("H7", KillsItsGuestOnGo, FAULTS),
    ("H8", TakesAbortForAborted, FAULTS),
    ("H9", SendsGoBeforeItIsDurable, FAULTS),
    ("H10", LetsGoWithoutAsking, FAULTS),
    ("H11", DiscardsWhatRuns, FAULTS),
    ("H12", ForgetsStarted, FAULTS),
    ("H13", CondemnsInMemoryOnly, FAULTS),
    ("H14", DeafToALateVerdict, FAULTS),
    ("H15", RunsTheCondemned, FAULTS),
    ("H16", GivesBackWhatRuns, WORD),
)
"""Number, wrong version, and bounds that suffice to notice it."""

MUTANTS: list[Mutant] = [_mutant(*wrong) for wrong in WRONG]
