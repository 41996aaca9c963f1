"""One chunk of inputs for one target, with everything that must hold for each of them."""

from __future__ import annotations

import contextlib
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from tests.fuzz.target import ACCEPTED, Broken, Outcome, Target

HANG_S = 1.0
"""Of processor time for one input: on a busy machine none takes long for no fault of its own."""
SAMPLE_EVERY = 200
"""Inputs between two whose allocations are measured, which makes them several times slower."""
_ALLOCATION_FLOOR_BYTES = 24 << 20
"""Buffers of 2 MiB for each of a few streams, a bitmap of 1 MiB, what is decompressed."""
_ALLOCATION_PER_BYTE = 64
_MOST_FINDINGS = 5
"""Of one chunk, after which it ends: the next thousand would say the same."""
_HANG_TEXT = f"more than {HANG_S:g} s of processor time"


class Hang(BaseException):
    """Not for a parser to catch."""


@dataclass(frozen=True)
class Chunk:
    """Inputs that follow from these four values."""

    target: str
    seed: int
    number: int
    inputs: int


@dataclass(frozen=True)
class Finding:
    """An input that broke something, and how."""

    target: str
    data: bytes
    what: str


@dataclass
class Tally:
    """What became of a number of inputs of one target."""

    inputs: int = 0
    unchanged: int = 0
    """Accepted, and still the recording."""
    changed: int = 0
    """Accepted, and no recording."""
    refused: Counter[str] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    """Of processor time."""
    slowest_s: float = 0.0
    """Of processor time, one input."""
    peak_bytes: int = 0
    """The most that one sampled input allocated."""
    findings: list[Finding] = field(default_factory=list)

    def count(self, outcome: Outcome, recording: bool) -> None:
        self.depths[outcome.depth] += 1
        if outcome.verdict != ACCEPTED:
            self.refused[outcome.verdict] += 1
        elif recording:
            self.unchanged += 1
        else:
            self.changed += 1

    def add(self, other: Tally) -> None:
        self.inputs += other.inputs
        self.unchanged += other.unchanged
        self.changed += other.changed
        self.refused += other.refused
        self.depths += other.depths
        self.seconds += other.seconds
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.findings += other.findings

    @property
    def behind(self) -> int:
        """Inputs of which at least one whole frame, record or message was accepted."""
        return self.depths.total() - self.depths[0]


def run_chunk(
    target: Target, chunk: Chunk, remember: Callable[[bytes], object], sample_every: int = SAMPLE_EVERY
) -> Tally:
    """Make and run all inputs of a chunk; ``remember`` is told of each before it is run."""
    tally, chance, recordings = (
        Tally(),
        Random(f"{chunk.seed}/{chunk.target}/{chunk.number}"),
        set(target.seeds),
    )
    began_s = time.process_time()
    with hangs_found():
        for number in range(chunk.inputs):
            data = target.mutate(chance.choice(target.seeds), chance)
            remember(data)
            tally.inputs += 1
            finding = _run_one(target, data, tally, recordings, sampled=number % sample_every == 0)
            if finding:
                tally.findings.append(Finding(chunk.target, data, finding))
                if len(tally.findings) == _MOST_FINDINGS:
                    break
    tally.seconds = time.process_time() - began_s
    return tally


def _run_one(target: Target, data: bytes, tally: Tally, recordings: set[bytes], *, sampled: bool) -> str:
    """What is wrong, in words; empty if nothing is."""
    before_s = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        try:
            outcome = _measured(target, data, tally) if sampled else target.run(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (Exception, Hang) as error:  # noqa: BLE001  # whatever it is, it is a finding
        return explained(error)
    tally.slowest_s = max(tally.slowest_s, time.process_time() - before_s)
    tally.count(outcome, outcome.verdict == ACCEPTED and data in recordings)
    return ""


def _measured(target: Target, data: bytes, tally: Tally) -> Outcome:
    """Broken if what it allocates is out of proportion to the input."""
    tracemalloc.start()
    try:
        outcome = target.run(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tally.peak_bytes = max(tally.peak_bytes, peak_bytes)
    if peak_bytes > _ALLOCATION_FLOOR_BYTES + _ALLOCATION_PER_BYTE * len(data):
        raise Broken(f"{peak_bytes} bytes were allocated for {len(data)}")
    return outcome


def explained(error: BaseException) -> str:
    """A finding in one line: what was raised, and where."""
    if isinstance(error, BaseExceptionGroup):
        return explained(error.exceptions[0])
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f" in {at.tb_frame.f_code.co_filename.rpartition('/')[2]}:{at.tb_lineno}" if at else ""
    return f"{type(error).__name__}: {str(error)[:300]}{place}"


@contextlib.contextmanager
def hangs_found() -> Iterator[None]:
    """SIGPROF, which ``_run_one`` sets a timer for, ends the input that hangs."""

    def found(_number: int, _frame: FrameType | None) -> None:
        raise Hang(_HANG_TEXT)

    before = signal.signal(signal.SIGPROF, found)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


def replayed(target: Target, data: bytes) -> str:
    """What is wrong with one input, in words; empty if nothing is."""
    with hangs_found():
        return _run_one(target, data, Tally(), set(), sampled=True)
