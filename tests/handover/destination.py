"""DestinationDaemon: the steps of ``migd/destination/`` and, after a restart, of ``migd.daemon.returns``."""

from __future__ import annotations

from migd.migration import decision
from migd.migration.decision import Arrived, Incoming
from migd.migration.journal import Mark
from tests.handover.hearing import Hearing
from tests.handover.world import (
    DECIDING,
    GONE,
    UP_TO_READY,
    Budget,
    Destination,
    Guest,
    Line,
    Message,
    Order,
    Step,
    Steps,
    World,
    send_to_source,
)


class DestinationDaemon(Hearing):
    """Each durable write, each message and each order to the guest is a step of its own.

    A mutant replaces one of these methods.
    """

    def incoming_at_destination(self, world: World) -> Incoming:
        return decision.incoming_at_destination(world.arrived)

    def destination(self, world: World) -> Steps:
        """Its own steps, in the order of the code."""
        if world.destination is Destination.DOWN:
            again = world._replace(destination=Destination.IDLE)
            yield Step("the destination daemon is started again", again)
            return
        yield from self._attach_there(world)
        yield from self._receive(world)
        yield from self._ready(world)
        yield from self._start(world)
        yield from self._judge(world)
        yield from self._abort(world)
        yield from self._answer(world)
        yield from self._operator_there(world)
        yield from self.messages(world)

    # -- up to READY: DestinationSession._until_ready -------------------------------------------------

    def _receive(self, world: World) -> Steps:
        if world.destination is Destination.LOADED:
            yield Step("destination journals READY", self.ready(world))
        if world.destination in UP_TO_READY:
            yield Step("destination gives up before READY", self.break_off(world, Destination.DISCARD_DUE))

    def ready(self, world: World) -> World:
        return world._replace(arrived=Mark.READY, destination=Destination.READY_MARKED)

    def _ready(self, world: World) -> Steps:
        match world.destination:
            case Destination.READY_MARKED if world.line is Line.FIRST and world.whole:
                sent = send_to_source(world, Message.READY)
                yield Step("destination sends READY", sent._replace(destination=Destination.AWAITING_GO))
            case Destination.READY_MARKED:
                yield Step("destination cannot send READY", world._replace(destination=Destination.GIVING_UP))
                # Or that was noticed while READY was written, and nobody remembers that it is durable.
                gone = world._replace(destination=Destination.DISCARD_DUE)
                yield Step("destination gives up with READY durable", gone)
            case Destination.AWAITING_GO:
                given_up = self.break_off(world, Destination.GIVING_UP)
                yield Step("destination gives up: no GO in time", given_up)

    # -- GO: HandOver._go -----------------------------------------------------------------------------

    def _start(self, world: World) -> Steps:
        match world.destination:
            case Destination.GO_HEARD:
                refused = world._replace(destination=Destination.AWAITING_GO)
                if world.owed:
                    refused = send_to_source(refused, Message.ABORT)._replace(owed=False)
                yield Step("destination cannot journal STARTED", refused, Budget.FULL)
                yield Step("destination journals STARTED", self.start(world))
            case Destination.START_DUE if world.there in GONE:
                yield Step("destination finds its guest gone", world._replace(destination=Destination.LOST))
            case Destination.START_DUE:
                told = world._replace(
                    orders_there=(*world.orders_there, Order.START), destination=Destination.STARTING
                )
                yield Step("destination tells its guest to start", told)
            case Destination.STARTING if world.there in GONE:
                yield Step("destination finds its guest gone", world._replace(destination=Destination.LOST))
            case Destination.STARTING if not world.orders_there:
                yield Step("destination hears that its guest runs", self.runs(world))

    def start(self, world: World) -> World:
        """Durable before the guest is started."""
        return world._replace(arrived=Mark.STARTED, destination=Destination.START_DUE)

    def runs(self, world: World) -> World:
        return world._replace(destination=Destination.RUNNING)

    # -- what was heard is done -----------------------------------------------------------------------

    def _judge(self, world: World) -> Steps:
        match world.destination:
            case Destination.RUNNING:
                yield Step("destination hears no verdict", world._replace(destination=Destination.UNJUDGED))
            case Destination.GOOD_HEARD:
                over = world._replace(destination=Destination.COMPLETED)
                yield Step("destination journals VERIFIED", over._replace(arrived=Mark.VERIFIED))
                yield Step("destination cannot journal VERIFIED", over, Budget.FULL)
            case Destination.BAD_HEARD:
                told = world._replace(
                    orders_there=(*world.orders_there, Order.PAUSE), destination=Destination.PAUSING
                )
                yield Step("destination tells its guest to pause", told)
            case Destination.PAUSING if not world.orders_there:
                over = world._replace(destination=Destination.CONDEMNED)
                yield Step("destination journals CONDEMNED", over._replace(arrived=Mark.CONDEMNED))
                unwritten = world._replace(destination=Destination.RUNNING)
                said = send_to_source(unwritten, Message.ABORT)._replace(whole=False, owed=False)
                yield Step("destination cannot journal CONDEMNED", said, Budget.FULL)
            case Destination.RESUME_DUE:
                resumed = world._replace(
                    orders_there=(*world.orders_there, Order.RESUME),
                    destination=Destination.RESUMING,
                    condemned_there=False,
                )
                yield Step("destination tells its guest to go on", resumed)
            case Destination.RESUMING if not world.orders_there:
                over = world._replace(destination=Destination.COMPLETED)
                yield Step("destination hears that its guest runs", over)

    # -- never: HandOver.abort, Reception._never_heard_of ---------------------------------------------

    def _abort(self, world: World) -> Steps:
        match world.destination:
            case Destination.GIVING_UP:
                yield Step("destination journals ABORTED", self.mark_aborted(world))
                given_up = world._replace(destination=Destination.DISCARD_DUE)
                yield Step("destination cannot journal ABORTED", given_up, Budget.FULL)
            case Destination.DISCARD_DUE:
                yield Step("destination discards its guest", self.discard(world))
            case Destination.UNHEARD_OF:
                yield Step(
                    "destination journals ABORTED",
                    world._replace(arrived=Mark.ABORTED, destination=Destination.ABORTED),
                )

    def discard(self, world: World) -> World:
        return world._replace(orders_there=(*world.orders_there, Order.QUIT), destination=Destination.ABORTED)

    # -- a daemon that was started again: Returns -----------------------------------------------------

    def _attach_there(self, world: World) -> Steps:
        alive = world.there in (Guest.INCOMING, Guest.RUNNING, Guest.PAUSED)
        if alive and not world.attached_there and not world.orders_there:
            yield Step(
                "the guest attaches to the destination again",
                self.found_there(world._replace(attached_there=True)),
            )

    def found_there(self, world: World) -> World:
        if world.there is Guest.PAUSED:
            return self._found_paused(world)
        if world.there is not Guest.INCOMING:
            return world
        match self.incoming_at_destination(world):
            case Incoming.START:
                return world._replace(orders_there=(*world.orders_there, Order.START))
            case Incoming.ABORT:
                return self.mark_aborted(world)
            case Incoming.KEEP:
                return world

    def paused_at_destination(self, world: World) -> Arrived:
        assert world.arrived is not None
        return decision.paused_at_destination(world.arrived)

    def _found_paused(self, world: World) -> World:
        """Where it has run: ``HandOver.found_paused``."""
        match self.paused_at_destination(world):
            case Arrived.CONDEMN:
                return world._replace(destination=Destination.PAUSING)
            case Arrived.KEEP:
                return world._replace(destination=Destination.CONDEMNED)
            case Arrived.RESUME:
                return world._replace(destination=Destination.RESUME_DUE)
            case Arrived.DISCARD:
                return world._replace(destination=Destination.DISCARD_DUE)

    # -- the operator: Resolving ---------------------------------------------------------------------

    def _operator_there(self, world: World) -> Steps:
        """`migd resolve --force-...` at the destination, about a guest that is condemned, or really gone."""
        if world.destination in DECIDING:
            return
        if world.arrived is Mark.STARTED and world.there is Guest.KILLED_UNSTARTED:
            yield Step("the operator of the destination gives its lost guest up", self.mark_aborted(world))
        if world.arrived is Mark.CONDEMNED and world.attached_there:
            yield Step(
                "the operator of the destination gives its guest up", self.mark_aborted(world), Budget.WORD
            )
            yield Step(
                "the operator of the destination has its guest go on", self.runs_on(world), Budget.WORD
            )
