"""What a daemon may do with a guest, decided by the last record of its journal and nothing else (G1 to G4).

These are the decisions of a daemon that was started again and finds a guest it did not leave, and of a
destination that is asked by GO. They are pure, so that the model of the hand-over
(``tests/handover/``) takes exactly the ones that production takes.
"""

from __future__ import annotations

from enum import StrEnum

from migd.migration.journal import Mark


class Paused(StrEnum):
    """What becomes of a guest that is found paused where it was to leave from."""

    RESUME = "resume"
    """GO was never sent, or the destination will never run it: it is ours (G1)."""
    ASK = "ask"
    """GO was or may have been sent: only the destination knows (G3)."""
    LET_GO = "let-go"
    """It runs at the destination: what is here only has to end."""
    KEEP = "keep"
    """It is, or is to be, paused at the destination: that is told again, and the operator decides (G4)."""


class Incoming(StrEnum):
    """What becomes of a guest that is found loaded and not started where it was to arrive."""

    START = "start"
    """STARTED was durable: the source was told so, or will be."""
    ABORT = "abort"
    """GO had not come, so it never will: durable before anything else."""
    KEEP = "keep"
    """The verdict on it was bad."""


class Arrived(StrEnum):
    """What becomes of a guest that is found paused where it has run."""

    CONDEMN = "condemn"
    """Only a bad verdict pauses it for the migration it came by: durable now, if it was not yet."""
    KEEP = "keep"
    """That is durable: the operator decides."""
    RESUME = "resume"
    """The operator has decided that it runs here."""
    DISCARD = "discard"
    """The operator has decided that it runs at the source."""


class Asked(StrEnum):
    """How a destination answers GO for a migration that no session of it remembers."""

    STARTED = "started"
    """Of STARTED by the guest itself, once it has come back: it is started if it was not.

    Of VERIFIED and CONDEMNED without touching the guest: it has run, and may be paused, or gone on.
    """
    ABORTED = "aborted"
    """Durable before it is said: a later GO gets the same answer."""


def paused_at_source(last: Mark | None) -> Paused:
    """``last`` of the source's journal for the migration that the guest is paused for."""
    match last:
        case None | Mark.ABORTED:
            return Paused.RESUME
        case Mark.RELEASED:
            return Paused.LET_GO
        case Mark.CONDEMNED:
            return Paused.KEEP
        case _:
            return Paused.ASK


def incoming_at_destination(last: Mark | None) -> Incoming:
    """``last`` of the destination's journal for the migration that the guest is incoming for."""
    match last:
        case Mark.STARTED | Mark.VERIFIED:
            return Incoming.START
        case Mark.CONDEMNED:
            return Incoming.KEEP
        case _:
            return Incoming.ABORT


def paused_at_destination(last: Mark) -> Arrived:
    """``last`` of the destination's journal for the migration that the guest is paused for."""
    match last:
        case Mark.VERIFIED:
            return Arrived.RESUME
        case Mark.ABORTED:
            return Arrived.DISCARD
        case Mark.CONDEMNED:
            return Arrived.KEEP
        case _:
            return Arrived.CONDEMN


def awaits_verdict(last: Mark | None) -> bool:
    """Whether a guest that is found running where it arrived waits, ``verdict_s`` at most, to move on."""
    return last is Mark.STARTED


def go_at_destination(last: Mark | None) -> Asked:
    """``last`` of the destination's journal for the migration that GO asks for."""
    return Asked.STARTED if last in (Mark.STARTED, Mark.VERIFIED, Mark.CONDEMNED) else Asked.ABORTED
