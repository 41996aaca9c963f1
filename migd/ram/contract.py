"""FreeContract: what a guest may expect of memory that it has declared free."""

from __future__ import annotations

from enum import IntEnum


class FreeContract(IntEnum):
    """What a guest expects to read in a page it had declared free (R12)."""

    NONE = 0
    """Nothing declared, or a non-zero poison: its hints are never applied."""
    ANYTHING = 1
    ZERO = 2
    """init_on_free: holds, because a skipped page reads as zero at the destination (R11)."""
