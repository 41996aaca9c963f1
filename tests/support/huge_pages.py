"""Huge pages for a test: a few reserved, or a hugetlbfs mounted, and given back; else the test is skipped."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HUGE_BYTES = 2 << 20
HUGE_PAGES = 512
"""Of 4096 bytes."""
MOST = 32
"""64 MiB: more is not worth what it takes from everybody else."""

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def free_huge_pages() -> int:
    """Neither in use nor set aside."""
    free, reserved = (int((_POOL / f"{what}_hugepages").read_text()) for what in ("free", "resv"))
    return free - reserved


@contextmanager
def reserved(count: int) -> Iterator[None]:
    """``count`` huge pages of 2 MiB, and no others, are free while the context is entered."""
    assert count <= MOST
    with _alone():
        yield from _reserve(count)


@contextmanager
def _alone() -> Iterator[None]:
    """The pool is the host's: tests in other processes wait for their turn."""
    with (Path(tempfile.gettempdir()) / f"migd-huge-pages-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reserve(count: int) -> Iterator[None]:
    if free_huge_pages():
        pytest.skip("the huge pages of this host are somebody's")
    pool = _POOL / "nr_hugepages"
    try:
        before = int(pool.read_text())
        pool.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved here: {error.strerror}")
    try:
        if int(pool.read_text()) < before + count:
            pytest.skip(f"this host has not {count} huge pages left")
        yield
    finally:
        pool.write_text(str(before))


@contextmanager
def hugetlbfs(directory: Path, count: int) -> Iterator[Path]:
    """A hugetlbfs on a new directory there, of at most ``count`` huge pages."""
    place = directory / "huge"
    place.mkdir()
    options = f"pagesize=2M,size={count * HUGE_BYTES}"
    mount = ["mount", "-t", "hugetlbfs", "-o", options, "none", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no hugetlbfs can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        # Lazily: a process that a failed test left behind may have a file open there.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
