"""History: what is written comes back, through crashes, and never more of it than is kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from migd.control.commands import Remembered
from migd.daemon.history import History
from migd.migration.stats import Arrival, Iteration, Result


def result(number: int, guest: str = "vm1") -> Remembered:
    iteration = Iteration(number=0, live=True, to_send_pages=number)
    record = Result(
        migration=f"{number:032x}", guest=guest, peer="there:1", outcome="completed", iterations=[iteration]
    )
    return Remembered(ended=f"2026-01-01T00:00:{number % 60:02}.000Z", record=record)


def arrival(number: int) -> Remembered:
    record = Arrival(migration=f"{number:032x}", guest="vm2", peer="migd", outcome="aborted", exit_code=1)
    return Remembered(ended="2026-01-01T00:00:00.000Z", record=record)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    entries = [result(1), arrival(2), result(3)]
    for entry in entries:
        History(tmp_path / "history.jsonl").append(entry)
    found = History(tmp_path / "history.jsonl").newest(10)
    assert found == entries
    assert [type(entry.record) for entry in found] == [Result, Arrival, Result]
    assert History(tmp_path / "history.jsonl").newest(2) == entries[1:]
    assert (tmp_path / "history.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_history_yet(tmp_path: Path) -> None:
    assert History(tmp_path / "history.jsonl").newest(10) == []


def test_what_there_is_about_a_guest_or_a_migration(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    entries = [result(0xAAAA << 112), result(0xAAAB << 112, "vm9"), result(0xAAAA << 112 | 1)]
    for entry in entries:
        history.append(entry)
    assert history.about("vm9") == [entries[1]]
    assert history.about("aaab") == [entries[1]]
    assert history.about("aaaa") == [entries[0], entries[2]]
    assert history.about(entries[2].record.migration) == [entries[2]]
    assert history.about("aaa") == [], "too short to tell migrations apart by"
    assert history.about("vm") == []


@pytest.mark.parametrize(
    "torn", [b'{"format":1,"ended":"20', b"\xff\xfe", b"\x00" * 10, b'{"x":' + b"[" * 90_000]
)
def test_a_line_that_a_crash_has_torn_costs_no_other(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(result(1))
    with path.open("ab") as file:
        file.write(torn)
    assert History(path).newest(10) == [result(1)]
    History(path).append(result(2))
    assert History(path).newest(10) == [result(1), result(2)]


def test_lines_of_another_format_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).append(result(1))
    other = path.read_text().replace('"format":1', '"format":2')
    newer = path.read_text().replace('"outcome"', '"unheard_of":[1],"outcome"')
    path.write_text(other + newer)
    assert History(path).newest(10) == [result(1)], "a field more is no other format"


def test_no_more_is_kept_than_that(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path, kept=10)
    for number in range(250):
        history.append(result(number))
        assert len(path.read_bytes().splitlines()) <= 110
    assert history.newest(10) == [result(number) for number in range(240, 250)]
    assert len(history.newest(1000)) < 250
    again = History(path, kept=10)
    for number in range(250, 400):
        again.append(result(number))
    assert len(path.read_bytes().splitlines()) <= 110
    assert again.newest(3) == [result(number) for number in (397, 398, 399)]
    assert os.listdir(tmp_path) == ["history.jsonl"]


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        History(tmp_path / "no" / "history.jsonl").append(result(1))
        (tmp_path / "history.jsonl").symlink_to(tmp_path / "elsewhere")
        History(tmp_path / "history.jsonl").append(result(1))
    assert len(caplog.records) == 2
    assert all("not written" in record.getMessage() for record in caplog.records)
    assert not (tmp_path / "elsewhere").exists()
