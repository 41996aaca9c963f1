"""HandOverModel: daemons and surroundings, what must never be, and what must always be in reach."""

from __future__ import annotations

from collections.abc import Iterator

from migd.migration.journal import Mark
from tests.handover.destination import DestinationDaemon
from tests.handover.source import SourceDaemon
from tests.handover.surroundings import Surroundings
from tests.handover.world import GONE, RAN, Destination, Guest, Message, Order, Source, Step, World

_KILLED = (Guest.KILLED, Guest.KILLED_UNSTARTED)
_WORDS = frozenset({Message.TAKE_BACK, Message.LEAVE})


class HandOverModel(SourceDaemon, DestinationDaemon, Surroundings):
    """The world as the real daemons make it; a mutant is a subclass that does one thing wrong."""

    def initial(self) -> World:
        """Nothing has happened: the first attempt is a request like any other."""
        return World(attempt=0)

    def steps(self, world: World) -> Iterator[Step]:
        """All that may happen next. What changes nothing is no step."""
        for walk in (self.source, self.destination, self.surroundings):
            for step in walk(world):
                if step.after != world:
                    yield step

    # -- what must never be --------------------------------------------------------------------------

    def wrong(self, world: World) -> str | None:
        """Why a world must never be, or None."""
        if world.here is Guest.RUNNING and world.there is Guest.RUNNING:
            return "G2: two guests run"
        if world.there is Guest.RUNNING and world.left is None:
            return "the guest runs at the destination and GO was not durable at the source"
        if world.there is Guest.RUNNING and world.arrived in (None, Mark.ABORTED):
            return f"the guest runs at the destination, whose journal says {world.arrived or 'nothing'}"
        if world.left is not None and world.arrived is None:
            return "GO is durable and READY is not"
        if world.here is Guest.ENDED and world.arrived not in RAN and world.there not in _KILLED:
            return "the source has let go of its guest, and STARTED is not durable at the destination"
        return self._wrong_after_verdict(world) or self._lie(world) or self._forgotten(world)

    def _wrong_after_verdict(self, world: World) -> str | None:
        decided_there = world.arrived in (Mark.VERIFIED, Mark.ABORTED)  # by the operator
        if world.left is Mark.CONDEMNED and not decided_there and world.here not in (Guest.PAUSED, *_KILLED):
            return "G4: the verdict was bad, and the source has not kept its paused guest"
        if world.condemned_there and world.there is Guest.RUNNING:
            return "G4: the destination's guest was paused by a bad verdict, and runs"
        if world.condemned_there and world.here is Guest.ENDED:
            return "G4: the destination's guest was paused by a bad verdict, and the source let go of its own"
        return None

    def _lie(self, world: World) -> str | None:
        """An answer under way that is not true, or can become untrue."""
        if Message.GO in (*world.to_destination, *world.strays) and world.left is None:
            return "GO was sent before it was durable"
        given_up = world.there in GONE or Order.QUIT in world.orders_there
        if Message.ABORTED in world.to_source and world.arrived is not Mark.ABORTED and not given_up:
            return "ABORTED was said, and the guest may start yet"
        if Message.STARTED in world.to_source and world.there in (Guest.INCOMING, Guest.KILLED_UNSTARTED):
            return "STARTED was said of a guest that was not started"
        return None

    def _forgotten(self, world: World) -> str | None:
        at_rest = world.source is Source.IDLE and world.attached_here and not world.orders_here
        if at_rest and world.here is Guest.PAUSED and world.left is None:
            return "G1: GO was never sent, the source daemon is up, and its guest stays paused"
        return None

    # -- what must always be in reach, without another fault --------------------------------------------

    def settled(self, world: World) -> bool:
        """The guest runs on one side for good, or the operator has to decide, or it was killed."""
        if world.here in _KILLED or world.there is Guest.KILLED:
            return True
        if not _WORDS.isdisjoint((*world.to_destination, *world.strays)):
            return False
        if world.left is Mark.CONDEMNED and world.arrived is Mark.CONDEMNED:
            return world.there is Guest.PAUSED
        if world.left is Mark.CONDEMNED and world.arrived is Mark.VERIFIED:  # a word that only one side heard
            return world.there is Guest.RUNNING
        runs_here = world.here is Guest.RUNNING and not world.orders_here and world.there in GONE
        at_rest = world.source is Source.IDLE and world.destination is not Destination.DOWN
        let_go = world.here is Guest.ENDED or Order.QUIT in world.orders_here
        runs_there = world.there is Guest.RUNNING and let_go
        return (runs_here and at_rest) or runs_there
