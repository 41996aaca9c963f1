"""Guests in every kind of RAM, in several blocks, and in image files, moved live: 0 wrong pages each time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from migd.migration.stats import Result
from migd.ram.bitmap import PageBitmap
from tests.e2e.test_migrate import assert_accounted, assert_moved
from tests.support.huge_pages import hugetlbfs, reserved
from tests.support.pair import DaemonPair, GuestProcess, daemon_pair, eventually, finish, migd

PAGE = 4096
HUGE_COUNT = 20
"""Of huge pages: 16 MiB for the guest here, as much there, and some to spare."""


def ram(kind: str | Path) -> str:
    return f'[daemon]\nram = "{kind}"\n'


@pytest.fixture(params=["memfd and hugetlb", "tmpfs and hugetlbfs"])
def kinds(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[DaemonPair, list[Path]]]:
    """A pair whose two daemons give RAM of different kinds, and their RAM directories."""
    with ExitStack() as stack:
        stack.enter_context(reserved(HUGE_COUNT))
        directories: list[Path] = []
        if request.param == "tmpfs and hugetlbfs":
            there = stack.enter_context(hugetlbfs(tmp_path, HUGE_COUNT))
            here = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-"))
            directories = [Path(here), there]
        first, second = directories or ("memfd", "hugetlb")
        pair = stack.enter_context(daemon_pair(source=ram(first), destination=ram(second), serve=True))
        yield pair, directories


def test_it_moves_from_one_kind_to_the_other_and_back(kinds: tuple[DaemonPair, list[Path]]) -> None:
    """Live both ways, so each kind is tracked, read and written."""
    pair, directories = kinds
    guest = pair.guest(ram="16Mi", workload="hog", rate="20M")
    for directory in directories[:1]:
        (file,) = directory.iterdir()
        assert file.name.startswith(f"migd-{guest.name}-ram-")
    result = pair.migrate(guest.name).result
    assert_moved(pair, guest, result)
    assert_accounted(result)
    for directory, files in zip(directories, [0, 1], strict=False):
        eventually(
            lambda at=directory, n=files: len(list(at.iterdir())) == n, f"{files} files in {directory}"
        )
    back = pair.back(guest.name).result
    assert_accounted(back)
    for moved in (result, back):
        assert (moved.outcome, moved.wrong_pages, moved.rescued_pages) == ("completed", 0, 0)
        assert (moved.dirty_log, moved.hints) == ("userfaultfd", "used")
    pair.discard(guest.name)
    for directory in directories:
        eventually(lambda at=directory: not list(at.iterdir()), f"an empty {directory}")


def test_a_destination_without_huge_pages_says_where_to_get_some() -> None:
    with daemon_pair(destination=ram("hugetlb")) as pair:
        guest = pair.guest(ram="16Mi", workload="idle")
        output = pair.migrate(guest.name)
        assert output.exit_code == 3
        assert "16 MiB of guest RAM wanted, 0 MiB can be given" in output.result.error
        assert "/proc/sys/vm/nr_hugepages" in output.result.error
        odd = pair.guest(ram="16388Ki", workload="idle")
        assert pair.migrate(odd.name).exit_code == 3
        for still in (guest, odd):
            here = pair.source.guest(still.name)
            assert here is not None
            assert here.state == "running"


def test_a_daemon_with_an_impossible_directory_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "migd.toml"
    config.write_text(ram("/nowhere"))
    output = migd("source", "--config", config, "--runtime-dir", tmp_path / "run")
    assert output.exit_code == 2
    assert "daemon.ram: /nowhere: No such file" in output.complaint


# -- several blocks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(held=True) as pair:
        yield pair


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        ("4100Ki,12Mi", {"workload": "churn"}),
        ("28Ki,9Mi,4Ki", {"workload": "hog", "contract": "zero"}),
        ("1028Ki,8Mi,7Mi", {"workload": "write-heavy", "rate": "100M"}),
    ],
    ids=["churn", "hog", "write-heavy"],
)
def test_blocks_of_odd_sizes_arrive_whole(pair: DaemonPair, blocks: str, options: dict[str, str]) -> None:
    guest = pair.guest(ram=blocks, live="0.4", **options)
    result = pair.migrate(guest.name, "--downtime-limit", "5").result
    assert_moved(pair, guest, result)
    assert_accounted(result)
    assert (
        result.ram_pages
        == sum(int(size[:-2]) * (1 if size[-2:] == "Ki" else 1024) for size in blocks.split(",")) // 4
    )
    assert result.hints == "used"
    assert result.hints_rejected == 0
    assert result.hints_applied > 0
    pair.discard(guest.name)


def test_blocks_come_back_after_a_restart_and_go_with_their_guest() -> None:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-") as directory,
        daemon_pair(source=ram(directory)) as pair,
    ):
        guest = pair.guest(ram="5Mi,3Mi", workload="churn")
        pair.source.kill()
        pair.source.restart()
        eventually(lambda: pair.source.guest(guest.name), "the guest to come back")
        assert len(os.listdir(directory)) == 2
        assert_moved(pair, guest, pair.migrate(guest.name).result)
        eventually(lambda: not os.listdir(directory), "the RAM files to go with their guest")


# -- images ---------------------------------------------------------------------------------------------

IMAGE_PAGES = 3001
DATA = [(0, 40), (300, 1500), (2990, 3001)]
FREE = [(10, 20), (400, 1400), (2000, 2500), (3000, 3001)]


class Image:
    """A sparse image with a bitmap, as files."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ram.img"
        self.bitmap = directory / "free.bits"
        self.free = PageBitmap.from_runs(IMAGE_PAGES, FREE)
        self.bitmap.write_bytes(self.free.to_bytes())
        with self.path.open("wb") as file:
            file.truncate(IMAGE_PAGES * PAGE)
            for start, stop in DATA:
                file.seek(start * PAGE)
                file.write(os.urandom((stop - start) * PAGE))

    def arrived_at(self, pid: int) -> None:
        """The RAM of an arrived guest is the file, but zero where the file's pages are free."""
        expected = bytearray(self.path.read_bytes())
        for start, stop in FREE:
            expected[start * PAGE : stop * PAGE] = bytes((stop - start) * PAGE)
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(entry).startswith("/memfd:migd-ram"):
                assert entry.read_bytes() == expected
                return
        raise AssertionError(f"process {pid} has no RAM")


@pytest.fixture(params=["disk", "tmpfs"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Image]:
    if request.param == "disk":
        yield Image(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="migd-test-") as directory:
        yield Image(Path(directory))


def assert_image_moved(pair: DaemonPair, guest: GuestProcess, result: Result, free_pages: int) -> None:
    assert_moved(pair, guest, result)
    assert_accounted(result)
    assert (result.ram_pages, result.dirty_log) == (IMAGE_PAGES, "none (image)")
    assert result.checked_pages == IMAGE_PAGES - free_pages
    assert result.skipped_free_pages == free_pages
    assert result.resent_pages == 0


def test_an_image_is_served_where_it_lies(pair: DaemonPair, image: Image) -> None:
    before = (image.path.read_bytes(), image.path.stat().st_mtime_ns, image.path.stat().st_blocks)
    guest = pair.guest(ram="", image=image.path, free=image.bitmap)
    assert " idle, " in guest.log
    result = pair.migrate(guest.name, "--verify", "strict").result
    assert_image_moved(pair, guest, result, image.free.count())
    arrived = pair.destination.guest(guest.name)
    assert arrived is not None
    image.arrived_at(arrived.pid)
    assert (image.path.read_bytes(), image.path.stat().st_mtime_ns, image.path.stat().st_blocks) == before
    pair.discard(guest.name)


@pytest.mark.parametrize("image", ["disk"], indirect=True)
def test_an_image_without_a_bitmap_arrives_whole(pair: DaemonPair, image: Image) -> None:
    guest = pair.guest(ram="", image=image.path)
    result = pair.migrate(guest.name).result
    assert_image_moved(pair, guest, result, 0)
    assert result.hole_pages == IMAGE_PAGES - sum(stop - start for start, stop in DATA)
    pair.discard(guest.name)


@pytest.mark.parametrize("image", ["tmpfs"], indirect=True)
def test_a_page_that_is_free_is_not_sent_whatever_it_holds(pair: DaemonPair, image: Image) -> None:
    """Also for a guest that was there before its daemon."""
    guest = pair.guest(ram="", image=image.path, free=image.bitmap, contract="zero")
    pair.source.kill()
    pair.source.restart()
    eventually(lambda: pair.source.guest(guest.name), "the guest to come back")
    result = pair.migrate(guest.name, "--paused").result
    assert_moved(pair, guest, result)
    data = PageBitmap.from_runs(IMAGE_PAGES, DATA)
    assert result.sent_pages == (data - image.free).count()
    pair.discard(guest.name)


@pytest.mark.parametrize("page", [350, 2600], ids=["data", "a hole"])
@pytest.mark.parametrize("image", ["disk"], indirect=True)
def test_a_write_to_the_image_meanwhile_is_found(pair: DaemonPair, image: Image, page: int) -> None:
    """No log sees it, since no mapping of the guest's does: the tracking verification has to."""
    guest = pair.guest(ram="", image=image.path, free=image.bitmap)
    tag = f"written-{page}"
    pair.source.hold("pausing", tag)
    migration = pair.start_migration(guest.name, "--verify", "strict")
    pair.source.wait_held(tag)
    with image.path.open("r+b") as file:
        was = os.pread(file.fileno(), 1, page * PAGE)
        os.pwrite(file.fileno(), bytes([was[0] ^ 1]), page * PAGE)
    pair.source.release(tag)
    assert finish(migration).exit_code == 5
    here = pair.source.guest(guest.name)
    assert here is not None
    assert here.state == "running"
    os.truncate(image.path, IMAGE_PAGES * PAGE)
    with image.path.open("r+b") as file:
        os.pwrite(file.fileno(), was, page * PAGE)
    assert_moved(pair, guest, pair.migrate(guest.name).result)
    pair.discard(guest.name)


def test_an_image_that_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    output = migd("guest", "--name", "vm1", "--image", tmp_path / "none")
    assert output.exit_code == 2
    assert f"--image {tmp_path}/none: No such file" in output.complaint
    output = migd("guest", "--name", "vm1", "--ram", "1Mi,2")
    assert output.exit_code == 2
    assert "--ram: 2 bytes is not a positive multiple" in output.complaint
