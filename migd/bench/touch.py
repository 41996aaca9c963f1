"""Touching memory and giving it back: how fast memory comes, and having it come fast right before a run.

A virtual machine hands memory that nobody uses back to its own host after a second or two, and touching it
again costs several times as much. Whoever times a migration in one therefore lets a process of its own touch
as much as the run will need, and end, immediately before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from migd.errors import MigdError

RUN_BYTES = 1 << 20
"""Of one pwrite: as the destination places contiguous pages."""


def touch(size_bytes: int) -> float:
    """Write ``size_bytes``, in whole RUN_BYTES, of new shared memory, then free it: the seconds it took."""
    content = bytes(RUN_BYTES)
    fd = os.memfd_create("migd-touch", os.MFD_CLOEXEC)
    try:
        begun = time.perf_counter()
        for offset in range(0, size_bytes, RUN_BYTES):
            os.pwrite(fd, content, offset)
        return time.perf_counter() - begun
    finally:
        os.close(fd)


def touch_in_child(size_bytes: int) -> float:
    """The same in a process that has ended when this returns. MigdError if there is not that much memory."""
    child = subprocess.run(
        [sys.executable, "-m", __name__, str(size_bytes)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
        raise MigdError(f"touching {size_bytes} bytes of memory before a run: {reason}")
    return float(child.stdout)


if __name__ == "__main__":
    sys.stdout.write(f"{touch(int(sys.argv[1]))}\n")
