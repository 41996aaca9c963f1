"""What daemons hold and have started, to compare before with after, and bugs that only their logs tell."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from tests.support.pair import DaemonPair, DaemonProcess, eventually, processes_naming

_KINDS = ("memfd", "socket", "anon_inode")
"""Of guests and connections. Pipes and files come with the first migration, and stay."""

_TRACEBACK = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ +].*\n|\n)*(?P<error>\S.*)", re.MULTILINE
)

Remains = dict[str, dict[str, int]]


def held(daemon: DaemonProcess) -> dict[str, int]:
    """How many descriptors of each kind a daemon has, and processes for incoming guests (ready: one)."""
    assert daemon.process is not None
    found = Counter(dict.fromkeys(_KINDS, 0))
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        try:
            target = os.readlink(entry).lstrip("/")
        except FileNotFoundError:
            continue
        found.update(kind for kind in _KINDS if target.startswith(kind))
    found["processes"] = len(processes_naming("migd.guest.incoming", f"{daemon.directory}/guest.sock"))
    return dict(found)


def remains(pair: DaemonPair) -> Remains:
    """What either daemon of a pair holds, by its side."""
    return {"source": held(pair.source), "destination": held(pair.destination)}


def ready(pair: DaemonPair) -> Remains:
    """The same, once a process for the next incoming guest is there, wherever one can come."""
    return eventually(lambda: _with_spares(pair), "the processes for the next incoming guests")


def _with_spares(pair: DaemonPair) -> Remains | None:
    found = remains(pair)
    able = ["destination"] if pair.source.role == "source" else ["source", "destination"]
    return found if all(found[side]["processes"] for side in able) else None


def bugs(daemon: DaemonProcess) -> list[str]:
    """The last lines of tracebacks in its log that are not of migd's own, expected errors."""
    errors = [match["error"] for match in _TRACEBACK.finditer(daemon.log)]
    return [error for error in errors if not error.startswith("migd.errors.")]
