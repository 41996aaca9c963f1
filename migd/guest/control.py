"""The control protocol between a guest process and its daemon, over a SOCK_SEQPACKET unix socket.

One message is one packet: a JSON object with its ``type`` and ``id``, and descriptors by SCM_RIGHTS. The
daemon asks, the guest answers with the same ``id``; a guest speaks unasked only to attach (first), to say
that it is prepared, and to report its self-check. Bulk data (device state, bitmaps) never is in a packet: it
lies in a memfd whose descriptor travels, so no size limit of the socket applies::

    guest                                         daemon
    Attach  [RAM fds if it has RAM]     ->
                                        <-        Attached  [RAM fds if it had none] + [hint socket]
                                        <-          | Declined
                                        <-        Expect       a guest in readiness learns its migration
    Prepared | Failed                   ->        its machine is there (later, unasked, if it is opaque)
                                        <-        Arm          writes are to be logged
    Armed   [pagemap fd] | Failed       ->
                                        <-        Harvest      of a log that the guest keeps itself
    Harvested [bitmap fd]               ->
                                        <-        Disarm
    Done                                ->
                                        <-        Pause        at the next safe point
    Paused  [state fd, free bitmap fd]  ->
                                        <-        Save         if PAUSED brought nothing
    Saved   [state fd]                  ->
                                        <-        Resume       after a failed attempt
    Running                             ->
                                        <-        Load [state fd]   destination, before READY
    Done                                ->
                                        <-        Start        destination, after GO
    Running                             ->
    Checked                             ->        (later, unasked)
                                        <-        Quit         it runs elsewhere now, or never will here
"""

from __future__ import annotations

import os
import socket
import struct
from enum import StrEnum
from typing import TypeAlias, TypeVar

import msgspec

from migd.errors import GuestError

VERSION = 1
STUB = "stub"
MAX_PACKET_BYTES = 1 << 16
MAX_PACKET_FDS = 16
MAX_BLOCKS = MAX_PACKET_FDS - 1
"""Of RAM: ATTACHED has a descriptor for each, and the hint socket."""
MAX_BLOB_BYTES = 1 << 30
"""Of device state or a free bitmap; a guest of 1 TiB has a bitmap of 32 MiB."""


class GuestState(StrEnum):
    """What a guest says of itself when it attaches."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    """Spawned for a migration that has not reached GO: it has never run here."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    id: int = 0


class Block(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A RAM block: name and size in pages of 4096 bytes."""

    name: str
    pages: int


class Attach(_Message, frozen=True, tag="attach", kw_only=True, omit_defaults=True):
    """First packet of a guest. ``migration`` names the one it is paused or incoming for, else empty."""

    version: int
    name: str
    pid: int
    state: GuestState
    blocks: tuple[Block, ...]
    migration: str = ""
    read_only: bool = False
    """It brings RAM that it never writes, in descriptors open for reading only: it is not armed."""
    kind: str = STUB
    """What it is, for people."""
    tracking: str = ""
    """How writes to its RAM can be found, for people; empty if its daemon can tell by itself."""
    opaque: bool = False
    """A machine that cannot be looked into, such as a QEMU: PAUSED brings nothing, the device state is asked
    for (SAVE) while the rest of RAM is sent, free pages are unknown (R14), it never checks itself, and it
    says PREPARED when it can be loaded, not by attaching."""


class Prepared(_Message, frozen=True, tag="prepared", kw_only=True):
    """The machine is there, and waits for its device state if it is that of an incoming guest.

    ``pid``, ``kind`` and ``tracking`` as of Attach, which may have come before there was a machine.
    """

    pid: int
    kind: str
    tracking: str


class Expect(_Message, frozen=True, tag="expect", kw_only=True):
    """The guest in readiness is the one that this migration brings."""

    migration: str


class Attached(_Message, frozen=True, tag="attached", kw_only=True):
    blocks: tuple[Block, ...]


class Declined(_Message, frozen=True, tag="declined", kw_only=True):
    reason: str


class Arm(_Message, frozen=True, tag="arm"):
    pass


class Log(StrEnum):
    """What finds the writes of a guest that is armed."""

    USERFAULTFD = "userfaultfd"
    """The kernel, for the daemon: a pagemap descriptor comes along."""
    SOFT_DIRTY = "soft-dirty"
    """The guest, when it is asked: HARVEST."""


class Armed(_Message, frozen=True, tag="armed", kw_only=True, omit_defaults=True):
    """Start address of every block in the guest's own mapping, in the order of ``Attach.blocks``."""

    addresses: tuple[int, ...]
    log: Log = Log.USERFAULTFD


class Harvest(_Message, frozen=True, tag="harvest"):
    """Get and clear (R3)."""


class Harvested(_Message, frozen=True, tag="harvested"):
    """One bit a page through all blocks, least significant first, 1 = written since the last time."""


class Disarm(_Message, frozen=True, tag="disarm"):
    pass


class Pause(_Message, frozen=True, tag="pause", kw_only=True):
    migration: str


class Paused(_Message, frozen=True, tag="paused"):
    """Stopped at a safe point; nothing of the guest writes to RAM from here on."""


class Save(_Message, frozen=True, tag="save"):
    """The device state of the paused guest."""


class Saved(_Message, frozen=True, tag="saved"):
    pass


class Resume(_Message, frozen=True, tag="resume"):
    pass


class Load(_Message, frozen=True, tag="load"):
    pass


class Start(_Message, frozen=True, tag="start"):
    pass


class Running(_Message, frozen=True, tag="running", kw_only=True):
    """The guest's clock (realtime, ns) at its last instruction before and its first after the pause."""

    stopped_at_ns: int
    resumed_at_ns: int


class Checked(_Message, frozen=True, tag="checked", kw_only=True):
    """The guest's own check of every page it owns against its journal, all 4096 bytes of each."""

    pages: int
    wrong: int
    first_wrong: int = -1


class Done(_Message, frozen=True, tag="done"):
    pass


class Failed(_Message, frozen=True, tag="failed", kw_only=True, omit_defaults=True):
    reason: str
    immovable: bool = False
    """No other way of doing it helps: the guest cannot be moved as it is."""


class Quit(_Message, frozen=True, tag="quit"):
    pass


FromGuest: TypeAlias = (
    Attach | Prepared | Armed | Harvested | Paused | Saved | Running | Checked | Done | Failed
)
ToGuest: TypeAlias = (
    Attached | Declined | Expect | Arm | Harvest | Disarm | Pause | Save | Resume | Load | Start | Quit
)
Message: TypeAlias = FromGuest | ToGuest

_FD = struct.Struct("i")

_M = TypeVar("_M", bound=Message)

_encoder = msgspec.json.Encoder()
_from_guest: msgspec.json.Decoder[FromGuest] = msgspec.json.Decoder(FromGuest)
_to_guest: msgspec.json.Decoder[ToGuest] = msgspec.json.Decoder(ToGuest)


def new_socket() -> socket.socket:
    """An unconnected control socket."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def send(sock: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """Send one packet; the caller keeps its descriptors. OSError as the socket gives it."""
    socket.send_fds(sock, [_encoder.encode(message)], fds or [])


def receive_from_guest(sock: socket.socket) -> tuple[FromGuest, list[int]] | None:
    """One packet of a guest with the descriptors it brought (now ours); None at the end of the connection.

    GuestError for a packet that is no message; its descriptors are closed.
    """
    return _receive(sock, _from_guest)


def receive_from_daemon(sock: socket.socket) -> tuple[ToGuest, list[int]] | None:
    """The same on the guest's side."""
    return _receive(sock, _to_guest)


def _receive(sock: socket.socket, decoder: msgspec.json.Decoder[_M]) -> tuple[_M, list[int]] | None:
    # socket.recv_fds ignores its flags in Python 3.11.
    space = socket.CMSG_SPACE(MAX_PACKET_FDS * _FD.size)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for level, kind, payload in ancillary for fd in _fds_in(level, kind, payload)]
    if not data:
        close_all(fds)
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise GuestError("a control packet is too large")
        return decoder.decode(data), fds
    except GuestError:
        close_all(fds)
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # the last two: hostile JSON
        close_all(fds)
        raise GuestError(f"a control packet is no message: {error}") from error


def _fds_in(level: int, kind: int, payload: bytes) -> list[int]:
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    whole = payload[: len(payload) - len(payload) % _FD.size]
    return [fd for (fd,) in _FD.iter_unpack(whole)]


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def blob_fd(data: bytes) -> int:
    """A memfd with ``data``, for a descriptor argument; the caller closes it."""
    fd = os.memfd_create("migd-blob", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def blob_bytes(fd: int) -> bytes:
    """The content of such a memfd, by pread so that a shrinking file cannot hurt; ``fd`` stays open."""
    size = os.fstat(fd).st_size
    if size > MAX_BLOB_BYTES:
        raise GuestError(f"the guest handed over {size} bytes of state, more than {MAX_BLOB_BYTES}")
    parts = bytearray()
    while len(parts) < size:
        part = os.pread(fd, size - len(parts), len(parts))
        if not part:
            raise GuestError("the guest's state shrank while it was read")
        parts += part
    return bytes(parts)
