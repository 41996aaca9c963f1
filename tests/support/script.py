"""A program run with a temporary directory of its own, and what it has left behind there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def module_process(private: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m WORDS``, which is ended if the test did not see its end."""
    with subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(private)},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=30)


def command_lines(directory: Path) -> list[str]:
    """Of the processes that name this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(directory) in line:
            found.append(line.replace(b"\0", b" ").decode())
    return found


def left_behind(directory: Path) -> list[str]:
    """What lies in this directory, and the command lines that name it."""
    return [*(str(path) for path in directory.iterdir()), *command_lines(directory)]
