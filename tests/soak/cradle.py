"""The cradle forks soaked guests: ``-m tests.soak.cradle SOCKET WITNESS``; so everything is imported once.

A line of JSON over a connection to SOCKET is an ``Assignment``; the guest lives until that connection ends,
or that to the soak at WITNESS. The cradle ends with its standard input; its guests with the soak.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import traceback

import msgspec

from tests.soak.guest import Assignment, SoakedGuest

_EXIT_BROKEN = 70


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal everybody gets it; the soak decides
    path, witness = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        print("ready", flush=True)  # noqa: T201  # the soak waits for it
        while sys.stdin not in (readable := select.select([listener, sys.stdin], [], [])[0]):
            assert readable
            line, _ = listener.accept()
            with line:
                if os.fork() == 0:
                    listener.close()
                    _be_guest(line, witness)


def _be_guest(line: socket.socket, witness: str) -> None:
    """Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = _EXIT_BROKEN
    try:
        with line.makefile("rb") as words:
            said = msgspec.json.decode(words.readline())
        assignment = msgspec.convert({**said, "witness": witness}, Assignment)
        SoakedGuest(assignment, line).run()
        code = 0
    finally:  # nothing may return into the cradle's loop
        if code:
            traceback.print_exc()
        os._exit(code)


if __name__ == "__main__":
    main()
