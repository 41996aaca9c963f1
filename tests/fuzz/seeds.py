"""The recorded inputs that all others are made from: a directory for each target, renewed by ``record``."""

from __future__ import annotations

from pathlib import Path

SEEDS = Path(__file__).resolve().parent / "seeds"
REGRESSIONS = SEEDS / "regressions"
"""Inputs that once found a bug, a directory for each target: the suite runs them all."""


def recorded(name: str) -> list[bytes]:
    """All of one directory, in the order of their names."""
    return [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]


def regressions() -> list[tuple[str, Path]]:
    """(target, file) of every input that once found something."""
    return [(path.parent.name, path) for path in sorted(REGRESSIONS.glob("*/*"))]
