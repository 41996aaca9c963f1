"""Guests that cannot be looked into, and guests in readiness, as the daemon's registry has them."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from migd.errors import GuestError, LiveUnsupported, Refused
from migd.guest import control
from migd.guest.control import Block, GuestState, Log
from migd.guest.guest_log import GuestLog
from migd.guest.hosted import HostedGuest
from migd.migration.ports import PauseReport
from migd.ram.block import BlockShape
from tests.guest_daemon.scripted import (
    MIGRATION,
    PAGES,
    House,
    ScriptedGuest,
    attach,
    house,
    open_fds,
    ram_fd,
    until,
)

SHAPES = (BlockShape("ram", PAGES),)
QEMU = {"kind": "QEMU 7.2.22", "tracking": "userfaultfd", "opaque": True}
PREPARED = control.Prepared(pid=4711, kind="QEMU 10.0.2", tracking="soft-dirty")
RUNNING = control.Running(stopped_at_ns=1, resumed_at_ns=2)


def said(hosted: HostedGuest) -> tuple[int, str, str]:
    description = hosted.description
    assert description is not None
    assert description.pid == hosted.pid
    return description.pid, description.kind, description.tracking


@contextmanager
def blobs(*contents: bytes) -> Iterator[list[int]]:
    fds = [control.blob_fd(content) for content in contents]
    yield fds
    control.close_all(fds)


async def in_readiness(
    home: House, fd: int | None = None, *, pages: int = PAGES, name: str = "vm1"
) -> tuple[HostedGuest, ScriptedGuest]:
    """A QEMU that waits with -incoming defer, on zero RAM unless it is given."""
    message = attach(name=name, state=GuestState.INCOMING, blocks=(Block("ram", pages),), **QEMU)
    own = ram_fd(pages) if fd is None else fd
    try:
        return await home.attached(message, [own])
    finally:
        if fd is None:
            os.close(own)


# -- readiness ------------------------------------------------------------------------------------------


async def test_a_guest_in_readiness_is_nobodys_until_a_migration_brings_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        assert hosted.in_readiness
        assert (hosted.state, hosted.migration) == (GuestState.INCOMING, "")
        assert hosted.opaque
        assert said(hosted) == (os.getpid(), "QEMU 7.2.22", "userfaultfd")
        assert len(guest.fds) == 1  # a hint socket; RAM it has
        assert home.registry.create("vm1", MIGRATION, SHAPES) is hosted
        assert await guest.hear() == control.Expect(migration=MIGRATION)
        assert not hosted.in_readiness
        assert hosted.migration == MIGRATION
        assert hosted.process is None  # nothing was spawned
        assert home.returned == []  # nothing is to be decided about it


async def test_it_can_be_loaded_when_it_says_so_and_not_before(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        ready = asyncio.create_task(hosted.attached())
        assert isinstance(await guest.hear(), control.Expect)
        await asyncio.sleep(0.02)
        assert not ready.done()
        guest.say(PREPARED)
        await ready
        assert said(hosted) == (4711, "QEMU 10.0.2", "soft-dirty")  # which may not have been there before
        loading = asyncio.create_task(hosted.load(b"state"))
        assert isinstance(await guest.answer(control.Done()), control.Load)
        await loading
        assert control.blob_bytes(guest.fds[0]) == b"state"
        starting = asyncio.create_task(hosted.start())
        assert isinstance(await guest.answer(RUNNING), control.Start)
        assert (await starting).resumed_at_ns == 2
        assert (hosted.state, hosted.migration) == (GuestState.RUNNING, "")
        assert home.registry.get("vm1") is hosted


async def test_it_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with house(tmp_path, begin_s=0.05) as home:
        hosted, _ = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        reason = r"the process of guest vm1 did not have its machine ready within 0\.05 s"
        with pytest.raises(GuestError, match=reason):
            await hosted.attached()


async def test_one_that_ends_instead_is_not_waited_for(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        ready = asyncio.create_task(hosted.attached())
        await guest.hear()
        guest.close()
        with pytest.raises(GuestError, match="guest vm1 ended before its machine was ready"):
            await ready


async def test_one_that_fails_instead_says_why_and_is_still_known(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        ready = asyncio.create_task(hosted.attached())
        await guest.hear()
        guest.say(control.Failed(reason="QEMU ended with code 1: no such device"))
        with pytest.raises(GuestError, match="guest vm1: QEMU ended with code 1: no such device"):
            await ready
        assert said(hosted) == (os.getpid(), "QEMU 7.2.22", "userfaultfd")
        guest.say(PREPARED)  # too late
        await asyncio.sleep(0.02)
        assert said(hosted)[0] == os.getpid()


async def test_one_that_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        guest.close()
        hosted.link.close()
        with pytest.raises(GuestError, match="guest vm1 is not connected"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        await until(lambda: not home.registry.guests)


SHAPES_REFUSED = [
    ((BlockShape("ram", PAGES + 256),), "has RAM ram of 1 MiB, not ram of 2 MiB"),
    ((BlockShape("pc.ram", PAGES),), r"has RAM ram of 1 MiB, not pc\.ram of 1 MiB"),
    ((BlockShape("ram", PAGES // 2), BlockShape("more", PAGES // 2)),
     r"has RAM ram of 1 MiB, not ram of 0 MiB \+ more of 0 MiB"),
]  # fmt: skip


@pytest.mark.parametrize(("shapes", "told"), SHAPES_REFUSED, ids=["size", "name", "number"])
async def test_ram_of_another_shape_is_refused_and_the_guest_stays_in_readiness(
    tmp_path: Path, shapes: Sequence[BlockShape], told: str
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        with pytest.raises(Refused, match=f"guest 'vm1' in readiness {told}"):
            home.registry.create("vm1", MIGRATION, tuple(shapes))
        assert hosted.in_readiness
        home.registry.create("vm1", MIGRATION, SHAPES)
        assert await guest.hear() == control.Expect(migration=MIGRATION)  # and nothing before


@pytest.mark.parametrize("at", [0, 4096 * 100 + 7, 4096 * PAGES - 1])
async def test_ram_that_is_not_zero_is_refused(tmp_path: Path, at: int) -> None:
    """R11: of a guest before, or of a QEMU that has run."""
    fd = ram_fd()
    async with house(tmp_path) as home:
        os.pwrite(fd, b"\x01", at)
        hosted, _ = await in_readiness(home, fd)
        with pytest.raises(Refused, match="in readiness is not zero: start its QEMU anew"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        assert hosted.in_readiness
        os.pwrite(fd, b"\x00", at)  # touched, and zero again
        assert home.registry.create("vm1", MIGRATION, SHAPES) is hosted
    os.close(fd)


@pytest.mark.parametrize(
    "message",
    [
        attach(**QEMU),
        attach(state=GuestState.PAUSED, migration=MIGRATION, **QEMU),
        attach(state=GuestState.INCOMING, migration=MIGRATION, **QEMU),
    ],
    ids=["running", "paused", "incoming for one"],
)
async def test_a_guest_that_is_not_in_readiness_is_not_given_away(
    tmp_path: Path, message: control.Attach
) -> None:
    fd = ram_fd()
    async with house(tmp_path) as home:
        hosted, _ = await home.attached(message, [fd])
        assert not hosted.in_readiness
        await until(lambda: home.returned == [hosted])
        with pytest.raises(Refused, match="a guest named 'vm1' is here already"):
            home.registry.create("vm1", "f" * 32, SHAPES)
    os.close(fd)


async def test_it_is_given_away_once(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, _ = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        with pytest.raises(Refused, match="a guest named 'vm1' is here already"):
            home.registry.create("vm1", "f" * 32, SHAPES)
        assert hosted.migration == MIGRATION


async def test_a_guest_of_another_name_is_spawned_beside_it(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, _ = await in_readiness(home)
        other = home.registry.create("vm2", MIGRATION, SHAPES)
        assert other.process is not None
        assert hosted.in_readiness
        await other.discard()


async def test_one_that_is_not_wanted_after_all_ends_and_its_name_is_free(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        before = open_fds()
        home.registry.create("vm1", MIGRATION, SHAPES)
        await guest.hear()
        await hosted.discard()
        assert await guest.hear() == control.Quit()
        guest.close()
        await until(lambda: not home.registry.guests)
        assert hosted.gone
        assert open_fds() < before
        again, _ = await in_readiness(home)
        assert home.registry.create("vm1", "f" * 32, SHAPES) is again


async def test_ram_stays_open_for_a_migration_although_the_guest_in_readiness_is_gone(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await in_readiness(home)
        home.registry.create("vm1", MIGRATION, SHAPES)
        guest.close()
        await asyncio.wait_for(hosted.lost(), 10)
        os.fstat(hosted.ram.blocks[0].fd)  # what is written now goes nowhere, and nowhere else
        hosted.unpin(MIGRATION)
        assert hosted.ram.blocks[0].fd == -1


async def test_it_is_in_readiness_again_after_a_restart_of_the_daemon(tmp_path: Path) -> None:
    fd = ram_fd()
    for _ in range(2):
        async with house(tmp_path) as home:
            hosted, _ = await in_readiness(home, fd)
            assert hosted.in_readiness
            assert home.returned == []
    os.close(fd)


async def test_a_second_one_of_that_name_is_declined(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, _ = await in_readiness(home)
        fd, second = ram_fd(), home.dial()
        second.say(attach(state=GuestState.INCOMING, **QEMU), [fd])
        os.close(fd)
        assert await second.hear() == control.Declined(reason="a guest named 'vm1' is attached already")
        assert hosted.in_readiness


# -- a guest that cannot be looked into -----------------------------------------------------------------


async def opaque(home: House) -> tuple[HostedGuest, ScriptedGuest]:
    return await home.attached(attach(**QEMU))


async def test_its_pause_brings_nothing_and_its_state_is_asked_for(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        assert not hosted.reports_free_at_pause
        assert not hosted.checks_itself
        before = open_fds()
        pausing = asyncio.create_task(hosted.pause(MIGRATION))
        with blobs(b"what nobody asked for") as fds:
            await guest.answer(control.Paused(), fds)
        assert await pausing == PauseReport(None, None)
        saving = asyncio.create_task(hosted.save())
        with blobs(b"state" * 100_000) as fds:
            assert isinstance(await guest.answer(control.Saved(), fds), control.Save)
        assert await saving == b"state" * 100_000
        assert open_fds() == before


async def test_a_guest_that_can_be_looked_into_says_so(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, _ = await home.attached()
        assert hosted.reports_free_at_pause
        assert hosted.checks_itself
        assert said(hosted) == (os.getpid(), "stub", "")


@pytest.mark.parametrize(
    ("makers", "reason"),
    [
        ([], "saved its state in 0 descriptors, not 1"),
        ([ram_fd, ram_fd], "saved its state in 2 descriptors, not 1"),
        ([lambda: os.open("/", os.O_RDONLY)], "its state cannot be read: Is a directory"),
    ],
    ids=["none", "two", "a directory"],
)
async def test_a_state_that_is_none_is_an_error(
    tmp_path: Path, makers: Sequence[Callable[[], int]], reason: str
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        before = open_fds()
        saving = asyncio.create_task(hosted.save())
        fds = [make() for make in makers]
        await guest.answer(control.Saved(), fds)
        control.close_all(fds)
        with pytest.raises(GuestError, match=reason):
            await saving
        assert open_fds() == before


async def test_a_refusal_to_save_has_its_reason(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        saving = asyncio.create_task(hosted.save())
        await guest.answer(control.Failed(reason="QEMU refused migrate: no"))
        with pytest.raises(GuestError, match="guest vm1 refused SAVE: QEMU refused migrate: no"):
            await saving


@pytest.mark.parametrize(("immovable", "kind"), [(True, Refused), (False, LiveUnsupported)])
async def test_arming_tells_what_cannot_be_moved_from_what_cannot_be_tracked(
    tmp_path: Path, immovable: bool, kind: type[Exception]
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        arming = asyncio.create_task(hosted.arm())
        await guest.answer(control.Failed(reason="a device", immovable=immovable))
        with pytest.raises(kind, match="guest vm1 refused ARM: a device"):
            await arming


async def test_a_guest_that_keeps_its_own_log_is_harvested_by_asking(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        before = open_fds()
        arming = asyncio.create_task(hosted.arm())
        await guest.answer(control.Armed(addresses=(4096,), log=Log.SOFT_DIRTY), [0])
        log = await arming
        assert isinstance(log, GuestLog)
        assert (log.name, log.sees_writes, log.cost_s) == ("soft-dirty", True, 0.0)
        for seed in range(3):
            pages = sorted(random.Random(seed).sample(range(PAGES), 40))
            bits = sum(1 << page for page in pages).to_bytes(PAGES // 8, "little")
            harvesting = asyncio.create_task(log.harvest())
            with blobs(bits) as fds:
                assert isinstance(await guest.answer(control.Harvested(), fds), control.Harvest)
            found = await harvesting
            assert [page for start, stop in found.runs() for page in range(start, stop)] == pages
            assert log.cost_s > 0
        log.close()
        assert open_fds() == before


@pytest.mark.parametrize(
    ("makers", "reason"),
    [
        ([], "has 0 bytes for 256 pages"),
        ([lambda: control.blob_fd(bytes(31))], "has 31 bytes for 256 pages"),
        ([lambda: control.blob_fd(bytes(33))], "has 33 bytes for 256 pages"),
        ([lambda: control.blob_fd(bytes(32)), ram_fd], "has 0 bytes for 256 pages"),
        ([lambda: os.open("/", os.O_RDONLY)], "cannot be read: Is a directory"),
    ],
    ids=["nothing", "too little", "too much", "two", "a directory"],
)
async def test_a_log_of_the_wrong_size_is_an_error(
    tmp_path: Path, makers: Sequence[Callable[[], int]], reason: str
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        log = GuestLog(hosted.link, Log.SOFT_DIRTY, PAGES, 10)
        before = open_fds()
        harvesting = asyncio.create_task(log.harvest())
        fds = [make() for make in makers]
        await guest.answer(control.Harvested(), fds)
        control.close_all(fds)
        with pytest.raises(GuestError, match=f"the guest's dirty log {reason}"):
            await harvesting
        assert open_fds() == before


async def test_a_log_that_does_not_answer_is_an_error_in_bounded_time(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await opaque(home)
        with pytest.raises(GuestError, match=r"did not answer HARVEST within 0\.02 s"):
            await GuestLog(hosted.link, Log.SOFT_DIRTY, PAGES, 0.02).harvest()
        harvesting = asyncio.create_task(GuestLog(hosted.link, Log.SOFT_DIRTY, PAGES, 10).harvest())
        await guest.hear()
        guest.close()
        with pytest.raises(GuestError, match="closed its control connection"):
            await harvesting


# -- what was spawned -----------------------------------------------------------------------------------

FAMILY = "sleep 60 & echo $! > {name}.child; {end}"


def family(tmp_path: Path, end: str) -> list[str]:
    """A command that starts another process, as a companion starts its QEMU."""
    return ["sh", "-c", f"cd {tmp_path}; {FAMILY}".replace("{end}", end)]


async def child_of(tmp_path: Path) -> int:
    path = tmp_path / "vm1.child"
    await until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_what_an_incoming_guest_has_started_ends_when_it_is_discarded(tmp_path: Path) -> None:
    async with house(tmp_path, family(tmp_path, "wait")) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        child = await child_of(tmp_path)
        assert alive(child)
        await hosted.discard()
        await until(lambda: not alive(child))


async def test_what_an_incoming_guest_has_started_ends_with_it(tmp_path: Path) -> None:
    """A companion that was killed must not leave a QEMU that waits for a guest that never comes."""
    async with house(tmp_path, family(tmp_path, "kill -9 $$")) as home:
        home.registry.create("vm1", MIGRATION, SHAPES)
        child = await child_of(tmp_path)
        await until(lambda: not home.registry.guests)
        await until(lambda: not alive(child))


async def test_what_a_guest_that_runs_here_has_started_outlives_it(tmp_path: Path) -> None:
    """Its QEMU is the guest, and the companion only stands beside it."""
    async with house(tmp_path, family(tmp_path, "sleep 0.5; kill -9 $$")) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        child = await child_of(tmp_path)
        hosted.state = GuestState.RUNNING  # as `start` makes it
        await until(lambda: not home.registry.guests)
        await asyncio.sleep(0.05)
        assert alive(child)
        os.kill(child, 9)
