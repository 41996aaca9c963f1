"""The migration protocol between two daemons, version 1. This module is the specification of its bytes.

One *control connection* carries messages, ``streams`` *data streams* carry pages; all are TCP connections
to the destination's one port. All numbers are little-endian. Everything on every connection is a frame::

    offset  size  field
         0     4  magic "MIGD"
         4     1  framing version, 2
         5     1  frame type (``FrameType``)
         6     1  codec of the payload (``Codec``), 0 unless PAGES
         7     1  zero
         8     8  sequence: 0, 1, 2, ... on each connection and direction
        16     4  count: pages described by PAGES, ZERO, FREE; else 0
        20     4  runs: how many runs the metadata begins with; else 0
        24     4  metadata bytes, at most MAX_METADATA_BYTES
        28     4  payload bytes, at most MAX_PAYLOAD_BYTES; 0 unless PAGES
        32    16  XXH3-128 of bytes 0..31 and the metadata
        48     -  metadata, then payload

A *run* is (u32 first page, u32 pages); runs ascend and do not touch. A page index counts through all RAM
blocks in the order of HELLO, never a host address; so that a run of everything can be written, a guest has
at most 2^32-1 pages. Metadata of PAGES: the runs, then a 16-byte digest for
each page (XXH3-128 of its 4096 bytes); so the frame digest covers the content through the page digests,
and each byte of memory is hashed once on either side. Metadata of ZERO and FREE: the runs. Of STATE: the
bytes of device state. Of all others: one MessagePack map (``migd.wire.messages``).

::

    source                                            destination
      HELLO (versions, features)   control  ->
                                            <-  control   ACCEPT (version, features, limits, token) | REFUSE
      STREAM (token, index)        N data   ->
                                            <-  control   BEGIN          every stream is there
                                            <-  control   PREPARED       so is the guest's process: pause now
      PAGES ZERO FREE ... BARRIER  N data   ->             streams wait for each other at a BARRIER
      PING                         control <-> PONG        at any time; PONG counts bytes applied
      STATE ...                    control  ->             device state, after the guest was paused
      END (counts, digest)         N data   ->
      FINISH (size, digest)        control  ->             of the device state
                                            <-  control   READY          loaded, verified, journalled
      GO                           control  ->             also first on a new connection, idempotent
                                            <-  control   STARTED | ABORTED
      VERDICT                      control  ->             tracking verified: the source lets go
                                            <-  control   CHECKED        the guest's own check, if it has one
      RESOLVE (keeper)             control  ->             the operator's word; also first on a new connection
                                            <-  control   STARTED | ABORTED | REFUSE
      ABORT                         either side, before GO; answered by closing
      PROBE                        alone    <-> ABOUT       what is there, now; then closed

Behind the BARRIER of an iteration while the guest runs, the source asks with PING until a PONG counts all
that it has sent: what the destination has still to place at the pause, the guest would wait for.

A destination that is asked GO for a migration it does not know journals ABORTED, then answers ABORTED.

Messages of one connection are acted upon in their order. So the answer to a GO behind VERDICT says that the
verdict was acted upon: after a bad one that the guest is paused, and stays so. REFUSE says that it was not,
and why: a bad one where the operator had the guest run on, a good one where a bad one has paused it.

RESOLVE is about a guest that neither side decides about: paused by a bad verdict, or started and lost.
Keeper *destination* has it run on there (STARTED), keeper *source* has the destination give it up for good
(ABORTED). It belongs to the feature ``resolve``. A source that was restarted does not know whether that was
accepted: a destination without it closes the connection, and the operator has to decide there.

PROBE asks what a destination is, before anybody trusts it with a guest: first on a connection of its own,
without a token, answered by one ABOUT (versions, software, clock, free memory, streams, features) or REFUSE,
and closed. It changes nothing there. Its id is made up, and ABOUT repeats it.

**Versions.** Two daemons of different versions agree, or say in one line who speaks what and whom to update:

- Bytes 0 to 4 of a frame mean the same in every framing version, and a connection begins with at least 48
  bytes. A side that reads another framing version than its own says so and closes; a destination first sends
  REFUSE, in its own framing, so that the source can say the same.
- HELLO, PROBE and ABOUT carry the range of protocol versions a side speaks. The highest in both ranges is
  used; if there is none, the answer to HELLO is REFUSE.
- In HELLO, ACCEPT, REFUSE, PROBE and ABOUT unknown fields are ignored: a later migd may add what the other
  side can do without. In all other messages they are refused.
- What the other side must not ignore is a *feature*: offered in HELLO, used only if ACCEPT names it. Unknown
  offers are ignored, and ACCEPT never names one. A new frame type belongs to a feature or a new protocol
  version.
- Anything else, a field's meaning among it, makes a new protocol version; the header or its digest a new
  framing version.
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum

from migd import __version__

SOFTWARE = f"migd {__version__}"
"""How greetings, refusals and journals call this side."""

MAGIC = b"MIGD"
FRAMING_VERSION = 2
MIN_VERSION = 1
MAX_VERSION = 1

HEADER = struct.Struct("<4sBBBBQIIII16s")
HEADER_BYTES = 48
DIGESTED_HEADER_BYTES = 32
RUN = struct.Struct("<II")

MAX_PAYLOAD_BYTES = 2 << 20
MAX_PAGES_PER_FRAME = 512
"""The same 2 MiB, in pages."""
MAX_METADATA_BYTES = 1 << 20
MAX_RUNS_PER_FRAME = 1 << 16
STATE_CHUNK_BYTES = 1 << 20
MAX_STREAMS = 64
TOKEN_BYTES = 16


class FrameType(IntEnum):
    """Frame types; the unknown is refused."""

    HELLO = 1
    ACCEPT = 2
    REFUSE = 3
    STREAM = 4
    BEGIN = 5
    PING = 6
    PONG = 7
    ABORT = 8
    PREPARED = 9
    PROBE = 10
    ABOUT = 11
    PAGES = 16
    ZERO = 17
    FREE = 18
    BARRIER = 19
    END = 20
    STATE = 32
    FINISH = 33
    READY = 34
    GO = 35
    STARTED = 36
    ABORTED = 37
    VERDICT = 38
    CHECKED = 39
    RESOLVE = 40


class Codec(IntEnum):
    """How the payload of a PAGES frame is packed."""

    NONE = 0
    LZ4 = 1
    """LZ4 block format; the uncompressed size is ``count`` pages and not repeated."""


class Feature(StrEnum):
    """What a source may offer and a destination accept beyond the version; the unknown is not accepted."""

    LZ4 = "lz4"
    """PAGES frames with ``Codec.LZ4``."""
    RESOLVE = "resolve"
    """RESOLVE frames."""


class Keeper(StrEnum):
    """The side that a guest is to be at, by the operator's word."""

    SOURCE = "source"
    DESTINATION = "destination"

    @property
    def option(self) -> str:
        """Of `migd resolve`."""
        return "--force-source" if self is Keeper.SOURCE else "--force-dest"


PAGE_RECORDS = frozenset({FrameType.PAGES, FrameType.ZERO, FrameType.FREE})
