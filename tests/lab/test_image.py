"""The guest image: its archives, and that it boots under every QEMU there is, and lives."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from migd.lab.debian import LabUnavailable, built_once
from migd.lab.emulators import Emulator, emulators
from migd.lab.image import Archive, Image, image
from migd.lab.workbench import Booted, LabError, Recipe, boot
from tests.support import absence

pytestmark = pytest.mark.timeout(600)  # the first one downloads packages

_MIB = 1 << 20


def _entries(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Name, mode and content of all entries of archives that follow each other, ends included."""
    found = []
    at = 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + start : at + start + 8], 16) for start in range(6, 110, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = at + 110 + name_size + -(110 + name_size) % 4
        found.append((name, mode, archive[start : start + size]))
        at = start + size + -size % 4
    assert at == len(archive)
    return found


def _example() -> bytes:
    archive = Archive()
    archive.file("usr/bin/tool", b"#!", executable=True)
    archive.file("usr/bin/odd", b"12345")
    archive.link("bin", "usr/bin")
    archive.directory("usr")
    return archive.finished()


def test_an_archive_holds_what_was_put_in() -> None:
    assert _entries(_example()) == [
        ("usr", stat.S_IFDIR | 0o755, b""),
        ("usr/bin", stat.S_IFDIR | 0o755, b""),
        ("usr/bin/tool", stat.S_IFREG | 0o755, b"#!"),
        ("usr/bin/odd", stat.S_IFREG | 0o644, b"12345"),
        ("bin", stat.S_IFLNK | 0o777, b"usr/bin"),
        ("TRAILER!!!", 0, b""),
    ]


def test_the_same_entries_give_the_same_bytes_and_archives_can_follow_each_other() -> None:
    assert _example() == _example()
    assert len(_entries(_example() * 2)) == 12


def test_what_is_built_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "thing"

    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise LabUnavailable("no network")

    def work(directory: Path) -> None:
        (directory / "whole").touch()

    with pytest.raises(LabUnavailable, match="no network"):
        built_once(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert built_once(target, work) == target
    assert built_once(target, fail) == target
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_paths_with_commas_and_placeholders_reach_the_command_line() -> None:
    recipe = Recipe(Emulator((10, 0, 2), ("qemu",)), Image(Path("k"), Path("i")), "q35", 64 * _MIB, ("a=b",))
    argv = recipe.argv("/r,am", "{qmp}", "{hints}", "{lab}", "{console}")
    assert argv[0] == "qemu"
    assert "memory-backend-file,id=ram,size=64M,mem-path=/r,,am,share=on" in argv
    assert "socket,id=lab,path={lab},server=on,wait=off" in argv
    assert "unix:{qmp},server=on,wait=off" in argv
    assert "console=ttyS0 panic=-1 no_timer_check a=b" in argv


@pytest.fixture(scope="module")
def guest_image() -> Image:
    try:
        return image({"migd/extra": b"an extra file"})
    except LabUnavailable as error:
        absence.skip(str(error))


@pytest.fixture(scope="module")
def found_emulators() -> list[Emulator]:
    try:
        return emulators()
    except LabUnavailable as error:
        absence.skip(str(error))


def _live(guest: Booted, hog_bytes: int) -> None:
    guest.await_ready()
    guest.workload.ask("hog", 60, bytes=hog_bytes)
    assert guest.workload.ask("check", 30) == {"pages": 2048, "wrong": 0, "first_wrong": None}
    status = guest.workload.ask("status")
    assert status["mem_free_bytes"] > hog_bytes, "the hog's memory is free again"
    failures = ("fork_failures", "file_failures", "clock_failures", "kernel_complaints")
    assert {name: status[name] for name in failures} == dict.fromkeys(failures, 0), status


def test_a_guest_boots_under_each_emulator_and_nothing_is_left(
    guest_image: Image, found_emulators: list[Emulator]
) -> None:
    for emulator, machine in zip(found_emulators, ("pc", "q35"), strict=False):
        recipe = Recipe(emulator, guest_image, machine, 256 * _MIB, ("migd.agent=off",), balloon=True)
        with boot(recipe) as guest:
            _live(guest, 96 * _MIB)
            assert any("Linux version" in line for line in guest.console.read_text().splitlines())
        assert not guest.console.parent.exists()
        assert not Path(f"/proc/{guest.pid}").exists()


def test_a_qemu_that_does_not_start_says_why(guest_image: Image, found_emulators: list[Emulator]) -> None:
    recipe = Recipe(found_emulators[0], guest_image, machine="toaster")
    with pytest.raises(LabError, match="unsupported machine type"), boot(recipe) as guest:
        guest.await_ready()


@pytest.mark.parametrize("own", ["migd/workload.py", "init", "migd/extra"])
def test_the_files_that_change_are_in_the_second_archive(guest_image: Image, own: str) -> None:
    content = guest_image.initrd.read_bytes()
    names = [name for name, _, _ in _entries(content)]
    assert own in names[names.index("TRAILER!!!") :]


def test_cpio_reads_it(guest_image: Image, tmp_path: Path) -> None:
    """The cpio of the guest's own busybox: a reader that is not ours."""
    entries = _entries(guest_image.initrd.read_bytes())
    busybox = tmp_path / "busybox"
    busybox.write_bytes(next(content for name, _, content in entries if name == "usr/bin/busybox"))
    busybox.chmod(0o700)
    listed = subprocess.run((busybox, "cpio", "-t"), input=_example(), check=True, capture_output=True)
    assert listed.stdout.split() == [b"usr", b"usr/bin", b"usr/bin/tool", b"usr/bin/odd", b"bin"]
