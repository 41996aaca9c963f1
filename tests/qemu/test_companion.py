"""The companion as the process that it is, beside real QEMUs, for a real registry and for real daemons."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from migd import api
from migd.errors import GuestError, LiveUnsupported, Refused
from migd.guest.control import GuestState
from migd.guest.hosted import HostedGuest
from migd.lab.emulators import Emulator
from migd.qemu.monitor import Monitor
from migd.ram import soft_dirty
from migd.ram.block import BlockShape
from tests.guest_daemon import scripted
from tests.guest_daemon.scripted import MIGRATION, House, house
from tests.qemu.test_machine import as_found, configure, other_writer
from tests.support.companion_nursery import Forked, Nursery
from tests.support.pair import eventually
from tests.support.qemu import (
    FIRST_WORDS,
    HINT_PORT,
    RAM_BYTES,
    WAIT_S,
    Hatchery,
    Qemu,
    await_ticks,
    children_of,
    everything_ended,
    is_alive,
    processes,
    ram_of,
    ticks,
)

PAGES = RAM_BYTES // 4096
SHAPES = (BlockShape("ram", PAGES),)
INCOMING = ("-incoming", "defer", "-S")
MIGD = (sys.executable, "-m", "migd")


def words(emulator: Emulator, *more: str) -> list[str]:
    """The command of a QEMU on RAM that a daemon makes."""
    return [
        *emulator.command,
        *FIRST_WORDS,
        *("-m", "{ram_bytes}"),
        *("-object", "memory-backend-file,id=ram,size={ram_bytes},mem-path={ram},share=on"),
        *("-machine", "pc,memory-backend=ram"),
        *more,
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        await scripted.until(condition)


@dataclass(frozen=True)
class Standing:
    """A companion and what it has said."""

    process: Forked

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        return self.process.log.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        return self.process.exit_code

    async def ended(self) -> int:
        await until(lambda: self.exit_code is not None)
        assert self.exit_code is not None
        return self.exit_code

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Stage:
    """Starts companions in one directory, where the registry's socket is."""

    def __init__(self, directory: Path, environment: dict[str, str], nursery: Nursery) -> None:
        self.directory = directory
        self.socket = directory / "guest.sock"
        self.environment = environment
        self._nursery = nursery
        self._started: list[Standing] = []

    def beside(self, qemu: Qemu, *, orphan_s: float | None = None) -> Standing:
        return self.companion("--qmp", str(qemu.qmp), orphan_s=orphan_s)

    def companion(self, *more: str, name: str = "vm1", orphan_s: float | None = None) -> Standing:
        arguments = ["qemu", "--name", name, "--socket", str(self.socket), *more]
        log = self.directory / f"companion-{len(self._started)}"
        process = self._nursery.fork(log, arguments, self.environment, orphan_s)
        self._started.append(Standing(process))
        return self._started[-1]

    def close(self) -> None:
        for standing in self._started:
            standing.process.kill()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def stage(place: Path, nursery: Nursery) -> Iterator[Stage]:
    directory = place / "d"
    directory.mkdir()
    with everything_ended() as environment:
        made = Stage(directory, environment, nursery)
        try:
            yield made
        finally:
            made.close()


async def attached(home: House, state: GuestState = GuestState.RUNNING, name: str = "vm1") -> HostedGuest:
    await until(lambda: name in home.registry.guests and home.registry.guests[name].has_attached)
    hosted = home.registry.guests[name]
    assert hosted.state is state
    return hosted


async def gone(*pids: int) -> None:
    await until(lambda: not any(is_alive(pid) for pid in pids))


async def state_of(qemu: Qemu) -> tuple[str, tuple[Any, ...]]:
    """Nobody is beside it."""
    async with qemu.monitor() as monitor:
        return (await monitor.ask("query-status"))["status"], await as_found(monitor)


# -- beside a QEMU that is there ------------------------------------------------------------------------


async def test_a_qemu_that_runs_becomes_a_guest(qemus: Hatchery, stage: Stage, emulator: Emulator) -> None:
    qemu = qemus.start(*HINT_PORT, "-qmp", "unix:{dir}/other,server=on,wait=off")
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        said = hosted.description
        assert said is not None
        assert (said.pid, said.kind) == (qemu.pid, str(emulator))
        assert hosted.opaque
        assert hosted.ram.shapes == SHAPES
        assert os.path.samestat(os.fstat(hosted.ram.blocks[0].fd), qemu.ram.stat())
        await hosted.pause(MIGRATION)
        assert hosted.state is GuestState.PAUSED
        assert len(await hosted.save()) < RAM_BYTES
        await hosted.resume()
        await_ticks(qemu.ram, ticks(qemu.ram))
        assert f"guest vm1 ready: {emulator}, running, writes found by " in standing.said
        assert "no port" not in standing.said
        other = await Monitor.connect(qemu.directory / "other", WAIT_S)
        assert await port_is_taken(other)
        await standing.kill()
        assert not await port_is_taken(other)
        await other.close()


async def port_is_taken(monitor: Monitor) -> bool:
    """Whether somebody is connected to the hint port."""
    chardevs = {chardev["label"]: chardev["filename"] for chardev in await monitor.ask("query-chardev")}
    return not chardevs["hints"].startswith("disconnected:")


async def test_without_a_hint_port_it_says_so(new_qemus: Hatchery, stage: Stage) -> None:
    async with house(stage.directory) as home:
        standing = stage.beside(new_qemus.start())
        await attached(home)
        assert "QEMU has no port org.migd.hints.0: its guest cannot say which pages are free" in standing.said


async def test_its_writes_are_found_by_the_daemon(
    new_qemus: Hatchery, stage: Stage, tracked: dict[str, str]
) -> None:
    qemu = new_qemus.start(environment=tracked)
    async with house(stage.directory) as home:
        stage.beside(qemu)
        hosted = await attached(home)
        assert hosted.description is not None
        assert hosted.description.tracking == "userfaultfd"
        log = await hosted.arm()
        await log.harvest()
        await_ticks(qemu.ram, await_ticks(qemu.ram))
        assert 0 in await log.harvest()
        with (
            other_writer(qemu.ram),
            pytest.raises(LiveUnsupported, match="others may write to the guest's RAM"),
        ):
            await hosted.arm()
        log.close()


async def test_what_cannot_be_tracked_is_told_from_what_cannot_be_moved(
    new_qemus: Hatchery, stage: Stage, tracked: dict[str, str]
) -> None:
    if soft_dirty.supported():
        pytest.skip("this kernel has soft-dirty marks")
    plain, stopped = new_qemus.start(), new_qemus.start("-S", environment=tracked)
    async with house(stage.directory) as home:
        stage.companion("--qmp", str(plain.qmp), name="plain")
        stage.companion("--qmp", str(stopped.qmp), name="stopped")
        with pytest.raises(LiveUnsupported, match="QEMU was started without the preload"):
            await (await attached(home, name="plain")).arm()
        with pytest.raises(Refused, match="QEMU says the guest is prelaunch: have it run first"):
            await (await attached(home, name="stopped")).arm()


async def test_it_comes_back_to_a_daemon_that_was_away_and_sets_qemus_settings_back_meanwhile(
    new_qemus: Hatchery, stage: Stage, tracked: dict[str, str]
) -> None:
    qemu = new_qemus.start(environment=tracked)
    async with qemu.monitor() as monitor:
        await configure(monitor)
        before = await as_found(monitor)
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        (await hosted.arm()).close()
        await hosted.disarm()
        log = await hosted.arm()
    log.close()
    async with house(stage.directory) as home:  # another daemon
        hosted = await attached(home)
        assert os.path.samestat(os.fstat(hosted.ram.blocks[0].fd), qemu.ram.stat())
        assert home.returned == [hosted]
        await standing.kill()
    assert await state_of(qemu) == ("running", before)


async def test_a_paused_guest_stays_so_when_its_daemon_dies_and_the_next_one_decides(
    new_qemus: Hatchery, stage: Stage
) -> None:
    qemu = new_qemus.start()
    async with house(stage.directory) as home:
        stage.beside(qemu)
        hosted = await attached(home)
        await_ticks(qemu.ram)
        await hosted.pause(MIGRATION)
    stands_at = ticks(qemu.ram)
    await asyncio.sleep(0.15)
    assert ticks(qemu.ram) == stands_at
    async with house(stage.directory) as home:
        hosted = await attached(home, GuestState.PAUSED)
        assert hosted.migration == MIGRATION
        await until(lambda: hosted in home.returned)
        await hosted.resume()
        await_ticks(qemu.ram, stands_at)


# -- killed, and another one comes ----------------------------------------------------------------------


async def test_a_guest_runs_on_without_its_companion_and_the_next_one_sets_back_what_it_left(
    qemus: Hatchery, stage: Stage, tracked: dict[str, str]
) -> None:
    qemu = qemus.start(environment=tracked)
    async with qemu.monitor() as monitor:
        await configure(monitor)
        before = await as_found(monitor)
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        log = await hosted.arm()
        await asyncio.sleep(0.05)  # its settings are migd's now
        await standing.kill()
        await asyncio.wait_for(hosted.lost(), WAIT_S)
        log.close()
        await_ticks(qemu.ram, ticks(qemu.ram))
        again = stage.beside(qemu)
        hosted = await attached(home)
        assert hosted.pid == qemu.pid
        again.signal(signal.SIGTERM)
        assert await again.ended() == 0
    assert await state_of(qemu) == ("running", before)


@pytest.mark.parametrize("was_saved", [False, True], ids=["paused", "saved"])
async def test_a_guest_stays_paused_without_its_companion_and_goes_on_with_the_next_one(
    qemus: Hatchery, stage: Stage, was_saved: bool
) -> None:
    qemu = qemus.start()
    _, before = await state_of(qemu)
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        await_ticks(qemu.ram)
        await hosted.pause(MIGRATION)
        if was_saved:
            await hosted.save()
        stands_at = ticks(qemu.ram)
        await standing.kill()
        await asyncio.wait_for(hosted.lost(), WAIT_S)
        again = stage.beside(qemu)
        hosted = await attached(home, GuestState.PAUSED)
        assert hosted.migration == MIGRATION
        await until(lambda: hosted in home.returned)
        assert ticks(qemu.ram) == stands_at
        await hosted.resume()
        await_ticks(qemu.ram, stands_at)
        again.signal(signal.SIGTERM)
        assert await again.ended() == 0
    assert await state_of(qemu) == ("running", before)


async def test_a_qemu_of_its_own_outlives_it_and_is_taken_over_by_its_monitor(
    newest: Emulator, stage: Stage
) -> None:
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", *words(newest))
        hosted = await attached(home)
        await until(lambda: hosted.pid != standing.pid)
        qemu_pid = hosted.pid
        ram = hosted.ram.blocks[0].fd
        await_ticks(ram)
        await standing.kill()
        assert is_alive(qemu_pid)
        await until(lambda: not home.registry.guests)
        stage.companion("--qmp", str(stage.directory / "qemu-vm1" / "qmp"))
        hosted = await attached(home)
        assert hosted.pid == qemu_pid
        await_ticks(hosted.ram.blocks[0].fd, ticks(hosted.ram.blocks[0].fd))


# -- the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
async def test_a_qemu_of_its_own_ends_with_it_and_nothing_is_left(
    newest: Emulator, stage: Stage, number: signal.Signals, code: int
) -> None:
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", *words(newest))
        hosted = await attached(home)
        await until(lambda: hosted.pid != standing.pid)
        assert children_of(standing.pid) == [hosted.pid]
        standing.signal(number)
        assert await standing.ended() == code
        await gone(hosted.pid)
        assert not (stage.directory / "qemu-vm1").exists()
        await until(lambda: not home.registry.guests)


async def test_a_qemu_that_was_there_goes_on_after_ctrl_c_with_its_own_settings(
    qemus: Hatchery, stage: Stage, tracked: dict[str, str]
) -> None:
    qemu = qemus.start(environment=tracked)
    async with qemu.monitor() as monitor:
        await configure(monitor)
        before = await as_found(monitor)
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        log = await (await attached(home)).arm()
        await asyncio.sleep(0.05)
        standing.signal(signal.SIGINT)
        assert await standing.ended() == 130
        log.close()
    assert await state_of(qemu) == ("running", before)
    await_ticks(qemu.ram, ticks(qemu.ram))


async def test_it_ends_with_a_qemu_that_was_there(new_qemus: Hatchery, stage: Stage) -> None:
    qemu = new_qemus.start()
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        qemu.kill()
        assert await standing.ended() == 0
        await asyncio.wait_for(hosted.lost(), WAIT_S)
        await until(lambda: not home.registry.guests)


async def test_the_death_of_a_qemu_of_its_own_is_told(newest: Emulator, stage: Stage) -> None:
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", *words(newest))
        hosted = await attached(home)
        await until(lambda: hosted.pid != standing.pid)
        os.kill(hosted.pid, signal.SIGKILL)
        assert await standing.ended() == 1
        assert "guest vm1 QEMU ended with code -9: " in standing.said
        await until(lambda: not home.registry.guests)


async def test_a_guest_that_runs_elsewhere_now_ends_with_its_qemu(new_qemus: Hatchery, stage: Stage) -> None:
    qemu = new_qemus.start()
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home)
        await hosted.pause(MIGRATION)
        await hosted.release()
        assert await standing.ended() == 0
        assert qemu.wait() == 0


async def test_a_guest_does_not_end_because_qemu_is_slow_while_its_daemon_dies(
    newest: Emulator, stage: Stage
) -> None:
    """What cannot be set back now is set back later."""
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", *words(newest))
        hosted = await attached(home)
        await until(lambda: hosted.pid != standing.pid)
        qemu_pid = hosted.pid
        await hosted.pause(MIGRATION)
        await hosted.resume()
        try:
            log = await hosted.arm()
        except LiveUnsupported:
            pytest.skip("QEMU's settings are changed where writes are tracked only")
        await asyncio.sleep(0.05)
        os.kill(qemu_pid, signal.SIGSTOP)
    log.close()
    await asyncio.sleep(2.3)  # the time that one command has
    os.kill(qemu_pid, signal.SIGCONT)
    async with house(stage.directory) as home:
        hosted = await attached(home)
        assert hosted.pid == qemu_pid
        fd = hosted.ram.blocks[0].fd
        await_ticks(fd, ticks(fd))
        await hosted.disarm()
        assert standing.exit_code is None


# -- refused --------------------------------------------------------------------------------------------


async def test_a_name_that_is_taken_is_declined(new_qemus: Hatchery, stage: Stage) -> None:
    first, second = new_qemus.start(), new_qemus.start()
    _, before = await state_of(second)
    async with house(stage.directory) as home:
        stage.beside(first)
        hosted = await attached(home)
        declined = stage.beside(second)
        assert await declined.ended() == 3
        assert "guest vm1 the daemon declined: a guest named 'vm1' is attached already" in declined.said
        assert home.registry.get("vm1") is hosted
    assert await state_of(second) == ("running", before)


async def test_a_qemu_is_not_started_for_a_name_that_is_taken(
    new_qemus: Hatchery, newest: Emulator, stage: Stage
) -> None:
    async with house(stage.directory) as home:
        stage.beside(new_qemus.start())
        await attached(home)
        declined = stage.companion("--ram", "64Mi", "--", *words(newest))
        assert await declined.ended() == 3
        assert not (stage.directory / "qemu-vm1").exists()


async def test_a_qemu_that_ends_at_once_has_the_last_word(newest: Emulator, stage: Stage) -> None:
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", *words(newest, "-device", "nonsense"))
        assert await standing.ended() == 1
        assert "migd: QEMU ended with code 1: " in standing.said
        assert "'nonsense' is not a valid device model name" in standing.said
        assert str(stage.directory / "qemu-vm1" / "log") in standing.said
        await until(lambda: not home.registry.guests)


async def test_a_qemu_of_its_own_that_cannot_be_moved_ends_with_the_reason(
    newest: Emulator, stage: Stage
) -> None:
    command = words(newest, "-object", "memory-backend-ram,id=m1,size=1M")
    async with house(stage.directory):
        standing = stage.companion("--ram", "64Mi", "--", *command)
        assert await standing.ended() == 3
        assert "RAM m1 is a memory-backend-ram, no other process can read it" in standing.said
        assert children_of(standing.pid) == []


async def test_a_program_that_is_not_there_is_named(stage: Stage) -> None:
    async with house(stage.directory) as home:
        standing = stage.companion("--ram", "64Mi", "--", "qemu-system-nowhere", "{ram}")
        assert await standing.ended() == 2
        assert "qemu-system-nowhere: No such file or directory" in standing.said
        await until(lambda: not home.registry.guests)


async def test_without_a_daemon_or_a_qemu_it_does_not_begin(new_qemus: Hatchery, stage: Stage) -> None:
    qemu = new_qemus.start()
    _, before = await state_of(qemu)
    alone = stage.beside(qemu)
    assert await alone.ended() == 2
    assert f"--socket {stage.socket}: No such file or directory; is `migd source` running?" in alone.said
    assert await state_of(qemu) == ("running", before)
    qemu.kill()
    async with house(stage.directory):
        alone = stage.beside(qemu)
        assert await alone.ended() == 1
        assert f"{qemu.qmp}: no QMP there: " in alone.said


# -- arriving -------------------------------------------------------------------------------------------


async def test_a_qemu_that_waits_is_in_readiness_for_the_migration_that_comes(
    qemus: Hatchery, stage: Stage, emulator: Emulator
) -> None:
    qemu = qemus.start(*INCOMING)
    async with house(stage.directory) as home:
        standing = stage.beside(qemu)
        hosted = await attached(home, GuestState.INCOMING)
        assert hosted.in_readiness
        with pytest.raises(Refused, match="in readiness has RAM ram of 64 MiB, not ram of 32 MiB"):
            home.registry.create("vm1", MIGRATION, (BlockShape("ram", PAGES // 2),))
        assert home.registry.create("vm1", MIGRATION, SHAPES) is hosted
        await hosted.attached()
        assert hosted.description is not None
        assert hosted.description.kind == str(emulator)
        await hosted.discard()
        assert await standing.ended() == 0
        assert qemu.wait() == 0


async def test_one_that_has_run_before_is_not_ready(new_qemus: Hatchery, stage: Stage) -> None:
    qemu = new_qemus.start(*INCOMING)
    with qemu.ram.open("r+b") as file:
        file.seek(RAM_BYTES - 1)
        file.write(b"\x01")
    async with house(stage.directory) as home:
        stage.beside(qemu)
        assert (await attached(home, GuestState.INCOMING)).in_readiness
        with pytest.raises(
            Refused, match="the RAM of guest 'vm1' in readiness is not zero: start its QEMU anew"
        ):
            home.registry.create("vm1", MIGRATION, SHAPES)


def guest_command(emulator: Emulator, environment: dict[str, str], *more: str) -> list[str]:
    """As in a configuration; with the mark by which all of it is found again."""
    mark = [f"{key}={value}" for key, value in environment.items() if key not in os.environ]
    return [
        *(
            "env",
            *mark,
            *MIGD,
            "qemu",
            "--name",
            "{name}",
            "--incoming",
            "{migration}",
            "--socket",
            "{socket}",
        ),
        *("--", *words(emulator, *more)),
    ]


def qemus_in(directory: Path) -> list[int]:
    """QEMUs with a monitor there."""
    found = []
    for pid in processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if f"unix:{directory}/".encode() in command:
            found.append(pid)
    return found


async def test_a_guest_that_was_spawned_and_is_not_wanted_leaves_no_qemu(
    emulator: Emulator, stage: Stage
) -> None:
    async with house(stage.directory, guest_command(emulator, stage.environment)) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        await hosted.attached()
        (qemu_pid,) = qemus_in(stage.directory)
        assert hosted.pid == qemu_pid
        await hosted.discard()
        await gone(qemu_pid)
        await until(lambda: not home.registry.guests)


async def test_a_companion_that_is_killed_takes_a_qemu_along_that_has_never_run(
    newest: Emulator, stage: Stage
) -> None:
    async with house(stage.directory, guest_command(newest, stage.environment)) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        await hosted.attached()
        (qemu_pid,) = qemus_in(stage.directory)
        assert hosted.process is not None
        os.kill(hosted.process.pid, signal.SIGKILL)
        await asyncio.wait_for(hosted.lost(), WAIT_S)
        await gone(qemu_pid)


async def test_a_qemu_that_cannot_be_started_for_a_guest_is_no_guest(newest: Emulator, stage: Stage) -> None:
    command = guest_command(newest, stage.environment, "-device", "nonsense")
    async with house(stage.directory, command) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        with pytest.raises(
            GuestError, match=r"guest vm1: QEMU ended with code 1: .* not a valid device model"
        ):
            await hosted.attached()
        await until(lambda: not home.registry.guests)
        log = stage.directory / "guest-vm1.log"
        await until(lambda: "QEMU ended with code 1: " in log.read_text())


async def test_a_state_that_qemu_does_not_take_is_refused_with_its_words(
    newest: Emulator, stage: Stage
) -> None:
    source_words = ("--ram", "64Mi", "--", *words(newest))
    async with house(stage.directory, guest_command(newest, stage.environment)) as home:
        stage.companion(*source_words, name="other")
        source = await attached(home, name="other")
        await source.pause(MIGRATION)
        state = await source.save()
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        await hosted.attached()
        with pytest.raises(
            GuestError, match=r"guest vm1 refused LOAD: QEMU ended with code 1: .* \(all of it in"
        ):
            await hosted.load(state[: len(state) // 2])
        await hosted.discard()


@pytest.mark.parametrize("spawned", [True, False], ids=["spawned", "in readiness"])
async def test_one_that_waits_for_a_guest_in_vain_ends_when_no_daemon_comes_back(
    new_qemus: Hatchery, newest: Emulator, stage: Stage, spawned: bool
) -> None:
    command = guest_command(newest, stage.environment)
    impatient = (
        "from migd.qemu import companion; companion.ORPHAN_S = 0.3; from migd.cli.main import run; run()"
    )
    command[command.index("-m") : command.index("qemu")] = ["-c", impatient]
    async with house(stage.directory, command) as home:
        if spawned:
            hosted = home.registry.create("vm1", MIGRATION, SHAPES)
            await hosted.attached()
            hosted.process = None  # a daemon that is killed does not end it
        else:
            standing = stage.beside(new_qemus.start(*INCOMING), orphan_s=0.3)
            hosted = await attached(home, GuestState.INCOMING)
        qemu_pid = hosted.pid
    await gone(qemu_pid)
    said = stage.directory / "guest-vm1.log" if spawned else standing.process.log
    await until(lambda: "guest vm1 no daemon for 0 s, never started" in said.read_text())
    if not spawned:
        assert await standing.ended() == 1


# -- with real daemons ----------------------------------------------------------------------------------


def test_status_shows_what_a_guest_is_and_a_daemon_may_be_killed_meanwhile(
    new_qemus: Hatchery, newest: Emulator, tracked: dict[str, str], place: Path
) -> None:
    adopted = new_qemus.start(environment=tracked)
    directory = place / "run"
    with api.start_daemon("serve", runtime_dir=directory) as daemon:
        guests = [
            daemon.start_qemu("adopted", qmp=adopted.qmp).ready(),
            daemon.start_qemu("started", words(newest), "64Mi").ready(),
        ]
        shown = {guest.name: guest for guest in daemon.status().guests}
        for name in ("adopted", "started"):
            found = shown[name]
            assert (found.kind, found.tracking, found.state) == (str(newest), "userfaultfd", "running")
            assert found.ram_bytes == RAM_BYTES
        assert shown["adopted"].pid == adopted.pid
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.process.wait()
        with api.start_daemon("serve", runtime_dir=directory) as again:
            eventually(lambda: len(again.status().guests) == 2, "both guests")
            assert {guest.name: guest for guest in again.status().guests} == shown
            assert all(guest.alive for guest in guests)
    assert adopted.alive


@pytest.fixture(scope="module")
def daemons(emulator: Emulator) -> Iterator[api.DaemonPair]:
    """Two that start a QEMU for a guest that arrives and is not waited for."""
    with api.start_pair({"destination": {"guest_command": guest_command(emulator, {})}}) as pair:
        yield pair


@pytest.fixture
def pair(daemons: api.DaemonPair) -> Iterator[api.DaemonPair]:
    yield daemons
    daemons.end_guests()


@contextmanager
def ram_at(daemon: api.OwnedDaemon) -> Iterator[int]:
    fd = ram_of(daemon.guest("vm1").pid)
    try:
        yield fd
    finally:
        os.close(fd)


PATTERN = random.Random(7).randbytes(1 << 20)
PATTERN_AT = RAM_BYTES // 2
"""Where no BIOS has business."""


def has_no_guest(daemon: api.OwnedDaemon) -> bool:
    return not daemon.status().guests


def test_a_qemu_moves_there_and_back(
    emulator: Emulator, tracked: dict[str, str], pair: api.DaemonPair
) -> None:
    pair.source.start_qemu("vm1", words(emulator), "64Mi").ready()
    with ram_at(pair.source) as fd:
        os.pwrite(fd, PATTERN, PATTERN_AT)
        counted = await_ticks(fd)
    for move, dirty_log, here, there in (
        (pair.migrate, "userfaultfd", pair.source, pair.destination),
        (pair.back, "compare", pair.destination, pair.source),
    ):
        result = move("vm1", dirty_log=dirty_log)
        result.check()
        assert result.dirty_log == dirty_log
        assert result.late_dirty_pages == 0
        assert result.downtime.guest_s > 0
        assert [guest.kind for guest in there.status().guests] == [str(emulator)]
        eventually(partial(has_no_guest, here), "the guest's end where it was")
        with ram_at(there) as fd:
            assert ticks(fd) >= counted  # it went on where it stood
            counted = await_ticks(fd, ticks(fd))
            assert os.pread(fd, len(PATTERN), PATTERN_AT) == PATTERN


def test_a_qemu_moves_there_and_back_by_readiness(
    qemus: Hatchery, tracked: dict[str, str], pair: api.DaemonPair
) -> None:
    here, there = pair.source, pair.destination
    qemu = qemus.start(environment=tracked)
    here.start_qemu("vm1", qmp=qemu.qmp).ready()
    with qemu.ram.open("r+b") as file:
        file.seek(PATTERN_AT)
        file.write(PATTERN)
    counted = await_ticks(qemu.ram)
    for move in (pair.migrate, pair.back):
        waiting = qemus.start(*INCOMING, environment=tracked)
        there.start_qemu("vm1", qmp=waiting.qmp).ready()
        result = move("vm1")
        result.check()
        assert result.dirty_log == "userfaultfd"
        assert qemu.wait() == 0
        assert there.guest("vm1").pid == waiting.pid
        assert ticks(waiting.ram) >= counted
        counted = await_ticks(waiting.ram, ticks(waiting.ram))
        assert waiting.ram.read_bytes()[PATTERN_AT : PATTERN_AT + len(PATTERN)] == PATTERN
        here, there, qemu = there, here, waiting


def test_a_guest_stays_where_it_is_if_the_qemu_in_readiness_does_not_fit(
    qemus: Hatchery, pair: api.DaemonPair
) -> None:
    qemu, other = qemus.start(), qemus.start(*INCOMING, machine="q35")
    pair.source.start_qemu("vm1", qmp=qemu.qmp).ready()
    pair.destination.start_qemu("vm1", qmp=other.qmp).ready()
    result = pair.migrate("vm1")
    assert result.exit_code == 1
    assert "start QEMU with -machine pc-i440fx-" in result.error
    await_ticks(qemu.ram, ticks(qemu.ram))
    assert [guest.state for guest in pair.source.status().guests] == ["running"]
    other.wait()


def test_a_guest_stays_where_it_is_if_no_qemu_can_be_started(newest: Emulator) -> None:
    command = guest_command(newest, {}, "-device", "nonsense")
    with api.start_pair({"destination": {"guest_command": command}}) as pair:
        pair.source.start_qemu("vm1", words(newest), "64Mi").ready()
        result = pair.migrate("vm1")
        assert result.exit_code == 1
        assert "the peer aborted: guest vm1: QEMU ended with code 1: " in result.error
        assert "'nonsense' is not a valid device model name" in result.error
        with ram_at(pair.source) as fd:
            await_ticks(fd, ticks(fd))
