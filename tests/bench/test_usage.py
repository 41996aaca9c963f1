"""What a watched process is seen to take: of a real child that is told when to do what."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migd.bench.touch import RUN_BYTES, touch, touch_in_child
from migd.bench.usage import Watch, anonymous_bytes
from migd.errors import MigdError
from tests.support.pair import eventually

BURN_S = 0.3
BLOCK_BYTES = 64 << 20
CHILD = f"""
import sys, threading, time, mmap

def burn():
    while time.thread_time() < {BURN_S}: pass

for line in sys.stdin:
    if line == "burn\\n":
        thread = threading.Thread(target=burn)
        thread.start(); thread.join()
    elif line == "grow\\n":
        block = mmap.mmap(-1, {BLOCK_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"x" * len(block))
    elif line == "shrink\\n":
        block.close()
    print("done", flush=True)
"""


class Child:
    """Does a thing when told to, and has done it when ``tell`` returns."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tell("nothing")

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.kill()
    child.process.communicate()


def test_processor_time_counts_threads_that_have_ended_and_only_what_was_watched(child: Child) -> None:
    child.tell("burn")
    with Watch(child.pid) as watch:
        pass
    assert watch.usage.cpu_s < BURN_S / 2
    with Watch(child.pid) as watch:
        child.tell("burn")
    assert watch.usage.cpu_s >= BURN_S


def test_the_peak_is_seen_although_it_is_over(child: Child) -> None:
    before = anonymous_bytes(child.pid)
    with Watch(child.pid) as watch:
        child.tell("grow")
        eventually(lambda: watch.usage.peak_anon_bytes >= before + BLOCK_BYTES, "the block was seen")
        child.tell("shrink")
    assert before + BLOCK_BYTES <= watch.usage.peak_anon_bytes < before + BLOCK_BYTES * 2
    assert watch.usage.end_anon_bytes < before + BLOCK_BYTES


def test_of_a_process_that_ends_what_was_seen_last_stands(child: Child) -> None:
    with Watch(child.pid) as watch:
        child.tell("grow")
        eventually(lambda: watch.usage.peak_anon_bytes >= BLOCK_BYTES, "the block was seen")
        child.process.kill()
        child.process.wait()
    assert watch.usage.peak_anon_bytes >= BLOCK_BYTES
    assert watch.usage.cpu_s > 0


def test_touching_is_timed() -> None:
    assert touch(RUN_BYTES) > 0
    assert touch_in_child(3 * RUN_BYTES + 1) > 0


def test_a_child_that_cannot_touch_memory_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    assert false is not None
    monkeypatch.setattr(sys, "executable", false)
    with pytest.raises(MigdError, match="touching 1048576 bytes of memory before a run: it ended with 1"):
        touch_in_child(RUN_BYTES)
