"""The workload on this host: it answers over a socket, finds what is wrong, and survives half a line."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd.lab import workload
from migd.lab.workbench import LabError, Workload
from tests.support.pair import processes_naming

_MIB = 1 << 20
_HOARD_BYTES = 64 * _MIB


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


def test_grabbed_memory_is_held_and_looked_at_before_it_is_released(place: Path) -> None:
    with Workload(place) as asked:
        for _ in range(2):
            grabbed = {"bytes": 8 * _MIB + 4096}
            assert asked.ask("grab", timeout_s=60, bytes=8 * _MIB + 4096) == grabbed
            assert asked.ask("grab", timeout_s=60, bytes=_MIB) == grabbed, "it has that already"
            assert asked.ask("release", timeout_s=60) == {"wrong": False}
            assert asked.ask("release", timeout_s=60) == {"wrong": False}


def test_what_somebody_else_wrote_into_grabbed_memory_is_found(place: Path) -> None:
    with Workload(place) as asked:
        asked.ask("rate", bytes_s=0)  # no other children
        asked.ask("grab", timeout_s=60, bytes=_HOARD_BYTES)
        assert _spoilt(str(place)) == 1
        assert asked.ask("release", timeout_s=60) == {"wrong": True}
        assert asked.ask("grab", timeout_s=60, bytes=_MIB) == {"bytes": _MIB}
        assert asked.ask("release", timeout_s=60) == {"wrong": False}


def _spoilt(named: str) -> int:
    """A byte is changed in the hoard of each process that has one; returns how many have."""
    found = 0
    for pid in processes_naming(named):
        for low, high in re.findall("^([0-9a-f]+)-([0-9a-f]+) rw-p", _maps(pid), re.MULTILINE):
            if int(high, 16) - int(low, 16) >= _HOARD_BYTES:  # it may go on with older mappings
                with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                    memory.seek(int(low, 16) + _HOARD_BYTES // 2)
                    memory.write(b"spoilt")
                found += 1
    return found


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_memory_that_is_not_there_cannot_be_grabbed(place: Path) -> None:
    with Workload(place) as asked:
        with pytest.raises(LabError, match="the child ended"):
            asked.ask("grab", timeout_s=60, bytes=1 << 46)
        assert asked.ask("grab", timeout_s=60, bytes=_MIB) == {"bytes": _MIB}
        asked.ask("release", timeout_s=60)


def test_where_no_agent_is_none_gets_a_signal(place: Path) -> None:
    with Workload(place) as asked:
        assert asked.ask("agent", signal=0) == {"agents": 0}


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
