"""Finding: one line of what `migd doctor` has to say."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """Migrations work, and something about them will be slower, less exact or less safe."""
    FAIL = "fail"
    """Something that a live migration needs is not there."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at and found; unless all is well, what that means and what to do about it."""

    check: str
    level: Level
    found: str
    meaning: str = ""
    remedy: str = ""


def ok(check: str, found: str, meaning: str = "") -> Finding:
    return Finding(check=check, level=Level.OK, found=found, meaning=meaning)


def warn(check: str, found: str, meaning: str, remedy: str) -> Finding:
    return Finding(check=check, level=Level.WARN, found=found, meaning=meaning, remedy=remedy)


def fail(check: str, found: str, meaning: str, remedy: str) -> Finding:
    return Finding(check=check, level=Level.FAIL, found=found, meaning=meaning, remedy=remedy)
