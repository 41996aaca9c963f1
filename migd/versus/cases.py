"""What is compared: two states of a guest, and who moves it.

The states are those of the proposal of 2016 that migd comes from: a guest that has booted and idles, and one
in which a memory hog has ended, so that most of its RAM is free and full of old data.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Case(StrEnum):
    """The value is the heading of its table."""

    IDLE = "freshly booted, idle"
    HOG = "after a memory hog has ended"


HOG_SHARE = 0.8
"""Of the memory that is free: the rest keeps the guest from killing it."""


class Contender(StrEnum):
    """The value is its row."""

    DEFAULT = "QEMU default"
    MULTIFD = "QEMU multifd"
    BALLOON = "QEMU balloon free-page-hint"
    MIGD_UNHINTED = "migd without hints"
    MIGD = "migd with hints"

    @property
    def ours(self) -> bool:
        """Moved by migd; otherwise by QEMU itself."""
        return self in (Contender.MIGD, Contender.MIGD_UNHINTED)


YARDSTICK = Contender.MULTIFD
"""What ratios are of: the fastest that QEMU has."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One migration. Everything counts: framing, hand-over, verification before the guest runs and after."""

    total_s: float
    """From the request until nothing of it is left to do: the guest runs at the destination, and is verified
    where that is done."""
    downtime_s: float
    """From QEMU's STOP at the source to its RESUME at the destination, by their own time stamps."""
    wire_bytes: int
    started_s: float
    """From the request until the guest runs at the destination."""
    detail: str
    """What the contender says of it."""
    live: bool = True
    """Memory was sent while the guest ran."""
    skipped_pages: int = 0
    """Left behind as free."""
