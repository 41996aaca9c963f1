"""How much guest memory may be on its way through one daemon, and which migration gets room for a frame next.

SAFETY: at most 64 MiB in flight per daemon, over all migrations. Room is counted in frames of the largest
size. A frame is in flight at the source from before its pages are picked until its last byte was handed to
TCP, at the destination from before its payload is read until its pages are placed.

Nothing that holds room ever waits for somebody who may need room first, so that it always comes back:

- *Arrivals have room of their own.* Two daemons that send guests to each other would else stop for good: each
  sender holds room until the other side reads, and the other side had no room to read.
- *No room is held at a barrier.* A stream waits there between two frames, where it holds none; so do those
  that have sent all they had. A barrier waits only for streams that hold room or wait for it.
- *Bandwidth is asked for by streams that hold room, and given to each in turn*; an incoming limit is waited
  for between two frames.
- *A peer that stalls in mid-frame* keeps its room until ``progress_s`` ends the migration. So a migration
  takes another frame's room only while it holds less than is free: alone at most half, and the next one half
  of the rest. What one peer holds, others do not miss.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from migd.wire.protocol import MAX_PAYLOAD_BYTES

IN_FLIGHT_BYTES = 64 << 20
"""Over all migrations of a daemon (docs/safety.md)."""


def frames_in_flight(directions: int) -> int:
    """The frames that each direction of a daemon has room for; one that only sends has all of it for that."""
    return IN_FLIGHT_BYTES // MAX_PAYLOAD_BYTES // directions


@dataclass(eq=False)
class Tenant:
    """One migration's part of the room."""

    frames: int = 0


@dataclass(eq=False)
class Request:
    """One stream that needs room for one frame."""

    tenant: Tenant
    granted: bool = False


class FrameRoom:
    """Room for ``frames`` frames; first come, first served among those that may take one."""

    def __init__(self, frames: int) -> None:
        self.free_frames = frames
        self._waiting: deque[Request] = deque()

    @property
    def waiting(self) -> bool:
        """Somebody has asked and was not granted yet."""
        return bool(self._waiting)

    def ask(self, tenant: Tenant) -> Request:
        """A stream needs room; call ``grant`` next."""
        request = Request(tenant)
        self._waiting.append(request)
        return request

    def grant(self) -> list[Request]:
        """Those that may go now. Whoever holds nothing is served while anything is free."""
        granted = []
        for request in list(self._waiting):
            if request.tenant.frames < self.free_frames:
                self._waiting.remove(request)
                request.tenant.frames += 1
                self.free_frames -= 1
                request.granted = True
                granted.append(request)
        return granted

    def give_back(self, request: Request) -> None:
        """Its frame is on its way no longer, or it needs no room any more; call ``grant`` next."""
        if request.granted:
            request.granted = False
            request.tenant.frames -= 1
            self.free_frames += 1
        elif request in self._waiting:
            self._waiting.remove(request)
