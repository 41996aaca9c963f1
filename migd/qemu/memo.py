"""Memo: what migd has to remember of a QEMU, kept in that QEMU itself, so that it lives exactly as long.

A companion that was killed, or a daemon, leaves a guest paused, or with migd's migration settings. Whoever
comes next finds here for which migration, and what the settings were. The object is a QOM ``secret``: QEMU
gives its data back, does not migrate it, and makes nothing else of it.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec

from migd.errors import GuestError
from migd.guest.control import GuestState
from migd.qemu.inventory import MEMO_PREFIX
from migd.qemu.monitor import CommandRefused, Monitor
from migd.qemu.settings import Settings


class Memo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``migration`` is the one the guest is paused or incoming for, else empty."""

    state: GuestState
    migration: str = ""
    settings: Settings | None = None
    """QEMU's own, while migd's are in force."""
    holds_still: bool = False
    """A running guest is stopped for moments (soft-dirty): found so, with nobody beside it, it goes on."""


class MemoStore:
    """The memos of one QEMU: a new one is added before the old one goes, and the newest counts."""

    def __init__(self, monitor: Monitor, names: tuple[str, ...]) -> None:
        """``names``: of the objects that are there already. GuestError if one is no memo of this version."""
        self._monitor = monitor
        self._numbers = sorted(_number_of(name) for name in names)

    async def read(self) -> Memo | None:
        """GuestError if there is one that this version does not understand."""
        if not self._numbers:
            return None
        data = await self._monitor.ask("qom-get", {"path": f"/objects/{self._name()}", "property": "data"})
        try:
            return msgspec.json.decode(data, type=Memo)
        except msgspec.MsgspecError as error:
            raise GuestError(f"{self._name()} in QEMU is of another version of migd: {error}") from error

    async def write(self, memo: Memo | None) -> None:
        """None: there is nothing to remember any more."""
        old = list(self._numbers)
        if memo is not None:
            self._numbers.append(
                (old[-1] if old else 0) + 1
            )  # if no answer comes it may be there all the same
            data = msgspec.json.encode(memo).decode()
            await self._monitor.ask("object-add", {"qom-type": "secret", "id": self._name(), "data": data})
        for number in old:
            with suppress(CommandRefused):  # somebody else has tidied up
                await self._monitor.ask("object-del", {"id": f"{MEMO_PREFIX}{number}"})
            self._numbers.remove(number)

    def _name(self) -> str:
        return f"{MEMO_PREFIX}{self._numbers[-1]}"


def _number_of(name: str) -> int:
    number = name.removeprefix(MEMO_PREFIX)
    if not number.isdecimal():
        raise GuestError(f"{name} in QEMU is of another version of migd")
    return int(number)
