"""The compare log end to end: the guests and contracts of test_migrate.py, judged by their own journals.

Nothing here asks the log whether it was right: a guest checks every page it owns, and what is written past
the kernel's log is looked for in the memory of the process that arrived.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.daemon.status import write_tracking
from migd.migration.stats import Result
from migd.source.attempt import DirtyLogChoice
from tests.support.pair import DaemonPair, GuestProcess, daemon_pair, eventually

CONFIG = '[migration]\ndirty_log = "compare"\n'
PAGE_BYTES = 4096
RAM_PAGES = (64 << 20) // PAGE_BYTES


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(source=CONFIG) as pair:
        yield pair


@contextlib.contextmanager
def guest_of(pair: DaemonPair, **options: object) -> Iterator[GuestProcess]:
    guest = pair.guest(**options)
    try:
        yield guest
    finally:
        pair.discard(guest.name)


def assert_moved(pair: DaemonPair, guest: GuestProcess, result: Result) -> None:
    assert (result.outcome, result.error, result.exit_code) == ("completed", "", 0)
    assert result.dirty_log == "compare"
    assert result.verification == "strict: ok (compare log)"
    assert result.checked_pages is not None
    assert result.checked_pages > 0
    assert (result.wrong_pages, result.rescued_pages, result.late_dirty_pages) == (0, 0, 0)
    assert pair.checked(guest.name) == (result.checked_pages, 0)


# A limit of 1 ms is out of reach of any comparison of so much: the guest is paused as soon as nothing more
# can be gained. One of 10 s is met at once.
CASES = [
    ("churn", "anything", ("--streams", "3")),
    ("churn", "zero", ("--compression", "lz4", "--downtime-limit", "1")),
    ("churn", "anything", ("--no-hints", "--streams", "1")),
    ("hog", "anything", ("--streams", "1", "--downtime-limit", "1")),
    ("hog", "zero", ("--streams", "3", "--verify", "late")),
    ("hog", "none", ("--verify", "off")),
    ("write-heavy", "anything", ("--downtime-limit", "1")),
    ("write-heavy", "zero", ("--downtime-limit", "1", "--no-hints")),
    ("write-heavy", "anything", ("--downtime-limit", "10000", "--streams", "1")),
    ("idle", "anything", ()),
]


@pytest.mark.parametrize(
    ("workload", "contract", "options"), CASES, ids=[" ".join([w, c, *o]) for w, c, o in CASES]
)
def test_a_guest_arrives_with_every_page_right(
    pair: DaemonPair, workload: str, contract: str, options: tuple[str, ...]
) -> None:
    rate = {"rate": "150M"} if workload == "write-heavy" else {}
    with guest_of(pair, ram="64Mi", workload=workload, contract=contract, **rate) as guest:
        result = pair.migrate(guest.name, *options).result
        assert_moved(pair, guest, result)
        hinted = "--no-hints" not in options and contract != "none"
        assert (result.hints == "used") is hinted
        if not hinted:
            assert (result.skipped_free_pages, result.reclaimed_pages, result.free_records) == (0, 0, 0)
        if hinted and workload == "hog":
            assert result.skipped_free_pages > RAM_PAGES * 0.5
        if workload == "write-heavy":
            assert result.resent_pages > 0


def test_the_option_says_otherwise_than_the_configuration(pair: DaemonPair) -> None:
    with guest_of(pair, workload="churn") as guest:
        result = pair.migrate(guest.name, "--dirty-log", "userfaultfd").result
        assert (result.outcome, result.dirty_log, result.wrong_pages) == ("completed", "userfaultfd", 0)


def test_status_says_which_log_is_used(pair: DaemonPair) -> None:
    assert pair.source.status().write_tracking == "compare, as configured"
    assert pair.destination.status().write_tracking == "userfaultfd"


# -- writes that the kernel's log does not see ------------------------------------------------------------


def ram_fd(pid: int, flags: int) -> int:
    """A descriptor of our own to the RAM of a stub process."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("/memfd:migd-ram"):
                return os.open(entry, flags)
    raise AssertionError(f"process {pid} has no RAM")


def page_of(pid: int, page: int) -> bytes:
    fd = ram_fd(pid, os.O_RDONLY)
    try:
        return os.pread(fd, PAGE_BYTES, page * PAGE_BYTES)
    finally:
        os.close(fd)


def write_past_the_log(pid: int, page: int, content: bytes) -> None:
    """W13: through the descriptor, and not through the mapping that the guest could arm."""
    fd = ram_fd(pid, os.O_RDWR)
    try:
        os.pwrite(fd, content, page * PAGE_BYTES)
    finally:
        os.close(fd)


STRAY = b"\xa5" * PAGE_BYTES
NOBODYS = RAM_PAGES - 1
"""The last page: the idle guest owns the first ones."""


@pytest.mark.parametrize(("log", "arrives"), [("compare", True), ("userfaultfd", False)])
def test_what_another_process_writes_past_the_kernels_log_arrives(log: str, arrives: bool) -> None:
    """Into a page that no guest owns, when everything was sent; nobody's journal is broken by it.

    With the kernel's log the same write is why nobody may write so: it stays behind, and the verification of
    the tracking is what finds it.
    """
    with daemon_pair(
        source=f'[migration]\ndirty_log = "{log}"\nhints = false\nverify = "late"\n', held=True
    ) as pair:
        guest = pair.guest(ram="64Mi", workload="idle")
        pair.source.hold("pausing", "held")
        pair.launch(guest.name)
        pair.source.wait_held("held")
        assert page_of(guest.pid, NOBODYS) != STRAY
        write_past_the_log(guest.pid, NOBODYS, STRAY)
        pair.source.release("held")
        ended = pair.ended(guest.name)
        arrived = eventually(lambda: [pid for pid in pair.copies(guest.name) if pid != guest.pid], "its copy")
        assert (page_of(arrived[0], NOBODYS) == STRAY) is arrives
        assert ended.state == ("completed" if arrives else "failed")
        assert ("1 pages changed without being tracked" in ended.error) is not arrives


# -- where the kernel has no log --------------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every process started here is on a machine whose userfaultfd nobody knows the number of."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sitecustomize.py").write_text("import platform; platform.machine = lambda: 'vax'")
        monkeypatch.setenv("PYTHONPATH", directory)
        yield


@pytest.mark.usefixtures("foreign")
def test_where_the_kernel_tracks_no_writes_the_compare_log_is_chosen() -> None:
    with daemon_pair() as pair:
        missing = "userfaultfd: unknown machine vax; soft-dirty: "
        assert pair.source.status().write_tracking.startswith(f"compare ({missing}")
        with guest_of(pair, workload="churn") as guest:
            refused = pair.migrate(guest.name, "--dirty-log", "userfaultfd")
            assert refused.exit_code == 3
            assert "cannot track writes" in refused.result.error
            assert refused.result.error.endswith("; use --dirty-log compare, or --paused")
            assert_moved(pair, guest, pair.migrate(guest.name).result)


@pytest.mark.parametrize(
    ("choice", "begins", "ends"),
    [
        ("compare", "compare, as configured", ""),
        ("auto", "compare (userfaultfd: unknown machine vax; soft-dirty: ", ")"),
        (
            "userfaultfd",
            'none, as dirty_log = "userfaultfd" (userfaultfd: unknown machine vax; soft-dirty: ',
            "): only --paused migrations",
        ),
    ],
)
def test_what_status_says_there(choice: str, begins: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    said = write_tracking(DirtyLogChoice(choice))
    assert said.startswith(begins)
    assert said.endswith(ends)
