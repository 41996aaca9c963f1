"""The workload on this host: it answers over a socket, finds what is wrong, and survives half a line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.lab import workload
from migd.lab.workbench import LabError, Workload

_MIB = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """The socket of a workload that runs; at the end it is gone, with its files."""
    path, files = tmp_path / "lab", tmp_path / "files"
    files.mkdir()
    process = subprocess.Popen(
        (sys.executable, "-S", "-E", workload.__file__, "--socket", str(path)), env={"TMPDIR": str(files)}
    )
    try:
        yield path
    finally:
        process.terminate()
        assert process.wait(10) == 0
    assert list(files.iterdir()) == []


def test_it_works_and_answers(place: Path) -> None:
    with Workload(place) as asked:
        asked.await_ready()
        first = asked.ask("status")
        time.sleep(1.2)
        second = asked.ask("status")
        assert second["counter"] > first["counter"]
        assert second["forks"] > first["forks"]
        assert second["files_read"] > first["files_read"]
        assert 0 < second["mem_free_bytes"] < second["mem_total_bytes"]
        assert (second["fork_failures"], second["file_failures"], second["clock_failures"]) == (0, 0, 0)
        assert asked.ask("check") == {"pages": 2048, "wrong": 0, "first_wrong": None}


def test_a_wrong_byte_is_found_by_check_and_by_forks(place: Path) -> None:
    with Workload(place) as asked:
        asked.ask("rate", bytes_s=1)  # nothing is rewritten, but children look
        asked.ask("corrupt", page=500)
        assert asked.ask("check") == {"pages": 2048, "wrong": 1, "first_wrong": 500}
        deadline = time.monotonic() + 30
        while asked.ask("status")["fork_failures"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_at_rate_nothing_it_rests(place: Path) -> None:
    with Workload(place) as asked:
        asked.ask("rate", bytes_s=0)
        time.sleep(0.5)  # a child that had begun may end
        forks = asked.ask("status")["forks"]
        time.sleep(0.8)
        assert asked.ask("status")["forks"] == forks


def test_a_hog_takes_memory_and_gives_it_back(place: Path) -> None:
    with Workload(place) as asked:
        assert asked.ask("hog", timeout_s=60, bytes=64 * _MIB + 4096) == {"bytes": 64 * _MIB + 4096}
        assert asked.ask("check")["wrong"] == 0


def test_what_it_cannot_do_is_an_error(place: Path) -> None:
    with Workload(place) as asked:
        for do, arguments in (
            ("dance", {}),
            ("corrupt", {"page": 2048}),
            ("rate", {}),
            ("hog", {"bytes": -1}),
        ):
            with pytest.raises(LabError, match=do):
                asked.ask(do, **arguments)
        asked.ask("ping")


def test_half_a_line_is_passed_over(place: Path) -> None:
    with Workload(place) as asked:
        asked.await_ready()
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(place))
        raw.sendall(b'ing"}\n[1]\n{"id": 1, "do": "pi')
        raw.sendall(b'\n{"id": 2, "do": "ping"}\n')
        assert json.loads(raw.recv(4096)) == {"id": 2, "ok": True}
    with Workload(place) as asked:  # the host comes back with another connection
        asked.ask("ping")


def test_silence_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    with Workload(tmp_path / "nobody") as asked, pytest.raises(LabError, match=r"'ping' within 0\.3 s"):
        asked.ask("ping", timeout_s=0.3)
    assert time.monotonic() - began < 5


def test_a_request_that_is_lost_is_sent_again_but_no_hog(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, Workload(tmp_path / "deaf") as asked:
        listener.bind(str(tmp_path / "deaf"))
        listener.listen()
        with pytest.raises(LabError):
            asked.ask("hog", timeout_s=1.5, bytes=4096)
        with pytest.raises(LabError):
            asked.ask("ping", timeout_s=1.5)
        heard, _ = listener.accept()
        with heard:
            done = [json.loads(line)["do"] for line in heard.recv(4096).split(b"\n") if line]
    assert done == ["hog", "ping", "ping"]
