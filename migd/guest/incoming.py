"""``python -m migd.guest.incoming SOCKET``: the stub in readiness, spawned by a destination daemon.

It has everything imported when it reads from its standard input, one line of JSON, which guest it is to be;
so a migration does not wait for an interpreter to start. At the end of its input it ends: its daemon is gone.
"""

from __future__ import annotations

import os
import sys

import msgspec

from migd.errors import MigdError
from migd.guest.options import GuestOptions
from migd.guest.stub import run_guest

_COMM_BYTES = 15


class Assignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which guest to be, for which migration, and the file for what it has to say."""

    name: str
    migration: str
    log: str


def main() -> int:
    """The stub's exit code; 0 if it never became a guest."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    assignment = msgspec.json.decode(line, type=Assignment)
    _become(assignment)
    try:
        return run_guest(
            GuestOptions(daemon=sys.argv[1], name=assignment.name, incoming=assignment.migration)
        )
    except MigdError as error:
        sys.stderr.write(f"guest {assignment.name}: {error}\n")
        return error.exit_code


def _become(assignment: Assignment) -> None:
    """Output goes to the guest's own log, and ``ps`` and ``top`` show its name."""
    log = os.open(assignment.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    with open("/proc/self/comm", "wb", buffering=0) as comm:
        comm.write(f"migd:{assignment.name}".encode()[:_COMM_BYTES])


if __name__ == "__main__":
    sys.exit(main())
