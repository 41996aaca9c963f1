"""Logging set-up, and what the levels mean.

debug: state changes, for developers. info: one line per iteration, guest or migration. warning: something
failed and migd went on. error: an operator has to decide something. Nothing is logged per page or batch.
"""

from __future__ import annotations

import logging
import sys


def configure(level: str) -> None:
    """Log to stderr at ``level``."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
    )
