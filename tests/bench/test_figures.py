"""What the bench makes of its runs: medians, failures, JSON and the tables."""

from __future__ import annotations

import msgspec
import pytest

from migd.bench.cases import contenders
from migd.bench.figures import FIGURES, BenchReport, ContenderReport, Measured, Run, Spread, failures_of
from migd.bench.machine_limits import MachineLimits
from migd.bench.table import report_text
from migd.bench.usage import Usage
from migd.migration.stats import Downtime, Iteration, Result

RAM_PAGES = 1 << 14

LIMITS = MachineLimits(
    memcpy_gb_s=11.0,
    first_touch_fresh_gb_s=0.5,
    first_touch_gb_s=2.0,
    loopback_gb_s=4.0,
    lz4_compress_gb_s=0.6,
    lz4_decompress_gb_s=2.4,
    lz4_ratio=1.86,
    xxh3_page_gb_s=12.0,
)


def result(total_s: float = 0.1, sent_pages: int = RAM_PAGES, **changes: object) -> Result:
    good = Result(
        migration="0" * 32,
        guest="bench",
        peer="127.0.0.1:1",
        outcome="completed",
        hints="used",
        total_s=total_s,
        downtime=Downtime(guest_s=total_s / 10),
        iterations=[Iteration(number=0, live=True, to_send_pages=1)],
        ram_pages=RAM_PAGES,
        sent_pages=sent_pages,
        page_bytes=sent_pages * 4096,
        wire_bytes=sent_pages * 2048,
        checked_pages=1,
        wrong_pages=0,
    )
    return msgspec.structs.replace(good, **changes)


def run(number: int, found: Result, failures: tuple[str, ...] = ()) -> Run:
    usage = Usage(cpu_s=0.05, peak_anon_bytes=40 << 20, end_anon_bytes=30 << 20)
    return Run(
        number=number,
        measured=Measured(result=found, source=usage, destination=usage),
        failures=list(failures),
    )


def report(*runs: Run) -> BenchReport:
    (random,) = contenders(["full-random"], [])
    (fragmented,) = contenders(["fragmented"], [])
    return BenchReport(
        version="1",
        kernel="6.18",
        cores=2,
        ram_bytes=RAM_PAGES * 4096,
        options={"streams": 4},
        limits=LIMITS,
        contenders=[
            ContenderReport.of(random, list(runs)),
            ContenderReport.of(fragmented, [Run(number=1, failures=["the guest ended with 2: why"])]),
        ],
    )


def test_a_spread_has_the_middle_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


def test_figures_are_of_the_runs_without_failures() -> None:
    found = report(run(1, result(0.1)), run(2, result(9.0), ("wrong",)), run(3, result(0.3))).contenders[0]
    assert set(found.figures) == set(FIGURES)
    assert found.figures["total_s"] == Spread(0.2, 0.1, 0.3)
    assert found.figures["ram_gb_s"].high == pytest.approx(RAM_PAGES * 4096 / 0.1 / 1e9)
    assert found.figures["source_anon_bytes"].median == 40 << 20
    assert len(found.runs) == 3


def test_a_contender_that_never_succeeded_has_no_figures() -> None:
    found = report(run(1, result(), ("wrong",)))
    assert [contender.figures for contender in found.contenders] == [{}, {}]
    assert found.failures == ["full-random, run 1: wrong", "fragmented, run 1: the guest ended with 2: why"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outcome": "failed", "error": "why"}, "the migration failed: why"),
        ({"checked_pages": None}, "did not report its own check"),
        ({"checked_pages": 0}, "did not report its own check"),
        ({"wrong_pages": 1}, "1 of 1 pages wrong"),
        ({"hints": "off"}, "hints were not used: off"),
    ],
)
def test_each_condition_fails_a_run(changes: dict[str, object], says: str) -> None:
    assert not list(failures_of(result(), hints=True))
    (failure,) = failures_of(result(**changes), hints=True)
    assert says in failure


def test_a_run_that_was_to_use_no_hints_or_has_none_needs_none() -> None:
    assert not list(failures_of(result(hints="off"), hints=False))
    assert not list(failures_of(result(hints="none came in time", checked_pages=RAM_PAGES), hints=True))


def test_the_report_survives_json() -> None:
    found = report(run(1, result()))
    assert msgspec.json.decode(msgspec.json.encode(found), type=BenchReport) == found


def lines(found: BenchReport) -> dict[str, list[str]]:
    """The cells of every row, by its first two columns' words."""
    rows: dict[str, list[str]] = {}
    for line in report_text(found).splitlines():
        label, *cells = [word for word in line.split("  ") if word.strip()] or [""]
        rows.setdefault(label.strip(), []).extend(cell.strip() for cell in cells)
    return rows


def test_the_tables_show_medians_spread_and_shares_of_what_the_machine_can_do() -> None:
    found = report(run(1, result(0.1)), run(2, result(0.3)))
    rows = lines(found)["full-random"]
    assert rows[:2] == ["200 (100 - 300)", "20 (10 - 30)"]
    # 64 MiB of content in 0.1 and 0.3 s: 0.45 GB/s of 2.0, half of that on the wire, of 4.0.
    assert rows[-2:] == ["22%", "6%"]
    assert lines(found)["fragmented"] == ["failed"] * 3
    assert lines(found)["loopback TCP, one connection"] == ["4.00"]
    head = report_text(found).splitlines()[0]
    assert head == "migd 1: 64 MiB of RAM, streams 4; 2 cores, Linux 6.18"


def test_what_sends_little_is_not_compared_with_rates() -> None:
    found = report(run(1, result(sent_pages=RAM_PAGES // 2 - 1)))
    assert lines(found)["full-random"][-2:] == ["-", "-"]
    assert "one run each" in report_text(found)
