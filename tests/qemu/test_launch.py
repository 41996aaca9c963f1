"""Launch: from a command line with placeholders to a QEMU that runs on RAM of ours, or to why it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from migd.errors import ConfigError
from migd.guest.control import Block
from migd.lab.emulators import Emulator
from migd.qemu.inventory import examine
from migd.qemu.launch import PLACEHOLDERS, Launch
from migd.qemu.machine import QemuMachine
from migd.qemu.monitor import Monitor
from migd.ram import soft_dirty
from migd.ram.block import BlockShape, RamBlock
from tests.support.qemu import FIRST_WORDS, WAIT_S, await_ticks

PAGES = 16384
RAM = (Block("ram", PAGES),)
BACKEND = ("-object", "memory-backend-file,id=ram,size={ram_bytes},mem-path={ram},share=on")


def launch(directory: Path, *command: str, incoming: bool = False) -> Launch:
    return Launch("vm1", command, directory, incoming)


@contextmanager
def ram_fds(*pages: int) -> Iterator[list[int]]:
    """RAM as a daemon makes it."""
    fds = [RamBlock.create(BlockShape("ram", count)).fd for count in pages or (PAGES,)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


# -- the command line -----------------------------------------------------------------------------------


def test_placeholders_are_filled_in_and_a_monitor_is_added(tmp_path: Path) -> None:
    words = (
        "qemu",
        "-name",
        "{name}",
        *BACKEND,
        "-m",
        "{ram_bytes}",
        "path={hints}",
        "-pidfile",
        "{dir}/pid",
    )
    assert launch(tmp_path, *words).argv(RAM, [7]) == [
        *("qemu", "-name", "vm1"),
        *("-object", "memory-backend-file,id=ram,size=67108864B,mem-path=/proc/self/fd/7,share=on"),
        *("-m", "67108864B", f"path={tmp_path}/hints", "-pidfile", f"{tmp_path}/pid"),
        *("-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"),
    ]
    assert set(PLACEHOLDERS) == {"{name}", "{ram}", "{ram_bytes}", "{dir}", "{hints}"}


def test_a_guest_that_arrives_is_waited_for(tmp_path: Path) -> None:
    argv = launch(tmp_path, "qemu", "{ram}", incoming=True).argv(RAM, [7])
    assert argv[-3:] == ["-incoming", "defer", "-S"]


def test_of_several_blocks_each_is_named(tmp_path: Path) -> None:
    blocks = (Block("m0", 256), Block("m1", 512))
    command = launch(tmp_path, "qemu", "{ram:m1}={ram_bytes:m1}", "{ram:m0}={ram_bytes:m0}", "{ram_bytes}")
    assert command.argv(blocks, [7, 8])[1:4] == [
        "/proc/self/fd/8=2097152B",
        "/proc/self/fd/7=1048576B",
        "{ram_bytes}",  # of which?
    ]
    with pytest.raises(ConfigError, match=r"the QEMU command has no \{ram\}"):
        launch(tmp_path, "qemu", "{ram}", "{ram:m2}").argv(blocks, [7, 8])


def test_braces_that_are_none_of_ours_stay(tmp_path: Path) -> None:
    argv = launch(tmp_path, "qemu", "{ram}", '{"driver":"null-co"}', "{other}", "{{name}}").argv(RAM, [7])
    assert argv[2:5] == ['{"driver":"null-co"}', "{other}", "{vm1}"]


def test_a_command_without_a_place_for_the_ram_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \{ram\}: -object memory-backend-file,...,mem-path=\{ram\}"):
        launch(tmp_path, "qemu", "-m", "64M").argv(RAM, [7])


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_a_directory_whose_path_is_too_long_for_a_socket_is_refused(length: int, fits: bool) -> None:
    directory = Path("/" + "d" * (length - len("//qmp")))
    command = launch(directory, "qemu", "{ram}")
    assert len(str(command.qmp)) == length
    if fits:
        command.argv(RAM, [7])
    else:
        with pytest.raises(
            ConfigError, match=r"/qmp: too long for a socket; choose a shorter daemon.runtime_dir"
        ):
            command.argv(RAM, [7])


# -- the process ----------------------------------------------------------------------------------------


@contextmanager
def started(command: Launch, fds: Sequence[int]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    process, untracked = command.start(RAM, fds)
    try:
        yield process, untracked
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("incoming", [False, True], ids=["begins here", "arrives"])
async def test_a_qemu_runs_on_the_ram_that_it_is_given(
    emulator: Emulator, place: Path, incoming: bool
) -> None:
    words = (
        *emulator.command,
        *FIRST_WORDS,
        "-m",
        "{ram_bytes}",
        *BACKEND,
        "-machine",
        "pc,memory-backend=ram",
    )
    command = launch(place / "qemu-vm1", *words, incoming=incoming)
    with ram_fds() as fds, started(command, fds) as (process, untracked):
        monitor = await Monitor.connect(command.qmp, WAIT_S, retry=True)
        machine = await QemuMachine.adopt(monitor, blocks=RAM, fds=[os.dup(fd) for fd in fds])
        assert machine.process.pid == process.pid == monitor.listener_pid
        assert (await examine(monitor)).run_state == ("inmigrate" if incoming else "running")
        if not incoming:
            await_ticks(fds[0])
        if not untracked:
            assert machine.tracking() == "userfaultfd"
        elif not soft_dirty.supported():
            assert machine.tracking().startswith("compare: ")
        assert command.directory.stat().st_mode & 0o777 == 0o700
        machine.close()
        await monitor.close()


def test_where_the_library_cannot_be_built_qemu_runs_without_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("CC", "/nonexistent/cc")
    script = "import os; print(os.environ.get('LD_PRELOAD'))"
    command = launch(place / "q", sys.executable, "-c", script, "{ram}")
    with ram_fds() as fds, started(command, fds) as (process, untracked):
        assert "CC=/nonexistent/cc is no program" in untracked
        process.wait(WAIT_S)
        assert command.log.read_text() == f"{os.environ.get('LD_PRELOAD')}\n"


def test_what_a_predecessor_left_is_cleared_away(place: Path) -> None:
    directory = place / "q"
    (directory / "tpm").mkdir(parents=True)
    (directory / "tpm" / "state").write_text("of a device")
    (directory / "qmp").write_text("a socket")
    (directory / "log").write_text("an old log")
    (directory / "hints").symlink_to("/nowhere")
    command = launch(directory, sys.executable, "-c", "print('new')", "{ram}")
    with ram_fds() as fds, started(command, fds) as (process, _):
        process.wait(WAIT_S)
        assert command.log.read_text() == "new\n"
        assert [path.name for path in directory.iterdir()] == ["log"]


def test_a_program_that_is_not_there_is_named(place: Path) -> None:
    with ram_fds() as fds:
        with pytest.raises(ConfigError, match="qemu-system-nowhere: No such file or directory"):
            launch(place / "q", "qemu-system-nowhere", "{ram}").start(RAM, fds)
        with pytest.raises(ConfigError, match=f"{place}: Permission denied"):
            launch(place / "q", str(place), "{ram}").start(RAM, fds)


def test_a_directory_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "q").write_text("a file")
    with ram_fds() as fds, pytest.raises(ConfigError, match=rf"{place}/q: File exists"):
        launch(place / "q", "true", "{ram}").start(RAM, fds)


LAST_WORDS = [
    ("import sys; sys.exit('first\\nqemu: -x: invalid option\\n')", "1: qemu: -x: invalid option"),
    ("import os; os.kill(os.getpid(), 9)", "-9: it said nothing"),
    ("import os; os.write(2, b'\\xff\\xfe\\n\\n'); os._exit(3)", "3: \ufffd\ufffd"),
]


@pytest.mark.parametrize(("script", "said"), LAST_WORDS, ids=["with a reason", "without", "with noise"])
def test_the_last_words_of_a_qemu_are_told(place: Path, script: str, said: str) -> None:
    command = launch(place / "q", sys.executable, "-c", script, "{ram}")
    with ram_fds() as fds, started(command, fds) as (process, _):
        process.wait(WAIT_S)
        assert str(command.died(process)) == f"QEMU ended with code {said} (all of it in {command.log})"


def test_what_is_of_no_more_use_is_cleared_away(place: Path) -> None:
    command = launch(place / "q", "true", "{ram}")
    with ram_fds() as fds, started(command, fds) as (process, _):
        process.wait(WAIT_S)
    command.clear()
    assert not command.directory.exists()
    command.clear()
