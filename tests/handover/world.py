"""World: everything that the hand-over depends on, as one value: daemons, guests, journals, messages."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, StrEnum
from typing import NamedTuple

from migd.migration.journal import Mark


class _Word(StrEnum):
    """A string that is hashed as quickly as one: worlds are, a million times."""

    __hash__ = str.__hash__


class Source(_Word):
    """Where the source daemon stands: what it has done, and so what it does next."""

    DOWN = "down"
    IDLE = "idle"
    """No session: none yet, or it has ended, or the daemon was started again."""
    MOVING = "moving"
    PAUSING = "pausing"
    AWAITING_READY = "awaiting READY"
    GOING = "going"
    """READY was heard; GO is not durable."""
    GO_DUE = "GO due"
    """GO is durable and has to be sent, again perhaps."""
    ASKING = "asking"
    """GO was sent on the line."""
    UNKNOWN = "unknown"
    STARTED_HEARD = "STARTED heard"
    TO_VERIFY = "to verify"
    FOUND_GOOD = "found good"
    RELEASE_DUE = "release due"
    RELEASED = "released"
    """QUIT was told; RELEASED is not durable."""
    FOUND_BAD = "found bad"
    VERDICT_DUE = "bad verdict due"
    """CONDEMNED is durable and the destination has to be told, again perhaps."""
    ASKING_TO_TELL = "asking to tell"
    """GO was sent on a new line, whose answer the bad verdict has to follow."""
    TELLING_BAD = "telling a bad verdict"
    """It was sent, and GO behind it: the answer to that says that it was acted upon."""
    TELLING_GOOD = "telling a good verdict"
    """The same, by a daemon that was started again."""
    KEEPING = "keeping"
    """The bad verdict was told, or could not be: the paused guest is kept."""
    ASKING_BACK = "asking it back"
    """The operator's word for the source was sent."""
    LEAVING_IT = "leaving it"
    """The operator's word for the destination was sent."""
    REFUSED = "refused"
    """The destination condemned the guest, which is not durable here."""
    ABORTING = "aborting"
    RESUME_DUE = "resume due"
    TAKING_BACK = "taking back"
    """The destination said ABORTED."""
    TAKEN_BACK = "taken back"
    """The guest was resumed after ABORTED, which is not durable here."""


class Destination(_Word):
    """Where the destination daemon stands with the migration."""

    DOWN = "down"
    IDLE = "idle"
    """Nothing of the migration in memory."""
    RECEIVING = "receiving"
    LOADED = "loaded"
    READY_MARKED = "READY durable"
    AWAITING_GO = "awaiting GO"
    GIVING_UP = "giving up"
    """ABORTED is to be made durable: GO may still come first."""
    DISCARD_DUE = "discard due"
    ABORTED = "aborted"
    UNHEARD_OF = "unheard of"
    """GO came for a migration that will never run here; that is not durable."""
    REVIVED = "revived"
    """A daemon that was started again was asked about a guest whose STARTED is durable."""
    GO_HEARD = "GO heard"
    START_DUE = "start due"
    STARTING = "starting"
    RUNNING = "running"
    UNJUDGED = "unjudged"
    """No verdict came in time."""
    GOOD_HEARD = "good verdict heard"
    COMPLETED = "completed"
    BAD_HEARD = "bad verdict heard"
    PAUSING = "pausing"
    CONDEMNED = "condemned"
    RESUME_DUE = "resume due"
    """The operator has it run on, which is durable."""
    RESUMING = "resuming"
    LOST = "lost"
    """The guest died after STARTED was durable and before it was started."""


class Guest(_Word):
    """A guest process at one side."""

    NONE = "none"
    INCOMING = "incoming"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"
    """It was told to."""
    KILLED = "killed"
    KILLED_UNSTARTED = "killed before it was started"


GONE = (Guest.NONE, Guest.ENDED, Guest.KILLED, Guest.KILLED_UNSTARTED)

UP_TO_READY = (Destination.RECEIVING, Destination.LOADED)
DECIDING = (
    Destination.GO_HEARD,
    Destination.START_DUE,
    Destination.STARTING,
    Destination.GOOD_HEARD,
    Destination.BAD_HEARD,
    Destination.PAUSING,
    Destination.RESUME_DUE,
    Destination.RESUMING,
    Destination.UNHEARD_OF,
    Destination.DISCARD_DUE,
)
"""The hand-over's lock is held: what comes waits."""

RAN = (Mark.STARTED, Mark.VERIFIED, Mark.CONDEMNED)
"""Last records of a destination that started its guest, or is about to."""


class Order(_Word):
    """What a daemon tells its guest."""

    PAUSE = "PAUSE"
    RESUME = "RESUME"
    START = "START"
    QUIT = "QUIT"


class Message(_Word):
    """What one daemon tells the other; ``FINISH`` stands for all of memory and device state."""

    FINISH = "FINISH"
    GO = "GO"
    ABORT = "ABORT"
    GOOD = "VERDICT good"
    BAD = "VERDICT bad"
    TAKE_BACK = "RESOLVE source"
    LEAVE = "RESOLVE destination"
    READY = "READY"
    STARTED = "STARTED"
    ABORTED = "ABORTED"
    REFUSE = "REFUSE"


class Line(_Word):
    """The connection that the source has, if any."""

    NONE = "none"
    FIRST = "first"
    """On which memory came."""
    ANOTHER = "another"


class Budget(Enum):
    """What happens only so many times in a search."""

    SOURCE_CRASH = "source crashes"
    DESTINATION_CRASH = "destination crashes"
    CUT = "network cuts"
    KILL = "guests killed"
    FULL = "journal writes that fail"
    ATTEMPT = "attempts"
    WORD = "words of the operator"


class World(NamedTuple):
    """Messages are in order on one line, and in none between lines."""

    source: Source = Source.IDLE
    destination: Destination = Destination.IDLE
    session: bool = True
    """A session acts at the source; else a daemon started again ends what the one before it has begun."""
    left: Mark | None = None
    """Last record of the source's journal for this attempt."""
    arrived: Mark | None = None
    """Last record of the destination's."""
    here: Guest = Guest.RUNNING
    """The process at the source."""
    there: Guest = Guest.NONE
    """The process at the destination."""
    attached_here: bool = True
    attached_there: bool = False
    orders_here: tuple[Order, ...] = ()
    """In the guest's socket: it obeys them even if the daemon dies, and before it attaches to the next."""
    orders_there: tuple[Order, ...] = ()
    line: Line = Line.NONE
    whole: bool = False
    """What is sent on the line arrives; on a broken one only what was sent before."""
    owed: bool = False
    """A question came over the line and is not answered; nothing behind it is read."""
    to_destination: tuple[Message, ...] = ()
    to_source: tuple[Message, ...] = ()
    strays: frozenset[Message] = frozenset()
    """Of this attempt, on lines that the source has left: each may come now, later, twice or never."""
    stale: frozenset[Message] = frozenset()
    """The strays of the attempt before."""
    before: Mark | None = None
    """Last record of the destination's journal for the attempt before."""
    attempt: int = 1
    condemned_there: bool = False
    """The guest at the destination was paused for a bad verdict."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(self._fields, self, strict=True))


class Step(NamedTuple):
    """One thing that may happen next."""

    name: str
    after: World
    cost: Budget | None = None


Steps = Iterator[Step]


def send_to_destination(world: World, message: Message) -> World:
    """Sent on the line; on a broken one, or without one, it is lost."""
    if not world.whole:
        return world
    return world._replace(to_destination=(*world.to_destination, message))


def send_to_source(world: World, message: Message) -> World:
    """Sent on the line; on a broken one it is lost."""
    if not world.whole:
        return world
    return world._replace(to_source=(*world.to_source, message))


def leave_line(world: World) -> World:
    """The source closes its line, or dies: what it had sent is under way yet, what comes back is lost."""
    return world._replace(
        line=Line.NONE,
        whole=False,
        owed=False,
        to_destination=(),
        to_source=(),
        strays=world.strays | set(world.to_destination) | (set(world.to_source) & {Message.READY}),
    )
