"""Hearing: what the destination makes of each message, over a connection or from one that was left."""

from __future__ import annotations

from migd.migration import decision
from migd.migration.decision import Asked
from migd.migration.journal import Mark
from tests.handover.world import (
    DECIDING,
    GONE,
    RAN,
    UP_TO_READY,
    Destination,
    Guest,
    Line,
    Message,
    Step,
    Steps,
    World,
    send_to_source,
)

_UNDECIDED = (Destination.READY_MARKED, Destination.AWAITING_GO, Destination.GIVING_UP)
_STARTED = (Destination.RUNNING, Destination.UNJUDGED, Destination.COMPLETED, Destination.CONDEMNED)
_HEARS_VERDICT = (Destination.REVIVED, Destination.RUNNING, Destination.UNJUDGED, Destination.COMPLETED)
"""With STARTED as its last record; COMPLETED only if VERIFIED could not be written."""
_REMEMBERS_NOTHING = (Destination.IDLE, Destination.ABORTED)


class Hearing:
    """Messages only change what the daemon does next; a mutant replaces one of these methods.

    Whoever is started or aborted just now is decided about: what comes then waits.
    """

    def go_at_destination(self, world: World) -> Asked:
        return decision.go_at_destination(world.arrived)

    def mark_aborted(self, world: World) -> World:
        """Durable before the guest is discarded, and before it is said."""
        return world._replace(arrived=Mark.ABORTED, destination=Destination.DISCARD_DUE)

    def break_off(self, world: World, destination: Destination) -> World:
        """ABORT on the line that memory came on, if that is there; then it is closed."""
        if world.line is Line.FIRST:
            world = _hung_up(send_to_source(world, Message.ABORT))
        return world._replace(destination=destination)

    def messages(self, world: World) -> Steps:
        """Behind a question that is not answered yet nothing is read of its line."""
        if world.destination in DECIDING or world.destination is Destination.DOWN:
            return
        if world.to_destination and not world.owed:
            heard = world._replace(to_destination=world.to_destination[1:])
            yield from self._hear(heard, world.to_destination[0], "destination hears", on_line=True)
        for message in sorted(world.strays):
            yield from self._hear(world, message, "destination hears, late,", on_line=False)
        for message in sorted(world.stale):
            yield from self.hear_stale(world, message)

    # -- what comes over a line: HandOver.serve, Reception._go ----------------------------------------

    def _hear(self, world: World, message: Message, what: str, *, on_line: bool) -> Steps:
        """``world`` is the one after the message was taken from its line."""
        match message:
            case Message.FINISH if world.destination is Destination.RECEIVING:
                after = world._replace(destination=Destination.LOADED)
            case Message.ABORT if world.destination in UP_TO_READY:
                after = self.break_off(world, Destination.DISCARD_DUE)
            case Message.ABORT if world.destination in (Destination.READY_MARKED, Destination.AWAITING_GO):
                after = self.break_off(world, Destination.GIVING_UP)
            case Message.GO:
                after = self.hear_go(world, on_line=on_line)
            case Message.GOOD | Message.BAD:
                after = self.hear_verdict(world, message, on_line=on_line)
            case Message.TAKE_BACK | Message.LEAVE:
                after = self._hear_word(world, message, on_line=on_line)
            case _:
                after = world
        yield Step(f"{what} {message}", after)

    def hear_go(self, world: World, *, on_line: bool) -> World:
        """From whichever line: until it is decided, the first GO decides; a later one gets its answer."""
        owed = world._replace(owed=world.owed or (on_line and world.whole))
        if world.destination in UP_TO_READY:
            return self.break_off(world, Destination.DISCARD_DUE)
        if world.destination in _UNDECIDED:
            return self.obey_go(owed)
        if world.destination in _REMEMBERS_NOTHING:
            owed = self._look_up(owed, on_line=on_line)
        if owed.destination is Destination.REVIVED:
            return owed._replace(destination=Destination.START_DUE)
        return owed

    def obey_go(self, world: World) -> World:
        return world._replace(destination=Destination.GO_HEARD)

    def _look_up(self, world: World, *, on_line: bool) -> World:
        """No session remembers the migration: the journal does."""
        if self.go_at_destination(world) is Asked.ABORTED:
            known = world.arrived is Mark.ABORTED
            return world._replace(destination=Destination.ABORTED if known else Destination.UNHEARD_OF)
        if world.arrived is Mark.STARTED and not world.attached_there:
            return _hung_up(world) if on_line else world
        return self.revive(world)

    def revive(self, world: World) -> World:
        """The hand-over of a guest that was started here before this daemon was: ``Returns.revive``."""
        match world.arrived:
            case Mark.CONDEMNED:
                return world._replace(destination=Destination.CONDEMNED)
            case Mark.VERIFIED:
                return world._replace(destination=Destination.COMPLETED)
            case _:
                return world._replace(destination=Destination.REVIVED)

    # -- the verdict: HandOver._accept ----------------------------------------------------------------

    def hear_verdict(self, world: World, verdict: Message, *, on_line: bool) -> World:
        """By the journal's last record, whatever a session has made of it; the same again does nothing."""
        good = verdict is Message.GOOD
        match world.arrived:
            case Mark.STARTED if good and world.condemned_there:
                return self._refuse(world, on_line=on_line)
            case Mark.STARTED if world.destination in _HEARS_VERDICT:
                return world._replace(destination=Destination.GOOD_HEARD if good else Destination.BAD_HEARD)
            case Mark.VERIFIED if not good:
                return self._refuse(world, on_line=on_line)
            case Mark.CONDEMNED if good:
                return self._refuse(world, on_line=on_line)
            case _:
                return world

    def _refuse(self, world: World, *, on_line: bool) -> World:
        """Said, and the line is closed."""
        return _hung_up(send_to_source(world, Message.REFUSE)) if on_line else world

    # -- the operator's word: HandOver.resolve --------------------------------------------------------

    def _hear_word(self, world: World, word: Message, *, on_line: bool) -> World:
        if world.destination is Destination.IDLE and self.go_at_destination(world) is Asked.STARTED:
            if world.arrived is Mark.STARTED and not world.attached_there:
                return _hung_up(world) if on_line else world
            world = self.revive(world)
        elif world.destination in _REMEMBERS_NOTHING:
            return self.hear_go(world, on_line=on_line)
        if word is Message.TAKE_BACK:
            given = self.gives_back(world)
            after = self.mark_aborted(world) if given else None
        else:
            after = self.runs_on(world) if world.arrived in RAN and world.there not in GONE else None
        if after is None:
            return self._refuse(world, on_line=on_line)
        return after._replace(owed=world.owed or (on_line and world.whole))

    def gives_back(self, world: World) -> bool:
        """Whether the guest does not run here, and cannot any more."""
        lost = world.arrived is Mark.STARTED and world.there in GONE
        return lost or world.arrived in (Mark.READY, Mark.CONDEMNED)

    def runs_on(self, world: World) -> World:
        """Durable before the guest goes on."""
        if world.arrived is Mark.VERIFIED and world.there is Guest.RUNNING:
            return world
        return world._replace(arrived=Mark.VERIFIED, destination=Destination.RESUME_DUE)

    def hear_stale(self, world: World, message: Message) -> Steps:
        """A GO of the attempt before: it has ended here, and at most ABORTED becomes durable for it."""
        if message is Message.GO and world.before is not Mark.ABORTED:
            yield Step(
                "destination hears GO of the attempt before and journals ABORTED for it",
                world._replace(before=Mark.ABORTED),
            )

    def _answer(self, world: World) -> Steps:
        if not world.owed:
            return
        answer = self.answer(world)
        if answer is not None:
            after = send_to_source(world, answer)._replace(owed=False)
            yield Step(f"destination answers {answer}", after)

    def answer(self, world: World) -> Message | None:
        """None while it is being decided."""
        if world.destination in _STARTED:
            return Message.STARTED
        if world.destination is Destination.ABORTED:
            return Message.ABORTED
        return Message.ABORT if world.destination is Destination.LOST else None


def _hung_up(world: World) -> World:
    """The destination has closed the line: what it sent before still arrives."""
    return world._replace(whole=False, owed=False)
