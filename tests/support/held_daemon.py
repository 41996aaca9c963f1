"""A daemon that stops where a test wants it to: ``python -m tests.support.held_daemon ROLE CONFIG DIR``.

A file ``hold-STATE`` in the runtime directory holds the next session that enters STATE: it is renamed to
``held-TAG`` at that moment, where TAG is what is written in it, and the session goes on when that file is
gone. Everything else of the daemon goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from migd import log
from migd.config import load
from migd.daemon.daemon import Daemon, Role

_LOOK_S = 0.01


class FileHold:
    """A gate (``migd.daemon.chronicle.Gate``) that is told by files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def __call__(self, state: str) -> None:
        hold = self._directory / f"hold-{state}"
        try:
            held = self._directory / f"held-{hold.read_text()}"
            hold.rename(held)
        except FileNotFoundError:
            return
        while held.exists():  # noqa: ASYNC110  # another process removes it
            await asyncio.sleep(_LOOK_S)


async def _run(role: Role, config_path: Path, directory: Path) -> None:
    daemon = Daemon(role, load(config_path), directory, gate=FileHold(directory))
    await daemon.run(lambda line: print(line, flush=True))  # noqa: T201  # what `migd ROLE` prints


if __name__ == "__main__":
    log.configure("debug")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(Role(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
