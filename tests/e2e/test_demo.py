"""`migd demo` as its user runs it: its conditions hold, and nothing of it is left behind."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import pytest

from migd import demo
from migd.control.documents import ErrorDocument
from migd.demo import Comparison, compare
from migd.migration.stats import Downtime, Iteration, Result
from tests.support.pair import eventually
from tests.support.script import left_behind, module_process

RAM_PAGES = (256 << 20) // 4096


@pytest.fixture
def private() -> Iterator[Path]:
    """Where the demo's own directory is made: short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        yield Path(directory)


def demo_process(private: Path, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return module_process(private, "migd", "demo", *arguments)


def test_the_demo_shows_what_hints_spare_and_that_nothing_is_lost(private: Path) -> None:
    # A guest this small is caught up with in a few ms: at 100 MB/s it writes in every one of them.
    with demo_process(private, "--ram", "256Mi", "--rate", "100M", "--json") as process:
        out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    found = msgspec.json.decode(out, type=Comparison)
    assert found.failures == []
    for result in (found.without_hints, found.with_hints):
        assert (result.outcome, result.ram_pages, result.wrong_pages) == ("completed", RAM_PAGES, 0)
        assert result.checked_pages is not None
        assert result.checked_pages > 0
    hinted = found.with_hints
    assert len(hinted.iterations) >= demo.MIN_ITERATIONS
    assert min(hinted.resent_pages, hinted.free_records, hinted.skipped_free_pages) > 0
    assert (found.without_hints.skipped_free_pages, found.without_hints.free_records) == (0, 0)
    assert hinted.rescued_pages == 0
    # 5 % of RAM is live. How often that is sent again depends on the time that the guest has for writing.
    assert hinted.iterations[0].to_send_pages * 5 < found.without_hints.iterations[0].to_send_pages
    assert left_behind(private) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["filling", "migrating it"])
def test_an_interrupted_demo_ends_all_it_started(private: Path, number: signal.Signals, moment: str) -> None:
    with demo_process(private, "--ram", "256Mi") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(moment):
                break
        if moment == "migrating it":
            incoming = "migd.guest.incoming"  # outlives the daemon that started it
            eventually(lambda: any(incoming in line for line in left_behind(private)), "an incoming guest")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1].endswith("interrupted; everything it had started was ended")
    assert left_behind(private) == []


def test_where_no_writes_are_tracked_it_says_so_and_exits_with_3(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sitecustomize.py").write_text("import platform; platform.machine = lambda: 'vax'")
        monkeypatch.setenv("PYTHONPATH", directory)
        with demo_process(private, "--ram", "16Mi", "--json") as process:
            out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert msgspec.json.decode(out, type=ErrorDocument).exit_code == 3
    assert err.startswith("migd: the demo is about the kernel's write tracking, and here it is compare (")
    assert err.count("\n") == 1
    assert left_behind(private) == []


def test_a_wrong_size_is_one_clear_line(private: Path) -> None:
    with demo_process(private, "--ram", "1001") as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err == "migd: --ram: 1001 bytes is not a positive multiple of 4096\n"
    assert left_behind(private) == []


def good_result() -> Result:
    return Result(
        migration="0" * 32,
        guest="g",
        peer="127.0.0.1:1",
        outcome="completed",
        hints="used",
        total_s=1.0,
        downtime=Downtime(guest_s=0.1),
        iterations=[Iteration(number=number, live=True, to_send_pages=1) for number in range(3)],
        resent_pages=1,
        free_records=1,
        skipped_free_pages=1,
        wire_bytes=1,
        checked_pages=1,
        wrong_pages=0,
    )


def test_a_good_result_has_no_failures() -> None:
    assert compare(good_result(), good_result()).failures == []


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("outcome", "failed", "the migration failed"),
        ("checked_pages", None, "did not report its own check"),
        ("checked_pages", 0, "did not report its own check"),
        ("wrong_pages", 1, "1 of 1 pages wrong"),
        ("iterations", [], "0 iterations"),
        ("resent_pages", 0, "no page was sent again"),
        ("free_records", 0, "no FREE record"),
        ("skipped_free_pages", 0, "no page was skipped"),
    ],
)
def test_each_condition_fails_the_demo_by_itself(field: str, value: object, says: str) -> None:
    hinted = msgspec.structs.replace(good_result(), **{field: value})
    (failure,) = compare(good_result(), hinted).failures
    assert failure.startswith("with hints: ")
    assert says in failure


def test_the_run_without_hints_must_be_clean_but_skips_nothing() -> None:
    without = msgspec.structs.replace(good_result(), free_records=0, skipped_free_pages=0, resent_pages=0)
    assert compare(without, good_result()).failures == []
    wrong = msgspec.structs.replace(without, wrong_pages=1)
    assert compare(wrong, good_result()).failures == ["without hints: the guest found 1 of 1 pages wrong"]
