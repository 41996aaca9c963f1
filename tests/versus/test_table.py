"""Medians, ratios and the tables made of them, from runs that were written down by hand."""

from __future__ import annotations

import pytest

from migd.versus.cases import Case, Contender, Measured
from migd.versus.figures import Report, Row, Run, ratio
from migd.versus.table import report_text


def measured(total_s: float, downtime_s: float = 0.02, megabytes: int = 200) -> Measured:
    return Measured(
        total_s=total_s,
        downtime_s=downtime_s,
        wire_bytes=megabytes * 1_000_000,
        started_s=total_s - 0.05,
        detail="as it says",
    )


def row(contender: Contender, *found: Measured | str, case: Case = Case.HOG) -> Row:
    runs = [
        Run(number=number, failure=each) if isinstance(each, str) else Run(number=number, measured=each)
        for number, each in enumerate(found, 1)
    ]
    return Row(case=case, contender=contender, runs=runs)


def report(*rows: Row) -> Report:
    return Report(
        version="0.1.0", kernel="6.12", cores=2, emulator="QEMU 10.0.2", ram_bytes=1 << 30, rows=list(rows)
    )


MULTIFD = row(Contender.MULTIFD, measured(0.9, 0.2, 900), measured(0.7, 0.1, 900), measured(0.8, 0.3, 900))
MIGD = row(Contender.MIGD, measured(0.4, 0.01, 180), measured(0.6, 0.03, 180), measured(0.44, 0.02, 189))


def test_a_ratio_is_of_the_medians_and_of_the_yardstick_in_the_same_case() -> None:
    rows = [MULTIFD, MIGD]
    assert ratio(rows, MIGD, "total_s") == pytest.approx(0.44 / 0.8)
    assert ratio(rows, MIGD, "downtime_s") == pytest.approx(0.02 / 0.2)
    assert ratio(rows, MIGD, "wire_bytes") == pytest.approx(180 / 900)
    assert ratio(rows, MULTIFD, "total_s") is None
    assert ratio([MIGD], MIGD, "total_s") is None


def test_failed_runs_are_left_out_of_the_medians_and_named() -> None:
    broken = row(Contender.MIGD, "the guest was gone", measured(0.5))
    assert broken.median("total_s") == 0.5
    assert report(MULTIFD, broken).failures == [
        "after a memory hog has ended, migd with hints, run 1: the guest was gone"
    ]
    nothing = row(Contender.MIGD, "no", "never")
    assert nothing.median("total_s") == 0
    assert ratio([MULTIFD, nothing], nothing, "total_s") is None


def test_the_report_has_a_table_for_each_case_with_spread_and_ratios() -> None:
    idle = row(Contender.MIGD, measured(0.3), case=Case.IDLE)
    text = report(idle, MULTIFD, MIGD).of(Case.HOG), report_text(report(idle, MULTIFD, MIGD))
    assert text[0] == [MULTIFD, MIGD]
    lines = [" ".join(line.split()) for line in text[1].splitlines()]
    assert lines[1] == "median of 3 runs (lowest - highest); x: of QEMU multifd"
    assert "freshly booted, idle" in lines
    assert "QEMU multifd 800 (700 - 900) 200.0 (100.0 - 300.0) 900.0 (900.0 - 900.0)" in lines
    assert "migd with hints 440 (400 - 600) 0.55 20.0 (10.0 - 30.0) 0.10 180.0 (180.0 - 189.0) 0.20" in lines


def test_a_contender_without_any_run_that_worked_is_shown_as_failed() -> None:
    text = report_text(report(MULTIFD, row(Contender.MIGD, "no")))
    assert "migd with hints failed failed failed" in [" ".join(line.split()) for line in text.splitlines()]
