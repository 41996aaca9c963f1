"""What the doctor says of a runtime directory: whose, on what, how full and how fast."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migd.doctor import directory
from migd.doctor.finding import Finding, Level
from tests.doctor.reading import FAIL, OK, WARN


def ownership(path: Path) -> Finding:
    return next(directory.examine(path))


def test_a_directory_that_is_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert (ownership(tmp_path).level, ownership(tmp_path).found) == (OK, "ours, mode 0700")


def test_a_directory_that_others_can_look_into(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert (ownership(tmp_path).level, ownership(tmp_path).found) == (WARN, "mode 0755")


def test_a_directory_that_can_be_made(tmp_path: Path) -> None:
    found = ownership(tmp_path / "a" / "b")
    assert (found.level, found.found) == (OK, f"not there yet, can be made in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x" * 100, "bytes, the kernel takes 107"),
        ("file", "not a directory of this user"),
        ("link", "not a directory of this user"),
        ("file/below", "Not a directory"),
    ],
)
def test_what_is_no_runtime_directory(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = ownership(tmp_path / name)
    assert found.level is FAIL
    assert text in found.found


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
@pytest.mark.parametrize(
    ("whose", "text"), [("itself", "not a directory of this user"), ("parent", "another user")]
)
def test_a_directory_of_another_user(tmp_path: Path, whose: str, text: str) -> None:
    path = tmp_path / "parent" / "source"
    path.mkdir(parents=True)
    os.chown(path.parent if whose == "parent" else path, 12345, -1)
    assert text in ownership(path).found


@pytest.mark.parametrize(
    ("above", "level", "text"),
    [("/dev/shm", WARN, "on tmpfs"), ("/tmp", WARN, ""), ("/var/tmp", OK, "on a disk, outlives a reboot")],
)
def test_what_a_journal_outlives(above: str, level: Level, text: str) -> None:
    with tempfile.TemporaryDirectory(prefix="migd-d-", dir=above) as place:
        _, found, *_ = directory.examine(Path(place))
    if above == "/var/tmp" and found.found == "on tmpfs":
        pytest.skip("there is no disk here")
    assert found.level is level
    assert text in found.found
    assert level is OK or "a reboot loses it" in found.meaning


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / str(len(mounted))
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.getuid() or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ("size=512k", FAIL), ("size=8m", WARN), ("size=64m", OK),
        ("size=64m,nr_inodes=6", FAIL), ("size=64m,nr_inodes=90", WARN),
    ],
)  # fmt: skip
def test_room_for_the_journal(tiny: Callable[[str], Path], options: str, level: Level) -> None:
    (found,) = [finding for finding in directory.examine(tiny(options)) if "files free" in finding.found]
    assert found.level is level


def test_how_long_a_record_takes_is_measured(tmp_path: Path) -> None:
    assert directory.sync_s(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("durable_s", "level"), [(0.0001, OK), (0.010, OK), (0.011, WARN), (2.0, WARN)])
def test_a_slow_disk_is_downtime(durable_s: float, level: Level) -> None:
    found = directory.disk_speed("journal", durable_s)
    assert found.level is level
    assert level is OK or f"{5 * durable_s * 1e3:.0f} ms if both are as slow" in found.meaning
