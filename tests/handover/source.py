"""SourceDaemon: the steps of ``migd/source/`` and, after a restart, of ``migd.daemon.returns``."""

from __future__ import annotations

from migd.migration import decision
from migd.migration.decision import Paused
from migd.migration.journal import Mark
from tests.handover.world import (
    Budget,
    Destination,
    Guest,
    Line,
    Message,
    Order,
    Source,
    Step,
    Steps,
    World,
    leave_line,
    send_to_destination,
)

_BEFORE_GO = (Source.MOVING, Source.PAUSING, Source.AWAITING_READY)


class SourceDaemon:
    """Each durable write, each message and each order to the guest is a step of its own.

    A mutant replaces one of these methods.
    """

    def paused_at_source(self, world: World) -> Paused:
        return decision.paused_at_source(world.left)

    def source(self, world: World) -> Steps:
        """Its own steps, in the order of the code; those that time or the operator takes come last."""
        if world.source is Source.DOWN:
            yield Step("the source daemon is started again", world._replace(source=Source.IDLE, session=True))
            return
        yield from self._attach_here(world)
        yield from self._before_go(world)
        yield from self._go(world)
        yield from self._release(world)
        yield from self._condemn(world)
        yield from self._take_back(world)
        yield from self._operator(world)

    # -- up to GO: SourceSession._before_go, Phases ---------------------------------------------------

    def _before_go(self, world: World) -> Steps:
        match world.source:
            case Source.MOVING:
                paused = world._replace(source=Source.PAUSING, orders_here=(*world.orders_here, Order.PAUSE))
                yield Step("source tells its guest to pause", paused)
            case Source.PAUSING if not world.orders_here and world.here is Guest.PAUSED:
                sent = send_to_destination(world, Message.FINISH)
                yield Step(
                    "source sends END and FINISH",
                    self.sent_finish(sent._replace(source=Source.AWAITING_READY)),
                )
            case Source.AWAITING_READY if self.hears_ready(world):
                yield Step("source hears READY", self._heard(world)._replace(source=Source.GOING))
            case Source.GOING:
                yield Step("source journals GO", self.mark_go(world))
                yield Step(
                    "source cannot journal GO",
                    world._replace(source=Source.ABORTING, session=True),
                    Budget.FULL,
                )
        if world.source in _BEFORE_GO:
            yield Step("source gives up before GO", world._replace(source=Source.ABORTING))

    def sent_finish(self, world: World) -> World:
        return world

    def hears_ready(self, world: World) -> bool:
        return world.to_source[:1] == (Message.READY,)

    def mark_go(self, world: World) -> World:
        return world._replace(left=Mark.GO, source=Source.GO_DUE)

    # -- GO: DestinationPeer.go, also for a guest that is to be let go or kept ------------------------

    def _go(self, world: World) -> Steps:
        match world.source:
            case Source.GO_DUE:
                yield from self._ask(world, Source.ASKING)
                yield Step("source gets no answer to GO", self.give_up_asking(world))
            case Source.ASKING:
                yield from self._answer_to_go(world)
                yield Step("source gets no answer to GO", self.give_up_asking(world))

    def _ask(self, world: World, asking: Source) -> Steps:
        """On the line there is, else on another."""
        if world.line is not Line.NONE:
            yield Step("source sends GO", self.sent_go(send_to_destination(world, Message.GO), asking))
        elif world.destination is not Destination.DOWN:
            fresh = world._replace(line=Line.ANOTHER, whole=True)
            yield Step(
                "source sends GO on another line",
                self.sent_go(send_to_destination(fresh, Message.GO), asking),
            )

    def sent_go(self, world: World, asking: Source) -> World:
        return world._replace(source=asking)

    def _answer_to_go(self, world: World) -> Steps:
        if not world.to_source:
            if not world.whole:
                yield Step("source notices that the line is lost", self.ask_again(world))
            return
        message = world.to_source[0]
        heard = self._heard(world)
        match message:
            case Message.STARTED if world.session:
                yield Step("source hears STARTED", heard._replace(source=Source.STARTED_HEARD))
            case Message.STARTED:
                yield Step("source hears STARTED, its digests are gone", self.cannot_verify(heard))
            case Message.ABORTED:
                yield Step("source hears ABORTED", heard._replace(source=Source.TAKING_BACK))
            case _:
                yield Step(f"source hears {message} instead of an answer to GO", self.ask_again(world))

    def ask_again(self, world: World) -> World:
        return leave_line(world)._replace(source=Source.GO_DUE)

    def give_up_asking(self, world: World) -> World:
        return leave_line(world)._replace(source=Source.UNKNOWN)

    def cannot_verify(self, world: World) -> World:
        return world._replace(source=Source.FOUND_GOOD)

    # -- STARTED: HandOver.finish, Resolution._let_go -------------------------------------------------

    def _release(self, world: World) -> Steps:
        match world.source:
            case Source.STARTED_HEARD:
                noted = world._replace(left=Mark.STARTED, source=Source.TO_VERIFY)
                yield Step("source journals STARTED", noted)
                unnoted = world._replace(source=Source.TO_VERIFY)
                yield Step("source cannot journal STARTED", unnoted, Budget.FULL)
            case Source.TO_VERIFY:
                yield Step("source verifies late: good", world._replace(source=Source.FOUND_GOOD))
                yield Step("source verifies late: a page is wrong", world._replace(source=Source.FOUND_BAD))
            case Source.FOUND_GOOD if world.session:
                told = send_to_destination(world, Message.GOOD)
                yield Step("source sends a good verdict", told._replace(source=Source.RELEASE_DUE))
            case Source.FOUND_GOOD:
                told = self._tell(world, Message.GOOD, Source.TELLING_GOOD)
                yield Step("source sends a good verdict and GO", told)
            case Source.TELLING_GOOD:
                yield from self._hears_of_good(world)
            case Source.RELEASE_DUE:
                quits = world._replace(orders_here=(*world.orders_here, Order.QUIT), source=Source.RELEASED)
                yield Step("source tells its guest to quit", quits)
            case Source.RELEASED:
                over = self._over(world)
                yield Step("source journals RELEASED", over._replace(left=Mark.RELEASED))
                yield Step("source cannot journal RELEASED", over, Budget.FULL)

    def _hears_of_good(self, world: World) -> Steps:
        if world.to_source[:1] == (Message.STARTED,):
            yield Step("source hears STARTED", self._heard(world)._replace(source=Source.RELEASE_DUE))
        elif world.to_source[:1] == (Message.REFUSE,):
            yield Step("source hears REFUSE", self.good_is_refused(leave_line(world)))
        elif world.to_source or not world.whole:
            yield Step("source cannot tell the good verdict", self.good_untold(leave_line(world)))

    def good_is_refused(self, world: World) -> World:
        return world._replace(source=Source.REFUSED)

    def good_untold(self, world: World) -> World:
        return world._replace(source=Source.UNKNOWN)

    # -- a bad verdict: HandOver._condemn, DestinationPeer.deliver ------------------------------------

    def _condemn(self, world: World) -> Steps:
        match world.source:
            case Source.FOUND_BAD | Source.REFUSED:
                due = Source.VERDICT_DUE if world.source is Source.FOUND_BAD else Source.KEEPING
                yield Step("source journals CONDEMNED", self.mark_condemned(world, due))
            case Source.VERDICT_DUE if world.line is Line.NONE:
                yield from self._ask(world, Source.ASKING_TO_TELL)
                yield Step("source cannot tell the bad verdict", self._kept(world))
            case Source.VERDICT_DUE:
                told = self._tell(world, Message.BAD, Source.TELLING_BAD)
                yield Step("source sends a bad verdict and GO", told)
            case Source.ASKING_TO_TELL:
                yield from self._hears_of_bad(world, Source.VERDICT_DUE)
                yield Step("source cannot tell the bad verdict", self._kept(world))
            case Source.TELLING_BAD:
                yield from self._hears_of_bad(world, Source.KEEPING)
                yield Step("source cannot tell the bad verdict", self._kept(world))

    def _tell(self, world: World, verdict: Message, telling: Source) -> World:
        """What is sent on one line is done in its order: the answer to GO comes behind the verdict."""
        return send_to_destination(send_to_destination(world, verdict), Message.GO)._replace(source=telling)

    def _hears_of_bad(self, world: World, then: Source) -> Steps:
        match world.to_source[:1]:
            case (Message.STARTED,) if then is Source.KEEPING:
                yield Step("source hears STARTED", self._kept(world))
            case (Message.STARTED,):
                yield Step("source hears STARTED", self._heard(world)._replace(source=then))
            case (Message.ABORTED,):
                yield Step("source hears ABORTED", self._heard(world)._replace(source=Source.TAKING_BACK))
            case (Message.REFUSE,):
                yield Step("source hears REFUSE", self._kept(world))
            case (_,) | () if world.to_source or not world.whole:
                again = leave_line(world)._replace(source=Source.VERDICT_DUE)
                yield Step("source notices that the line is lost", again)

    def _kept(self, world: World) -> World:
        """A record that could not be written before is written now."""
        return leave_line(world)._replace(source=Source.KEEPING, left=Mark.CONDEMNED, session=False)

    def mark_condemned(self, world: World, then: Source) -> World:
        return world._replace(left=Mark.CONDEMNED, source=then)

    # -- the guest is ours: SourceSession._abort, Resolution._take_back -------------------------------

    def _take_back(self, world: World) -> Steps:
        match world.source:
            case Source.ABORTING:
                told = send_to_destination(world, Message.ABORT)
                yield Step("source sends ABORT", told._replace(source=Source.RESUME_DUE))
            case Source.RESUME_DUE:
                over = self._over(self._resume(world))
                yield Step("source tells its guest to go on", over)
            case Source.TAKING_BACK if world.session:
                resumed = self._resume(world)._replace(source=Source.TAKEN_BACK)
                yield Step("source tells its guest to go on", resumed)
            case Source.TAKING_BACK:
                marked = world._replace(left=Mark.ABORTED, source=Source.RESUME_DUE)
                yield Step("source journals ABORTED", marked)
            case Source.TAKEN_BACK:
                over = self._over(world)
                yield Step("source journals ABORTED", over._replace(left=Mark.ABORTED))
                yield Step("source cannot journal ABORTED", over, Budget.FULL)

    def _resume(self, world: World) -> World:
        return world._replace(orders_here=(*world.orders_here, Order.RESUME))

    # -- a daemon that was started again: Returns -----------------------------------------------------

    def _attach_here(self, world: World) -> Steps:
        """The guest looks for the next daemon when it has obeyed the last."""
        alive = world.here in (Guest.RUNNING, Guest.PAUSED)
        if alive and not world.attached_here and not world.orders_here:
            yield Step(
                "the guest attaches to the source again", self.found(world._replace(attached_here=True))
            )

    def found(self, world: World) -> World:
        if world.here is not Guest.PAUSED:
            return world
        match self.paused_at_source(world):
            case Paused.RESUME:
                return self._resume(world)
            case Paused.ASK:
                return world._replace(source=Source.GO_DUE, session=False)
            case Paused.LET_GO:
                return world._replace(orders_here=(*world.orders_here, Order.QUIT))
            case Paused.KEEP:
                return world._replace(source=Source.VERDICT_DUE, session=False)

    # -- the operator: Resolution, Returns.resolve ----------------------------------------------------

    def _operator(self, world: World) -> Steps:
        """`migd resolve`; with a word for one side only where that is the operator's to say.

        The model's operator never decides for one side while the other does not answer: their own risk.
        """
        match world.source:
            case Source.UNKNOWN:
                yield Step("the operator resolves", world._replace(source=Source.GO_DUE))
                word = None if world.there is Guest.KILLED_UNSTARTED else Budget.WORD
                yield from self._ask_operator(world, Message.TAKE_BACK, Source.ASKING_BACK, word)
            case Source.KEEPING:
                yield Step("the operator resolves", world._replace(source=Source.VERDICT_DUE))
                yield from self._ask_operator(world, Message.TAKE_BACK, Source.ASKING_BACK, Budget.WORD)
                yield from self._ask_operator(world, Message.LEAVE, Source.LEAVING_IT, Budget.WORD)
            case Source.ASKING_BACK | Source.LEAVING_IT:
                yield from self._hears_of_word(world)

    def _ask_operator(self, world: World, word: Message, asking: Source, cost: Budget | None) -> Steps:
        if world.destination is not Destination.DOWN:
            fresh = world._replace(line=Line.ANOTHER, whole=True, source=asking)
            yield Step(f"the operator has the source send {word}", send_to_destination(fresh, word), cost)

    def _hears_of_word(self, world: World) -> Steps:
        unchanged = Source.KEEPING if world.left is Mark.CONDEMNED else Source.UNKNOWN
        match world.to_source[:1]:
            case (Message.ABORTED,):
                taken = self._heard(world)._replace(source=Source.TAKING_BACK, session=False)
                yield Step("source hears ABORTED", taken)
            case (Message.STARTED,) if world.source is Source.LEAVING_IT:
                yield Step("source hears STARTED", self._heard(world)._replace(source=Source.RELEASE_DUE))
            case (_,) | () if world.to_source or not world.whole:
                yield Step("the operator's word is not done", leave_line(world)._replace(source=unchanged))

    def _over(self, world: World) -> World:
        return leave_line(world)._replace(source=Source.IDLE, session=True)

    def _heard(self, world: World) -> World:
        return world._replace(to_source=world.to_source[1:])
