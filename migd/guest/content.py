"""FileContent: page after page of what real files hold, so that guest RAM compresses like guest RAM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

from migd.errors import ConfigError
from migd.guest.allocator import MAX_RUN_PAGES

PAGE_BYTES = 4096

MAX_POOL_BYTES = 64 << 20
"""Content read once and then cycled. The Python installation has 36000 small files, read at 45 MB/s from a
cold disk: without a pool, filling 1 GiB would take 20 seconds and write-heavy would measure open()."""

_READ_BYTES = 1 << 20

PYTHON_INSTALLATION = os.path.dirname(os.__file__)
"""The standard library: what ``sysconfig.get_path("stdlib")`` says, without importing sysconfig."""

RANDOM_DEVICE = "/dev/urandom"
"""Stands for content that no codec makes smaller. The only device ever opened: a path may come from a device
state, thus over the network, and opening some devices does something."""


class FileContent:
    """An endless series of pages from the files under ``paths``, walked in sorted order.

    At most MAX_POOL_BYTES are kept, in memory of this process alone, read as far as they are asked for.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        """ConfigError if there is no readable byte under ``paths``."""
        self._files = _readable_files(paths)
        self._open: int | None = None
        # Anonymous memory comes as it is filled; a bytearray would touch all of it first (40 ms).
        self._pool = memoryview(mmap(-1, MAX_POOL_BYTES, MAP_PRIVATE | MAP_ANONYMOUS))
        self._filled = 0
        self._complete = False
        self._at = 0
        self._read_up_to(PAGE_BYTES)
        if not self._filled:
            raise ConfigError(f"--fill {' '.join(paths)}: no readable file with content")

    def take(self, pages: int) -> memoryview:
        """The next ``pages`` (1..MAX_RUN_PAGES) pages, writable, valid until the series comes round again.

        The caller may stamp them in place. At most that many bytes are read from files meanwhile.
        """
        stop = self._at + pages * PAGE_BYTES
        self._read_up_to(min(stop, MAX_POOL_BYTES))
        if stop > self._filled:
            self._at, stop = 0, pages * PAGE_BYTES
        view = self._pool[self._at : stop]
        self._at = stop
        return view

    def close(self) -> None:
        """Let go of the file that is being read."""
        if self._open is not None:
            os.close(self._open)
            self._open = None
        self._files = iter(())

    def _read_up_to(self, wanted: int) -> None:
        while self._filled < wanted and not self._complete:
            if self._open is None:
                self._open = next(self._files, None)
            if self._open is None:
                self._finish()
            else:
                self._read_some(self._open, wanted)

    def _read_some(self, fd: int, wanted: int) -> None:
        size = min(wanted - self._filled, _READ_BYTES)
        try:
            count = os.readv(fd, [self._pool[self._filled : self._filled + size]])
        except OSError:  # a directory entry that lied, or a bad disk: the next file serves as well
            count = 0
        self._filled += count
        if count == 0:
            os.close(fd)
            self._open = None

    def _finish(self) -> None:
        """All files are read: repeat little content up to the longest run, and end on a page boundary."""
        self._complete = True
        while 0 < self._filled < MAX_RUN_PAGES * PAGE_BYTES:
            self._pool[self._filled : self._filled * 2] = self._pool[: self._filled]
            self._filled *= 2


def _readable_files(paths: tuple[str, ...]) -> Iterator[int]:
    """Descriptors of the regular files under the paths, in sorted order, opened one at a time."""
    for path in _files_under(paths):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # not ours to read, or gone: content is not worth an error
            continue
        yield fd


def _files_under(paths: tuple[str, ...]) -> Iterator[str]:
    for path in paths:
        if "\0" in path:  # over the network, and no path at all: os.walk would raise ValueError
            continue
        if os.path.isfile(path) or path == RANDOM_DEVICE:
            yield path
        for directory, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                file = os.path.join(directory, name)
                if os.path.isfile(file):
                    yield file
