"""How commands name what they are about: a guest by its name, a migration by its id or its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from migd.errors import MigdError

if TYPE_CHECKING:
    from migd.migration.ports import Passage  # with all that moves memory, which commands have no use for

SHORTEST_PREFIX = 4
"""Hexadecimal digits: as few as people type, as many as one tells migrations of a day apart by."""


class Moving(Protocol):
    """A session of either direction."""

    @property
    def passage(self) -> Passage: ...


S = TypeVar("S", bound=Moving)


def newest(target: str, sessions: Iterable[S]) -> S | None:
    """The last one that ``target`` names, of sessions in the order they began; None if it names none.

    MigdError if it is the beginning of several ids. A guest's whole name comes first.
    """
    found = list(sessions)
    named = [session for session in found if session.passage.guest == target]
    if not named:
        named = [session for session in found if is_id_of(target, session.passage.migration)]
        refuse_ambiguous(target, (session.passage.migration for session in named))
    return named[-1] if named else None


def refuse_ambiguous(target: str, migrations: Iterable[str]) -> None:
    """MigdError if these ids, which ``target`` begins, are of more than one migration."""
    ids = set(migrations)
    if len(ids) > 1:
        raise MigdError(f"{target!r} is the beginning of several migrations: {', '.join(sorted(ids))}")


def is_id_of(target: str, migration: str) -> bool:
    """Whether a word is the id of a migration or begins it."""
    return bool(re.fullmatch(f"[0-9a-f]{{{SHORTEST_PREFIX},32}}", target)) and migration.startswith(target)
