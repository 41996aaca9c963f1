"""Stub guests by the dozen: forked from a process that has imported everything.

``python -m tests.support.nursery`` reads a line of JSON for each guest (``GuestOptions`` and ``log``), forks
it and answers with its pid. The guests are real processes; they outlive the nursery.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

from migd.guest.guest import prepare_arming
from migd.guest.options import GuestOptions
from migd.guest.stub import run_guest


def _be_guest(line: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options = json.loads(line)
    log = os.open(options.pop("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = run_guest(GuestOptions(**options))
    finally:  # nothing may return into the nursery's loop
        if code == 70:
            traceback.print_exc()
        os._exit(code)


def main() -> None:
    prepare_arming()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _be_guest(line)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
