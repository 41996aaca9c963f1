"""RamImage: a file with the RAM of some guest, served where it lies and never written.

Its digests are taken from the file before a migration reads it: they are the journal by which the guest that
arrives checks itself, so a write to the file in between shows as a wrong page.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from migd.errors import ConfigError, GuestError
from migd.guest.allocator import MAX_RUN_PAGES, PageRun
from migd.guest.control import Block
from migd.guest.machine import DIGEST_BYTES, PAGE_BYTES, Machine, page_digest

_CHUNK_PAGES = 256
"""Read and digested between two looks at the clock: 0.2 ms."""
_WORTH_SEEKING_PAGES = 1024
"""A hole in a shorter run costs less to read than to find."""
_ZERO_DIGEST = page_digest(bytes(PAGE_BYTES))


class RamImage:
    """An open image and which of its pages are free. Owns the descriptor until ``close``."""

    def __init__(self, path: str, free_path: str = "") -> None:
        """``free_path``: a file of one bit per page of 4096 bytes, least significant first, 1 = free.

        Without one, every page is in use. ConfigError naming the file and what is wrong with it.
        """
        self.path = os.path.abspath(path)
        self.fd = _open(path)
        try:
            self.pages = _whole_pages(path, os.fstat(self.fd))
            self.free_bits = _free_bits(free_path, self.pages) if free_path else bytes(-(-self.pages // 8))
        except ConfigError:
            os.close(self.fd)
            raise

    @property
    def block(self) -> Block:
        """The one block of RAM that it is."""
        return Block("ram", self.pages)

    def close(self) -> None:
        os.close(self.fd)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"--image {path}: {error.strerror}") from error


def _whole_pages(path: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"--image {path}: not a regular file")
    pages, rest = divmod(status.st_size, PAGE_BYTES)
    if rest or not pages:
        raise ConfigError(
            f"--image {path}: {status.st_size} bytes are not a positive multiple of {PAGE_BYTES}"
        )
    return pages


def _free_bits(path: str, pages: int) -> bytes:
    expected = -(-pages // 8)
    try:
        with open(path, "rb") as file:
            bits = file.read(expected + 1)
    except OSError as error:
        raise ConfigError(f"--free {path}: {error.strerror}") from error
    if len(bits) != expected:
        had = "more" if len(bits) > expected else len(bits)
        raise ConfigError(
            f"--free {path}: {had} bytes instead of {expected}, one bit for each of {pages} pages"
        )
    if pages % 8 and bits[-1] >> pages % 8:
        raise ConfigError(f"--free {path}: bits are set behind that of the last page, {pages - 1}")
    return bits


class ImageJournal:
    """Fills the journal of a machine whose RAM is an image, chunk by chunk, from the file itself.

    Through preadv, which reads a sparse file without filling it and a shrunk one without a signal.
    """

    def __init__(self, fd: int, machine: Machine) -> None:
        self._fd = fd
        self._machine = machine
        self._buffer = memoryview(bytearray(_CHUNK_PAGES * PAGE_BYTES))
        self._chunks = self._data_chunks()
        self._done_pages = 0
        self.complete = False

    @property
    def fraction(self) -> float:
        """How much of RAM is behind it: 0 to 1."""
        return 1.0 if self.complete else self._done_pages / self._machine.pages

    def run(self, deadline: float, clock: Callable[[], float]) -> None:
        """Go on until ``deadline`` on ``clock``. GuestError if the file cannot be read or has shrunk."""
        while not self.complete:
            chunk = next(self._chunks, None)
            if chunk is None:
                if os.fstat(self._fd).st_size < self._machine.pages * PAGE_BYTES:
                    raise self._shrunk()  # what is not there any more looked like a hole
                self.complete = True
                return
            self._digest(*chunk)
            self._done_pages = chunk[1]
            if clock() >= deadline:
                return

    def _digest(self, start: int, stop: int) -> None:
        size = (stop - start) * PAGE_BYTES
        try:
            count = os.preadv(self._fd, [self._buffer[:size]], start * PAGE_BYTES)
        except OSError as error:
            raise GuestError(f"the image cannot be read: {error.strerror}") from error
        if count != size:
            raise self._shrunk()
        cut = range(0, size, PAGE_BYTES)
        digests = b"".join([page_digest(self._buffer[at : at + PAGE_BYTES]) for at in cut])
        self._machine.journal[start * DIGEST_BYTES : stop * DIGEST_BYTES] = digests

    def _shrunk(self) -> GuestError:
        return GuestError(f"the image has shrunk below {self._machine.pages} pages")

    def _data_chunks(self) -> Iterator[PageRun]:
        """The pages in use that may hold data, at most _CHUNK_PAGES at a time; the journal has the holes'."""
        for start, stop in self._machine.allocator.owned_runs():
            for low, high in self._data(start, stop):
                for at in range(low, high, _CHUNK_PAGES):
                    yield at, min(at + _CHUNK_PAGES, high)

    def _data(self, start: int, stop: int) -> Iterator[PageRun]:
        if stop - start < _WORTH_SEEKING_PAGES:
            yield start, stop
            return
        at = start
        while at < stop:
            data = self._seek(at, os.SEEK_DATA, stop)
            if at < data:
                rows = _ZERO_DIGEST * (data - at)
                self._machine.journal[at * DIGEST_BYTES : data * DIGEST_BYTES] = rows
            at = self._seek(data, os.SEEK_HOLE, stop) if data < stop else stop
            if data < at:
                yield data, at

    def _seek(self, page: int, whence: int, stop: int) -> int:
        """The page in which data begins, or behind which a hole does; ``stop`` if there is none before."""
        try:
            offset = os.lseek(self._fd, page * PAGE_BYTES, whence)
        except OSError as error:
            # Only ENXIO says that nothing is behind here; of what else there is, all is taken for data.
            return page if whence == os.SEEK_DATA and error.errno != errno.ENXIO else stop
        found = offset // PAGE_BYTES if whence == os.SEEK_DATA else -(-offset // PAGE_BYTES)
        return min(found, stop)


def short_runs(runs: Iterator[PageRun]) -> Iterator[PageRun]:
    """The same pages in runs of at most MAX_RUN_PAGES, as a workload keeps its own."""
    for start, stop in runs:
        for at in range(start, stop, MAX_RUN_PAGES):
            yield at, min(at + MAX_RUN_PAGES, stop)
