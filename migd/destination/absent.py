"""AbsentGuest: a guest whose process is not here (any more), where only the journal still speaks of it."""

from __future__ import annotations

from typing import NoReturn

from migd.errors import GuestError
from migd.migration.ports import PauseReport, Resumption, SelfCheck


class AbsentGuest:
    """See ``migd.migration.ports.LoadedGuest``: whatever would need a process is a GuestError."""

    gone = True
    checks_itself = False

    def __init__(self, name: str) -> None:
        self.name = name

    async def start(self) -> Resumption:
        self._missing()

    async def pause(self, migration: str) -> PauseReport:
        self._missing()

    async def resume(self) -> None:
        self._missing()

    async def self_check(self) -> SelfCheck:
        self._missing()

    def judged(self) -> None:
        """Nobody waits."""

    async def discard(self) -> None:
        """There is nothing left to end."""

    def _missing(self) -> NoReturn:
        raise GuestError(f"the process of guest {self.name} is not here")
