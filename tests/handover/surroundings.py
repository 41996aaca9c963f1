"""What happens around the two daemons: guests obey, processes die, the network breaks, a request comes."""

from __future__ import annotations

from migd.migration.journal import Mark
from tests.handover.world import (
    GONE,
    Budget,
    Destination,
    Guest,
    Line,
    Order,
    Source,
    Step,
    Steps,
    World,
    leave_line,
)

_OBEYED = {
    (Guest.RUNNING, Order.PAUSE): Guest.PAUSED,
    (Guest.PAUSED, Order.RESUME): Guest.RUNNING,
    (Guest.INCOMING, Order.START): Guest.RUNNING,
    (Guest.RUNNING, Order.QUIT): Guest.ENDED,
    (Guest.PAUSED, Order.QUIT): Guest.ENDED,
    (Guest.INCOMING, Order.QUIT): Guest.ENDED,
}
"""What an order does to a guest (``migd/guest/guest.py``); any other changes nothing."""


class Surroundings:
    """Nothing here is migd's to choose."""

    def surroundings(self, world: World) -> Steps:
        yield from self._guests(world)
        yield from self._requests(world)
        yield from self._network(world)
        yield from self._crashes(world)
        yield from self._kills(world)

    def _guests(self, world: World) -> Steps:
        if world.orders_here:
            order, *rest = world.orders_here
            after = self._obeyed(world.here, order)
            yield Step(
                f"the guest at the source obeys {order}", world._replace(here=after, orders_here=tuple(rest))
            )
        if world.orders_there:
            order, *rest = world.orders_there
            after = self._obeyed(world.there, order)
            yield Step(
                f"the guest at the destination obeys {order}",
                world._replace(
                    there=after,
                    orders_there=tuple(rest),
                    condemned_there=world.condemned_there or order is Order.PAUSE,
                ),
            )

    def _obeyed(self, guest: Guest, order: Order) -> Guest:
        return _OBEYED.get((guest, order), guest)

    def _requests(self, world: World) -> Steps:
        """The first attempt, and others once nothing is left of the one before but its messages."""
        free = (
            world.source is Source.IDLE
            and world.here is Guest.RUNNING
            and world.attached_here
            and not world.orders_here
        )
        taken = world.destination in (Destination.IDLE, Destination.ABORTED) and world.there in GONE
        if free and taken and not world.orders_there:
            begun = World(
                source=Source.MOVING,
                destination=Destination.RECEIVING,
                there=Guest.INCOMING,
                attached_there=True,
                line=Line.FIRST,
                whole=True,
                attempt=world.attempt + 1,
                before=world.arrived,
                stale=world.strays,
            )
            yield Step("the operator migrates the guest", begun, Budget.ATTEMPT)

    def _network(self, world: World) -> Steps:
        if world.whole:
            yield Step("the network cuts the line", world._replace(whole=False, owed=False), Budget.CUT)
        for message in sorted(world.strays):
            yield Step(f"a late {message} is lost", world._replace(strays=world.strays - {message}))

    def _crashes(self, world: World) -> Steps:
        if world.source is not Source.DOWN:
            down = leave_line(world)._replace(source=Source.DOWN, session=True, attached_here=False)
            yield Step("the source daemon is killed", down, Budget.SOURCE_CRASH)
        if world.destination is not Destination.DOWN:
            down = world._replace(
                destination=Destination.DOWN,
                attached_there=False,
                whole=False,
                owed=False,
                to_destination=(),
            )
            yield Step("the destination daemon is killed", down, Budget.DESTINATION_CRASH)

    def _kills(self, world: World) -> Steps:
        if world.here not in GONE:
            dead = world._replace(here=Guest.KILLED, attached_here=False, orders_here=())
            yield Step("the guest at the source is killed", dead, Budget.KILL)
        if world.there not in GONE:
            unstarted = world.there is Guest.INCOMING
            dead = world._replace(
                there=Guest.KILLED_UNSTARTED if unstarted else Guest.KILLED,
                attached_there=False,
                orders_there=(),
            )
            yield Step("the guest at the destination is killed", dead, Budget.KILL)
        if world.there is Guest.INCOMING and world.destination is Destination.DOWN and not world.orders_there:
            # It ends by itself without a daemon. With STARTED durable that is as good as killed.
            ended = Guest.KILLED_UNSTARTED if world.arrived is Mark.STARTED else Guest.ENDED
            yield Step(
                "the incoming guest gives its daemon up",
                world._replace(there=ended),
                Budget.KILL if world.arrived is Mark.STARTED else None,
            )
