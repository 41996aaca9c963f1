"""Companions by the dozen: forked from a process that has imported everything.

``python -m tests.support.companion_nursery`` reads a line of JSON for each: ``arguments`` of migd, the
``environment`` and the ``log``. It forks one, and answers with its pid; once that has ended, its exit code is
in a file beside the log. They end with the nursery.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from migd.cli import main as migd
from migd.qemu import companion

_LOOK_S = 0.005

_logs: dict[int, str] = {}
"""Of those that were forked, by their pid."""


@dataclass(frozen=True)
class Forked:
    """One that was forked."""

    pid: int
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        try:
            return int(_code_path(str(self.log)).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def kill(self) -> None:
        """Returns when it is gone."""
        while self.exit_code is None:
            with suppress(ProcessLookupError):  # its pid is its own until the nursery has reaped it
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(_LOOK_S)


class Nursery:
    """The process as its owner has it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.companion_nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def fork(
        self, log: Path, arguments: list[str], environment: dict[str, str], orphan_s: float | None = None
    ) -> Forked:
        """``migd ARGUMENTS``, a companion; ``orphan_s`` instead of the time that it waits for a daemon."""
        order = {"log": str(log), "arguments": arguments, "environment": environment, "orphan_s": orphan_s}
        _pipe(self._process.stdin).write(json.dumps(order) + "\n")
        _pipe(self._process.stdin).flush()
        return Forked(int(_pipe(self._process.stdout).readline()), log)

    def close(self) -> None:
        _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        self._process.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _code_path(log: str) -> Path:
    return Path(f"{log}.code")


# -- the process ----------------------------------------------------------------------------------------


def _be(order: dict[str, object]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        assert isinstance(order["environment"], dict)
        os.environ.clear()
        os.environ.update(order["environment"])
        if order["orphan_s"] is not None:
            companion.ORPHAN_S = float(str(order["orphan_s"]))
        assert isinstance(order["arguments"], list)
        sys.argv = ["migd", *order["arguments"]]
        migd.run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:  # nothing may return into the nursery's loop
        if code == 70:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(_number: int, _frame: FrameType | None) -> None:
    while _logs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        path = _code_path(_logs.pop(pid))
        if path.parent.exists():
            new = path.with_suffix(".new")
            new.write_text(str(os.waitstatus_to_exitcode(status)))
            new.rename(path)


def main() -> None:
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        order = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _be(order)
        _logs[pid] = order["log"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    for pid in list(_logs):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
