"""Whether this host's clock is kept right, by what the kernel says of it."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from migd.doctor.finding import Finding, ok, warn

_TIMEX_BYTES = 208
_MAXERROR = struct.Struct("<24xq8xi")
"""Of ``struct timex`` on 64-bit Linux: the largest possible error in microseconds, and the status bits."""
_STA_UNSYNC = 0x40
_LARGE_ERROR_S = 0.1

_MEANING = "downtime between two hosts is as true as their clocks agree, and so are the times in the logs"
_REMEDY = "run a time service such as chrony or systemd-timesyncd"


@dataclass(frozen=True)
class Discipline:
    """The kernel's view of its clock."""

    synchronised: bool
    largest_error_s: float


def discipline() -> Discipline:
    """By adjtimex, which needs no privilege to be asked. OSError if it is not allowed even that."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(timex) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    largest_error_us, status = _MAXERROR.unpack_from(timex)
    return Discipline(not status & _STA_UNSYNC, largest_error_us / 1e6)


def synchronisation() -> Finding:
    """Nobody but downtime between hosts depends on it."""
    try:
        return judge(discipline())
    except OSError as error:
        return warn("clock", f"the kernel does not tell ({error.strerror})", _MEANING, _REMEDY)


def judge(found: Discipline) -> Finding:
    if not found.synchronised:
        return warn("clock", "not synchronised", _MEANING, _REMEDY)
    text = f"synchronised, wrong by at most {found.largest_error_s * 1e3:.0f} ms"
    if found.largest_error_s > _LARGE_ERROR_S:
        return warn(
            "clock", text, _MEANING, "look after the time service: it has not heard a good source lately"
        )
    return ok("clock", text)
