"""The daemon pair end to end: real guests move live, and check themselves against their own journal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from migd.migration.stats import Result
from tests.support.pair import DaemonPair, GuestProcess, daemon_pair, eventually

LIVE = ["connecting", "arming", "bulk", "pausing", "switchover", "awaiting-ready", "going", "verifying"]
PAUSED = ["connecting", "pausing", "switchover", "awaiting-ready", "going", "verifying"]
RAM_PAGES = (64 << 20) // 4096


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair() as pair:
        yield pair


def assert_moved(pair: DaemonPair, guest: GuestProcess, result: Result) -> None:
    """Arrived whole: the guest says so itself, and it is gone here."""
    assert (result.outcome, result.error, result.exit_code) == ("completed", "", 0)
    assert result.checked_pages is not None
    assert result.checked_pages > 0
    assert (result.wrong_pages, result.rescued_pages, result.late_dirty_pages) == (0, 0, 0)
    assert pair.checked(guest.name) == (result.checked_pages, 0)
    assert result.downtime.guest_s > 0
    assert guest.wait() == 0
    assert " 0 wrong" in guest.log.splitlines()[-1]
    eventually(lambda: pair.source.guest(guest.name) is None, "the source to forget it")
    here = pair.destination.guest(guest.name)
    assert here is not None
    assert (here.state, here.migration) == ("running", "")


def assert_accounted(result: Result) -> None:
    """R17 in the result: at the end each page is sent, zero, skipped or a hole."""
    once = result.ram_pages - result.zero_pages - result.skipped_free_pages - result.hole_pages
    assert 0 < once <= result.sent_pages
    assert result.sent_pages == sum(iteration.sent_pages for iteration in result.iterations)
    assert result.resent_pages == sum(iteration.resent_pages for iteration in result.iterations)
    assert result.free_records == sum(iteration.free_records for iteration in result.iterations)
    assert result.page_bytes == result.sent_pages * 4096
    assert result.payload_bytes <= result.page_bytes
    assert result.wire_bytes > result.payload_bytes


@dataclass(frozen=True)
class Case:
    """A way to move a guest."""

    workload: str
    options: tuple[str, ...] = ()
    rate: str = ""
    contract: str = "anything"

    def __str__(self) -> str:
        return " ".join([self.workload, *self.options, *([self.contract] * (self.contract != "anything"))])


CASES = [
    Case("churn", ("--streams", "3")),
    Case("churn", ("--streams", "1", "--no-hints", "--verify", "strict")),
    Case("churn", ("--compression", "lz4", "--verify", "late"), contract="zero"),
    Case("hog", ("--streams", "1", "--verify", "strict")),
    Case("hog", ("--streams", "3", "--compression", "none", "--verify", "off"), contract="zero"),
    Case("hog", ("--paused",)),
    Case("hog", ("--no-hints", "--verify", "late"), contract="none"),
    Case("write-heavy", ("--downtime-limit", "1", "--verify", "strict"), rate="150M"),
    Case("write-heavy", ("--downtime-limit", "1", "--streams", "1", "--no-hints"), rate="150M"),
    Case("write-heavy", ("--paused", "--no-hints", "--compression", "lz4")),
    Case("idle", ("--streams", "2", "--compression", "lz4")),
    Case("idle", ("--paused",), contract="none"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_guest_arrives_with_every_page_right(pair: DaemonPair, case: Case) -> None:
    rate = {"rate": case.rate} if case.rate else {}
    guest = pair.guest(ram="64Mi", workload=case.workload, contract=case.contract, **rate)
    try:
        output = pair.migrate(guest.name, *case.options)
        assert output.exit_code == 0, output
        result = output.result
        assert_moved(pair, guest, result)
        assert_accounted(result)
        assert result.ram_pages == RAM_PAGES
        _check_against(case, result)
    finally:
        pair.discard(guest.name)


def _check_against(case: Case, result: Result) -> None:
    """What the options say is what the result says."""
    options = dict(zip(case.options, case.options[1:], strict=False))
    live = "--paused" not in case.options
    hints = "--no-hints" not in case.options and case.contract != "none"
    states = [state for state in result.states if state != "iterating"]
    assert states == [*(LIVE if live else PAUSED), "completed"]
    assert result.live is live
    assert result.streams == int(options.get("--streams", 2))
    assert result.dirty_log == ("userfaultfd" if live else "none (paused)")
    if live and hints:
        assert result.hints == "used"
    if not hints:
        assert (result.skipped_free_pages, result.hints_applied, result.free_records) == (0, 0, 0)
    if hints and case.workload == "hog":
        # It filled 95 % and freed it: nearly all of RAM holds old data that nobody wants.
        assert result.skipped_free_pages > RAM_PAGES * 0.8
        assert result.sent_pages - result.resent_pages < RAM_PAGES * 0.15
    if not hints and case.workload == "hog":
        assert result.sent_pages > RAM_PAGES * 0.8
    if case.workload == "write-heavy" and live:
        assert "iterating" in result.states
        assert result.resent_pages > 0
    if case.workload in ("churn", "write-heavy", "idle"):
        assert result.hole_pages + result.skipped_free_pages > RAM_PAGES * 0.4
    verify = options.get("--verify", "auto")
    assert result.verification == {"strict": "strict: ok", "late": "late: ok", "off": "off"}.get(
        verify, result.verification
    )
    assert result.verification in ("strict: ok", "late: ok", "off")
    if options.get("--compression") == "lz4":
        assert result.compression_ratio > 1.2
    if options.get("--compression") == "none":
        assert result.payload_bytes == result.page_bytes
    if not live:
        assert [iteration.live for iteration in result.iterations] == [False]
        assert result.resent_pages == 0


def test_an_arrived_guest_is_not_sent_on_by_a_daemon_that_only_receives(pair: DaemonPair) -> None:
    """The destination role has no way out yet: it says so, and the guest runs on."""
    guest = pair.guest(workload="idle")
    assert pair.migrate(guest.name).exit_code == 0
    again = pair.migrate(guest.name)
    assert again.exit_code == 1
    assert f"no guest '{guest.name}' is attached here" in again.complaint
    here = pair.destination.guest(guest.name)
    assert here is not None
    assert here.state == "running"
    pair.discard(guest.name)


def test_a_writer_that_outruns_the_limit_is_given_up_and_moves_when_forced() -> None:
    policy = '[migration]\non_exhausted = "{}"\nmax_iterations = 3\ndowntime_limit_ms = 0.1\n'
    with daemon_pair(source=policy.format("cancel")) as pair:
        guest = pair.guest(workload="write-heavy", rate="400M", live="0.3")
        output = pair.migrate(guest.name)
        assert output.exit_code == 1
        result = output.result
        assert "writes faster than memory moves" in result.error
        assert 'on_exhausted = "force"' in result.error
        assert result.states[-3:] == ["iterating", "aborting", "failed"]
        assert len(result.iterations) == 3
        here = pair.source.guest(guest.name)
        assert here is not None
        assert here.state == "running"
        eventually(lambda: pair.destination.guest(guest.name) is None, "the destination to forget it")
        assert pair.source.stop() == 0
        pair.source.reconfigure(policy.format("force"))
        pair.source.restart()
        eventually(lambda: pair.source.guest(guest.name), "the guest to come back")
        result = pair.migrate(guest.name).result
        assert_moved(pair, guest, result)
        assert len(result.iterations) == 4
