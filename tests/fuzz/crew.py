"""Crew: the processes that fuzz, each with bounded memory, and what is known of one that dies."""

from __future__ import annotations

import contextlib
import logging
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fuzz.campaign import Chunk, Finding, Tally, run_chunk
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

SILENCE_S = 300.0
"""No chunk takes so long, even on a busy machine: whoever says nothing for so long is blocked for ever."""
_MORE_MEMORY_BYTES = 2 << 30
"""Of address space, above what a process begins with: a length field of 4 GiB that is believed fails."""
_REMEMBERED_BYTES = 1 << 20
_SIZE_BYTES = 8
_MEMORY = Path("/dev/shm")

_context = multiprocessing.get_context("spawn")


class Worker:
    """One process, and the file in which it keeps the input that it is at."""

    def __init__(self, directory: Path, number: int) -> None:
        self.chunk: Chunk | None = None
        self.rss_bytes: list[int] = []
        """After each chunk."""
        self._last = directory / f"input-{number}"
        self._last.write_bytes(bytes(_REMEMBERED_BYTES + _SIZE_BYTES))
        self.pipe, theirs = _context.Pipe()
        self.process: BaseProcess = _context.Process(target=work, args=(theirs, str(self._last)), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.pipe.send(chunk)

    def take(self) -> Tally:
        """EOFError if the process has died."""
        tally, rss_bytes = self.pipe.recv()
        assert isinstance(tally, Tally)
        self.rss_bytes.append(rss_bytes)
        self.chunk = None
        return tally

    def end(self) -> None:
        """At once, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def obituary(self) -> Tally:
        """The input that it was at when it died, or when it stopped to say anything."""
        assert self.chunk is not None
        kept = self._last.read_bytes()
        size = int.from_bytes(kept[:_SIZE_BYTES], "little")
        code = self.process.exitcode
        what = f"no answer for {SILENCE_S:.0f} s" if code is None else f"the process ended with {code}"
        return Tally(findings=[Finding(self.chunk.target, kept[_SIZE_BYTES : _SIZE_BYTES + size], what)])


def work(pipe: Connection, last: str) -> None:
    """A worker's life: chunks in, tallies out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    _limit_memory()
    targets: dict[str, Target] = {}
    with open(last, "r+b") as file, mmap.mmap(file.fileno(), 0) as kept:

        def remember(data: bytes) -> None:
            kept[:_SIZE_BYTES] = min(len(data), _REMEMBERED_BYTES).to_bytes(_SIZE_BYTES, "little")
            kept[_SIZE_BYTES : _SIZE_BYTES + min(len(data), _REMEMBERED_BYTES)] = data[:_REMEMBERED_BYTES]

        with contextlib.suppress(EOFError):
            while True:
                chunk: Chunk = pipe.recv()
                if chunk.target not in targets:
                    targets[chunk.target] = TARGETS[chunk.target]()
                pipe.send((run_chunk(targets[chunk.target], chunk, remember), _rss_bytes()))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_all(
    chunks: Sequence[Chunk], processes: int, told: Callable[[Chunk, Tally], object]
) -> list[list[int]]:
    """Every chunk; ``told`` of each when it is done. Returns what each process occupied after its chunks.

    Whatever ends this, no process and no file is left.
    """
    with _scratch() as directory:
        left = deque(chunks)
        crew: list[Worker] = []
        gone: list[list[int]] = []
        try:
            while left or any(worker.chunk for worker in crew):
                while left and len(crew) < processes:
                    crew.append(Worker(directory, len(crew) + len(gone)))
                for worker in crew:
                    if left and worker.chunk is None:
                        worker.give(left.popleft())
                busy = [worker for worker in crew if worker.chunk is not None]
                ready = wait([worker.pipe for worker in busy], SILENCE_S)
                for worker in busy:
                    chunk = worker.chunk
                    assert chunk is not None
                    if ready and worker.pipe not in ready:
                        continue
                    if not _finished(worker, chunk, told, blocked=not ready):
                        crew.remove(worker)
                        gone.append(worker.rss_bytes)
            return gone + [worker.rss_bytes for worker in crew]
        finally:
            for worker in crew:
                worker.end()


def _finished(worker: Worker, chunk: Chunk, told: Callable[[Chunk, Tally], object], *, blocked: bool) -> bool:
    """False if the worker is no more; what killed it is told."""
    try:
        if not blocked:
            told(chunk, worker.take())
            return True
    except (EOFError, ConnectionError):
        worker.process.join()
    tally = worker.obituary()
    worker.end()
    told(chunk, tally)
    return False


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A directory, in memory if possible, for all that any process puts into files."""
    parent = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    directory = tempfile.mkdtemp(prefix="migd-fuzz-", dir=parent)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = directory
    try:
        yield Path(directory)
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(directory, ignore_errors=True)
