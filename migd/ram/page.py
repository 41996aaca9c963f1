"""The page that everything counts in; nothing is imported here, so that who asks a daemon needs no numpy."""

from __future__ import annotations

PAGE_BYTES = 4096
"""Of every guest: huge pages behind RAM change nothing."""
