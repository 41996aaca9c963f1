"""What the operating system gives a daemon: time, threads, randomness, and a directory of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from migd.errors import ResourceError

P = ParamSpec("P")
T = TypeVar("T")

SOCKET_PATH_BYTES = 107
"""The kernel's limit for the path of a unix socket."""


def utc_now() -> str:
    """The wall clock as RFC 3339 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


class MonotonicClock:
    """See ``migd.migration.ports.Clock``."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ThreadWorker:
    """See ``migd.migration.ports.Worker``: a pool of threads; numpy, lz4 and file calls release the lock."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads or max(2, os.cpu_count() or 2), thread_name_prefix="migd")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A cancelled caller still waits for the function: what it works on may be closed right after."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # nobody is left to hear of it
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class SystemEntropy:
    """See ``migd.migration.ports.Entropy``."""

    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)


class RuntimeDir:
    """A daemon's directory (0700, ours), locked against a second daemon while the context is entered."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = -1

    def __enter__(self) -> Path:
        path = self._path
        if len(os.fsencode(path / "control.sock")) > SOCKET_PATH_BYTES:
            raise ResourceError(
                f"runtime directory {path}: too long for a unix socket path, choose a shorter"
            )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.parent.stat().st_uid not in (os.getuid(), 0):  # who could put another in its place
                raise ResourceError(f"runtime directory {path}: {path.parent} belongs to another user")
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise ResourceError(f"runtime directory {path}: not a directory of this user")
            path.chmod(0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ResourceError(f"another migd daemon uses {path}") from error
        except OSError as error:
            raise ResourceError(f"runtime directory {path}: {error.strerror}") from error
        return path

    def __exit__(self, *_error: object) -> None:
        os.close(self._lock)
