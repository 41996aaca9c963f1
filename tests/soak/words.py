"""What a soaked guest and the soak say to each other, one JSON object a packet, beside migd's own protocols.

::

    guest                                   soak
    Here [journal, RAM blocks]       ->                 once it has both
    Stopped                          ->                 at every pause, before the daemon hears of it
    Starting                         ->                 at the destination, before its first instruction
                                     <-   Compared      RAM was looked at: it may run
                                     <-   Behave        from now on, until told otherwise
    Behaving                         ->
                                     <-   Halt          store nothing more
    Halted                           ->

The end of this connection ends the guest: the soak is gone, or done with it.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from migd.guest.control import MAX_PACKET_BYTES, MAX_PACKET_FDS
from tests.soak.hinting import Manner


class _Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class Behaviour(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a guest works and answers; it keeps that when it is moved."""

    manner: Manner = Manner.QUICK
    rate_bytes_s: int = 10_000_000
    reuse_share: float = 0.0
    """Of its steps: free a run and take it into use again at once."""
    seize_share: float = 0.0
    """Of the pages that it is about to say are free: taken into use before, or while, it says so."""
    smuggles: bool = False
    """A planted fault: it stores behind the dirty log's back as well."""
    lies_at_pause: bool = False
    """A planted fault: the bitmap at the pause calls everything free."""


class Making(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a guest is from its first day on. ``guest`` is the number that its pages carry."""

    guest: int
    block_pages: tuple[int, ...]
    contract: int
    """A ``FreeContract``."""
    live_fraction: float
    hog: bool
    """Its free pages hold old data from the beginning, and not nothing."""
    brings: str
    """Its RAM: ``memfd`` or ``file`` of its own, or ``nothing``: the daemon gives it some."""
    seed: int


class Here(_Word, frozen=True, tag="here"):
    name: str
    pid: int
    migration: str
    """The one that it arrives by; empty for a new guest."""
    block_pages: tuple[int, ...]


class Stopped(_Word, frozen=True, tag="stopped"):
    pass


class Starting(_Word, frozen=True, tag="starting"):
    pass


class Compared(_Word, frozen=True, tag="compared"):
    wrong_pages: int


class Behave(_Word, frozen=True, tag="behave"):
    behaviour: Behaviour


class Behaving(_Word, frozen=True, tag="behaving"):
    pass


class Halt(_Word, frozen=True, tag="halt"):
    pass


class Halted(_Word, frozen=True, tag="halted"):
    pass


FromGuest: TypeAlias = Here | Stopped | Starting | Behaving | Halted
ToGuest: TypeAlias = Compared | Behave | Halt
Word: TypeAlias = FromGuest | ToGuest

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Word] = msgspec.json.Decoder(Word)


def new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def send(sock: socket.socket, word: Word, fds: tuple[int, ...] = ()) -> None:
    """One packet; the caller keeps its descriptors. OSError as the socket gives it."""
    socket.send_fds(sock, [_encoder.encode(word)], list(fds))


def receive(sock: socket.socket) -> tuple[Word, list[int]] | None:
    """One packet with the descriptors it brought, now ours; None at the end of the connection."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, MAX_PACKET_BYTES, MAX_PACKET_FDS)
    except ConnectionResetError:
        return None
    return (_decoder.decode(data), fds) if data else None
