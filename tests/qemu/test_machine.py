"""QemuMachine beside real QEMUs: found, armed, paused, saved, loaded, started, and found again if left."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from migd.errors import GuestError, LiveUnsupported, Refused
from migd.guest.control import Block, GuestState, Log
from migd.lab.emulators import Emulator
from migd.qemu import device_state, inventory
from migd.qemu.machine import Immovable, QemuMachine
from migd.qemu.memo import Memo, MemoStore
from migd.qemu.monitor import CommandRefused, Monitor
from migd.qemu.settings import Settings
from migd.ram import soft_dirty
from migd.ram.block import PAGE_BYTES
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from tests.support.qemu import HINT_PORT, MIB, RAM_BYTES, WAIT_S, Hatchery, Qemu, await_ticks, ticks

MIGRATION = "0123456789abcdef" * 2
PAGES = RAM_BYTES // PAGE_BYTES
INCOMING = ("-incoming", "defer", "-S")


@asynccontextmanager
async def beside(
    qemu: Qemu, *, blocks: Sequence[Block] = (), fds: Sequence[int] = ()
) -> AsyncIterator[QemuMachine]:
    """A machine for that QEMU. Afterwards it is as if its companion was killed: nothing is set back."""
    async with qemu.monitor() as monitor:
        machine = await QemuMachine.adopt(monitor, blocks=blocks, fds=fds)
        try:
            yield machine
        finally:
            machine.close()


async def run_state(monitor: Monitor) -> str:
    return str((await monitor.ask("query-status"))["status"])


async def as_found(monitor: Monitor) -> tuple[Any, ...]:
    """What migd changes in a QEMU for a while."""
    return (
        await monitor.ask("query-migrate-capabilities"),
        await monitor.ask("query-migrate-parameters"),
        (await inventory.examine(monitor)).memos,
    )


def same_file(fd: int, path: Path | int) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat(path))


# -- found ----------------------------------------------------------------------------------------------


async def test_a_qemu_is_adopted_with_its_ram_its_process_and_its_hint_port(
    qemus: Hatchery, emulator: Emulator
) -> None:
    qemu = qemus.start(*HINT_PORT)
    async with beside(qemu) as machine:
        assert machine.blocks == (Block("ram", PAGES),)
        assert len(machine.fds) == 1
        assert same_file(machine.fds[0], qemu.ram)
        assert machine.process.pid == qemu.pid
        assert (machine.state, machine.migration) == (GuestState.RUNNING, "")
        assert machine.name == str(emulator)
        assert machine.hint_socket == str(qemu.hints)
        assert machine.map.ram_bytes == RAM_BYTES
        assert await run_state(machine.monitor) == "running"


async def test_a_hint_port_with_a_relative_path_is_found_where_qemu_has_it(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start(*(word.replace("{hints}", "hints") for word in HINT_PORT))
    async with beside(qemu) as machine:
        assert os.path.samestat(os.stat(machine.hint_socket), qemu.hints.stat())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(machine.hint_socket)


async def test_a_qemu_is_found_although_somebody_else_made_its_monitor_socket(new_qemus: Hatchery) -> None:
    """As libvirt does."""
    with socket.socket(socket.AF_UNIX) as listening:
        path = new_qemus.directory / "monitor"
        listening.bind(str(path))
        listening.listen()
        qemu = new_qemus.start(
            *("-chardev", f"socket,id=mon,fd={listening.fileno()},server=on,wait=off"),
            *("-mon", "chardev=mon,mode=control"),
            pass_fds=(listening.fileno(),),
        )
        monitor = await Monitor.connect(path, WAIT_S)
        try:
            machine = await QemuMachine.adopt(monitor)
            machine.close()
            assert machine.process.pid == qemu.pid
        finally:
            await monitor.close()


def backend(words: str) -> tuple[str, ...]:
    return ("-object", f"{words},id=ram,size={{size}}", "-machine", "pc,memory-backend=ram")


ON_DISK = backend("memory-backend-file,mem-path={dir}/ram,share=on")

PLACES = [
    ("a path", ON_DISK, ()),
    ("a relative path", backend("memory-backend-file,mem-path=./ram,share=on"), ()),
    ("a directory", backend("memory-backend-file,mem-path={dir},share=on"), ()),
    ("a file that was deleted", ON_DISK, ("ram",)),
    ("a relative path that was deleted", backend("memory-backend-file,mem-path=ram,share=on"), ("ram",)),
]


@pytest.mark.parametrize(("name", "ram", "deleted"), PLACES, ids=[row[0] for row in PLACES])
async def test_ram_is_found_wherever_it_is(
    qemus: Hatchery, name: str, ram: Sequence[str], deleted: Sequence[str]
) -> None:
    qemu = qemus.start(ram=ram)
    async with qemu.monitor():
        for path in deleted:
            (qemu.directory / path).unlink()
    async with beside(qemu) as machine:
        assert os.fstat(machine.fds[0]).st_size == RAM_BYTES
        assert await_ticks(machine.fds[0]) > 0


async def test_a_memfd_of_an_older_qemu_is_found(qemus: Hatchery, emulator: Emulator) -> None:
    qemu = qemus.start(ram=backend("memory-backend-memfd"))
    if emulator.version >= (8,):
        with pytest.raises(
            Immovable, match="this QEMU sends a memfd itself: use -object memory-backend-file"
        ):
            async with beside(qemu):
                pass
        return
    async with beside(qemu) as machine:
        assert await_ticks(machine.fds[0]) > 0


@contextmanager
def memfd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, RAM_BYTES)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("handed", [True, False], ids=["and handed to us", "and is looked for"])
async def test_ram_that_qemu_was_given_as_a_descriptor(qemus: Hatchery, handed: bool) -> None:
    """A memfd of ours, which to QEMU is a file: so QEMU 10 leaves it out of its state."""
    with memfd() as fd:
        ram = backend(f"memory-backend-file,mem-path=/proc/self/fd/{fd},share=on")
        qemu = qemus.start(ram=ram, pass_fds=(fd,))
        given = {"blocks": [Block("ram", PAGES)], "fds": [os.dup(fd)]} if handed else {}
        async with beside(qemu, **given) as machine:
            assert same_file(machine.fds[0], fd)
            assert machine.process.pid == qemu.pid
            await machine.pause(MIGRATION)
            assert len(await machine.save()) < 2 * MIB


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


WRONG_BLOCKS = [
    ([Block("ram", PAGES - 1)], "QEMU has RAM ram of 67108864 bytes, and the guest ram of 67104768 bytes"),
    ([Block("pc.ram", PAGES)], "QEMU has RAM ram of 67108864 bytes, and the guest pc.ram of 67108864 bytes"),
    ([], "QEMU has RAM ram of 67108864 bytes, and the guest none"),
]


async def test_ram_that_is_not_qemus_is_refused_and_stays_the_callers(new_qemus: Hatchery) -> None:
    with memfd() as fd, memfd() as other:
        ram = backend(f"memory-backend-file,mem-path=/proc/self/fd/{fd},share=on")
        qemu = new_qemus.start(ram=ram, pass_fds=(fd,))
        async with qemu.monitor() as monitor:
            before = descriptors()
            for blocks, reason in WRONG_BLOCKS:
                with pytest.raises(GuestError, match=reason):
                    await QemuMachine.adopt(monitor, blocks=blocks, fds=[fd])
            with pytest.raises(GuestError, match=r"which process is the QEMU of .* 0 map its RAM"):
                await QemuMachine.adopt(monitor, blocks=[Block("ram", PAGES)], fds=[other])
            assert descriptors() == before
            os.fstat(fd)


async def test_two_files_that_may_both_be_the_ram_are_not_guessed_at(
    new_qemus: Hatchery, place: Path
) -> None:
    other = place / "other"
    with other.open("wb") as file:
        file.truncate(RAM_BYTES)
        os.set_inheritable(file.fileno(), True)
        qemu = new_qemus.start(
            ram=backend(f"memory-backend-file,mem-path={place},share=on"), pass_fds=(file.fileno(),)
        )
        before = descriptors()
        with pytest.raises(
            GuestError, match=r"RAM ram: process \d+ has 2 open files .*mem-path=DIRECTORY/NAME"
        ):
            async with beside(qemu):
                pass
        assert descriptors() == before


async def test_two_backends_are_two_blocks(qemus: Hatchery) -> None:
    nodes = [
        word
        for name in ("m1", "m0")
        for word in (
            *("-object", f"memory-backend-file,id={name},size=32M,mem-path={{dir}}/{name},share=on"),
            *("-numa", f"node,memdev={name}"),
        )
    ]
    qemu = qemus.start(*nodes, ram=())
    async with beside(qemu) as machine:
        assert machine.blocks == (Block("m0", PAGES // 2), Block("m1", PAGES // 2))
        assert [
            same_file(fd, qemu.directory / name) for fd, name in zip(machine.fds, ("m0", "m1"), strict=True)
        ]
        assert list(machine.map.ranges(2 * MIB, MIB)) == [(34 * MIB, MIB)]  # the first node is m1
        await machine.pause(MIGRATION)
        assert len(await machine.save()) < 2 * MIB


async def test_one_that_cannot_be_moved_is_not_adopted(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start(ram=backend("memory-backend-file,mem-path={ram}"))
    before = descriptors()
    with pytest.raises(Immovable, match=r"RAM ram is share=off, .*: add share=on"):
        async with beside(qemu):
            pass
    assert descriptors() == before


# -- writes ---------------------------------------------------------------------------------------------

STORED_AT = 3 * MIB
"""Where -device loader writes at every reset."""
LOADER = ("-device", f"loader,addr={STORED_AT:#x},data=0x600d,data-len=4")


def log_of(addresses: Sequence[int], pagemap_fd: int) -> KernelDirtyLog:
    (address,) = addresses
    log = KernelDirtyLog(pagemap_fd, [ArmedRange(address, PAGES, 0)], PAGES)
    log.begin()
    return log


async def test_what_the_armed_guest_writes_is_seen_by_the_daemons_log(
    qemus: Hatchery, tracked: dict[str, str]
) -> None:
    qemu = qemus.start(*LOADER, environment=tracked)
    async with beside(qemu) as machine:
        await_ticks(qemu.ram)
        assert machine.tracking() == "userfaultfd"
        armed = await machine.arm({os.getpid()})
        assert armed.log is Log.USERFAULTFD
        assert armed.pagemap_fd is not None
        log = log_of(armed.addresses, armed.pagemap_fd)
        log.collect()
        before = await_ticks(qemu.ram, ticks(qemu.ram))
        assert 0 in log.collect()  # the page of the clock
        stored = STORED_AT // PAGE_BYTES
        assert not any(stored in log.collect() for _ in range(5))
        await machine.monitor.ask("system_reset")
        seen = log.collect()
        deadline = time.monotonic() + 10
        while stored not in seen:
            assert time.monotonic() < deadline
            seen |= log.collect()
        assert stored + 1 not in seen
        assert PAGES - PAGES // 4 not in seen  # nobody has business there
        assert before > 0
        log.close()


async def test_a_qemu_without_the_preload_is_not_tracked_and_the_remedy_is_told(qemus: Hatchery) -> None:
    if soft_dirty.supported():
        pytest.skip("this kernel has soft-dirty marks")
    qemu = qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        assert machine.tracking().startswith("compare: QEMU was started without the preload")
        with pytest.raises(LiveUnsupported, match=r'start QEMU with LD_PRELOAD="\$\(migd preload\)"'):
            await machine.arm({os.getpid()})
        assert await as_found(machine.monitor) == before


WRITER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096):
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_writer(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


async def test_another_process_that_may_write_to_ram_is_named(
    new_qemus: Hatchery, tracked: dict[str, str]
) -> None:
    qemu = new_qemus.start(environment=tracked)
    async with beside(qemu) as machine:
        with other_writer(qemu.ram) as writer:
            expected = rf"others may write to the guest's RAM unseen: .*python.* \(pid {writer.pid}\)"
            with pytest.raises(LiveUnsupported, match=expected):
                await machine.arm({os.getpid()})
            armed = await machine.arm({writer.pid})  # a daemon, perhaps
            assert armed.pagemap_fd is not None
            os.close(armed.pagemap_fd)
        armed = await machine.arm(())
        assert armed.pagemap_fd is not None
        os.close(armed.pagemap_fd)


async def test_a_drive_past_the_page_cache_is_not_tracked(
    new_qemus: Hatchery, tracked: dict[str, str], tmp_path: Path, place: Path
) -> None:
    for directory in (place, tmp_path):
        (directory / "disk").write_bytes(bytes(MIB))
        try:
            os.close(os.open(directory / "disk", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            continue
        drive = f"if=none,id=d,file={directory}/disk,format=raw,cache=none"
        break
    else:
        pytest.skip("no directory here has files that bypass the page cache")
    qemu = new_qemus.start("-drive", drive, "-device", "virtio-blk-pci,drive=d", environment=tracked)
    async with beside(qemu) as machine:
        with pytest.raises(LiveUnsupported, match=r"cache=none .*set cache\.direct=off"):
            await machine.arm(())
        await machine.pause(MIGRATION)  # by comparing it can be moved
        assert await machine.save()


async def test_a_guest_that_stands_still_by_itself_is_not_moved(
    new_qemus: Hatchery, tracked: dict[str, str]
) -> None:
    qemu = new_qemus.start(environment=tracked)
    async with beside(qemu) as machine:
        await machine.monitor.ask("stop")
        for ask in (machine.arm(()), machine.pause(MIGRATION)):
            with pytest.raises(
                Immovable, match=r"QEMU says the guest is paused: have it run first \(QMP cont\)"
            ):
                await ask
        assert machine.state is GuestState.RUNNING  # as far as migd has a say
        assert (await inventory.examine(machine.monitor)).memos == ()
        assert await run_state(machine.monitor) == "paused"


async def test_what_has_become_immovable_is_noticed_when_it_is_armed(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with beside(qemu) as machine:
        await machine.monitor.ask(
            "object-add",
            {"qom-type": "memory-backend-ram", "id": "more", "size": MIB},
        )
        with pytest.raises(Immovable, match="RAM more is a memory-backend-ram"):
            await machine.arm(())


async def test_marks_are_not_harvested_before_they_are_watched(new_qemus: Hatchery) -> None:
    async with beside(new_qemus.start()) as machine:
        with pytest.raises(GuestError, match="the guest's marks are not watched: arm it first"):
            await machine.harvest()


# -- leaving --------------------------------------------------------------------------------------------


async def configure(monitor: Monitor) -> None:
    """Settings that are neither QEMU's defaults nor migd's."""
    listed = [{"capability": "multifd", "state": True}, {"capability": "events", "state": False}]
    await monitor.ask("migrate-set-capabilities", {"capabilities": listed})
    await monitor.ask("migrate-set-parameters", {"max-bandwidth": 7_654_321, "tls-creds": "theirs"})


async def test_a_paused_guest_stands_still_and_goes_on_as_it_was(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        await configure(machine.monitor)
        before = await as_found(machine.monitor)
        await_ticks(qemu.ram)
        began_ns = time.time_ns()
        await machine.pause(MIGRATION)
        assert (machine.state, machine.migration) == (GuestState.PAUSED, MIGRATION)
        assert await run_state(machine.monitor) == "paused"
        stands_at = ticks(qemu.ram)
        state = await machine.save()
        await asyncio.sleep(0.15)
        assert ticks(qemu.ram) == stands_at
        assert await as_found(machine.monitor) != before
        running = await machine.resume()
        assert (machine.state, machine.migration) == (GuestState.RUNNING, "")
        assert began_ns - 10**9 < running.stopped_at_ns < running.resumed_at_ns < time.time_ns() + 10**9
        assert await run_state(machine.monitor) == "running"
        await_ticks(qemu.ram, stands_at)
        assert await as_found(machine.monitor) == before
        assert await machine.resume() == running  # a second time does nothing
        heading, stream = device_state.decode(state)
        assert heading.stopped_at_ns == running.stopped_at_ns
        assert heading.machine.startswith("pc-i440fx-")
        assert bytes(stream[:4]) == b"QEVM"
        assert len(stream) < 2 * MIB


async def test_one_guest_can_be_paused_again_and_again_for_one_migration_and_another(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        for _ in range(3):
            await machine.pause(MIGRATION)
            await machine.pause(MIGRATION)
            await machine.pause("f" * 32)
            assert machine.migration == "f" * 32
            await machine.resume()
        assert await as_found(machine.monitor) == before


async def test_the_state_of_a_paused_guest_can_be_had_twice(qemus: Hatchery) -> None:
    """The first answer came too late for its daemon, perhaps."""
    qemu = qemus.start()
    async with beside(qemu) as machine:
        await machine.pause(MIGRATION)
        first = await machine.save()
        assert await machine.save() == first
        await machine.resume()
        await_ticks(qemu.ram, ticks(qemu.ram))
        await machine.pause(MIGRATION)
        assert await machine.save() != first  # which was of another moment


async def test_a_guest_that_runs_is_not_saved(new_qemus: Hatchery) -> None:
    async with beside(new_qemus.start()) as machine:
        with pytest.raises(GuestError, match="a running guest is not saved"):
            await machine.save()


async def test_ram_in_the_device_state_is_an_error(qemus: Hatchery) -> None:
    """Somebody has changed QEMU's settings behind our back."""
    qemu = qemus.start()
    async with beside(qemu) as machine:
        await machine.pause(MIGRATION)
        off = [{"capability": "x-ignore-shared", "state": False}]
        await machine.monitor.ask("migrate-set-capabilities", {"capabilities": off})
        with pytest.raises(
            GuestError, match=r"QEMU counts \d+ bytes of RAM into its state: RAM was not left"
        ):
            await machine.save()
        await machine.resume()
        assert await run_state(machine.monitor) == "running"


@contextmanager
def reader_that_does_not_read() -> Iterator[int]:
    """A socket that takes next to nothing."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours, theirs:
        yield theirs.fileno()


async def test_a_guest_goes_on_although_its_state_was_half_saved(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        await machine.pause(MIGRATION)
        with reader_that_does_not_read() as fd:
            await machine.monitor.lend("out", fd)
            await machine.monitor.ask("migrate", {"uri": "fd:out"})
            async with asyncio.timeout(10):
                while (await machine.monitor.ask("query-migrate"))["status"] == "setup":
                    pass
            assert (await machine.monitor.ask("query-migrate"))["status"] not in ("completed", "failed")
            await machine.resume()
        assert await run_state(machine.monitor) == "running"
        assert await as_found(machine.monitor) == before
        await_ticks(qemu.ram, ticks(qemu.ram))
        await machine.pause(MIGRATION)  # and the next time it is saved
        assert await machine.save()
        await machine.resume()


# -- arriving -------------------------------------------------------------------------------------------


async def left(qemu: Qemu, machine: QemuMachine) -> tuple[bytes, bytes]:
    """State and RAM of a guest that has stopped for good."""
    await_ticks(qemu.ram)
    await machine.pause(MIGRATION)
    state = await machine.save()
    return state, qemu.ram.read_bytes()


def filled(qemu: Qemu, ram: bytes) -> None:
    """Its RAM is as a migration has made it."""
    with qemu.ram.open("r+b") as file:
        file.write(ram)


async def test_a_guest_goes_on_in_another_qemu_where_it_stood(qemus: Hatchery) -> None:
    source, destination = qemus.start(), qemus.start(*INCOMING)
    async with beside(source) as leaving, beside(destination) as arriving:
        await configure(arriving.monitor)
        before = await as_found(arriving.monitor)
        assert (arriving.state, arriving.migration) == (GuestState.INCOMING, "")
        await arriving.expect(MIGRATION)
        assert (arriving.state, arriving.migration) == (GuestState.INCOMING, MIGRATION)
        state, ram = await left(source, leaving)
        filled(destination, ram)
        await arriving.load(state)
        assert await run_state(arriving.monitor) == "paused"
        stands_at = ticks(destination.ram)
        assert stands_at == ticks(source.ram)
        await asyncio.sleep(0.1)
        assert ticks(destination.ram) == stands_at
        running = await arriving.start()
        assert (arriving.state, arriving.migration) == (GuestState.RUNNING, "")
        assert running == await arriving.start()  # the answer was lost, perhaps
        assert running.stopped_at_ns == leaving.last_pause.stopped_at_ns
        assert running.resumed_at_ns > running.stopped_at_ns
        await arriving.started()
        await_ticks(destination.ram, stands_at)
        assert await as_found(arriving.monitor) == before
        await leaving.quit()
        assert source.wait() == 0


@pytest.mark.parametrize("told", [True, False], ids=["and is told so", "and is not told"])
async def test_a_guest_waits_for_its_start_also_where_qemu_would_not(qemus: Hatchery, told: bool) -> None:
    """Without -S QEMU runs what it has loaded, unless that says it stood still: not before GO (H2)."""
    old = () if told else ("-global", "migration.store-global-state=off")  # as of old machine types
    source, destination = qemus.start(*old), qemus.start("-incoming", "defer", *old)
    async with beside(source) as leaving, beside(destination) as arriving:
        await arriving.expect(MIGRATION)
        state, ram = await left(source, leaving)
        filled(destination, ram)
        with arriving.monitor.expecting("RESUME") as resumed:
            await arriving.load(state)
            await asyncio.sleep(0.1)
            assert await run_state(arriving.monitor) == "paused"
            assert not resumed.done()
        assert ticks(destination.ram) == ticks(source.ram)
        await arriving.start()
        await_ticks(destination.ram, ticks(source.ram))


async def test_a_guest_that_is_to_arrive_does_nothing_else(new_qemus: Hatchery) -> None:
    async with beside(new_qemus.start(*INCOMING)) as machine:
        for ask, reason in (
            (machine.arm(()), "there is nothing to track"),
            (machine.pause(MIGRATION), "it cannot be paused"),
            (machine.save(), "a incoming guest is not saved"),
            (machine.resume(), "START it"),
            (machine.start(), "the guest has no device state yet"),
            (machine.load(b""), "a incoming guest loads no device state, or not twice"),
        ):
            with pytest.raises(GuestError, match=reason):
                await ask
        assert await run_state(machine.monitor) == "inmigrate"


async def test_a_guest_that_runs_does_not_arrive(new_qemus: Hatchery) -> None:
    async with beside(new_qemus.start()) as machine:
        with pytest.raises(GuestError, match="QEMU is running: start it with -incoming defer"):
            await machine.expect(MIGRATION)
        with pytest.raises(GuestError, match="a running guest loads no device state"):
            await machine.load(b"")
        await machine.pause(MIGRATION)
        with pytest.raises(GuestError, match="a paused guest is resumed, not started"):
            await machine.start()


async def saved(hatchery: Hatchery, **options: Any) -> tuple[bytes, bytes]:
    """State and RAM of a guest that is not there any more."""
    qemu = hatchery.start(**options)
    async with beside(qemu) as machine:
        found = await left(qemu, machine)
    qemu.kill()
    return found


async def test_a_state_of_another_machine_type_is_refused_before_qemu_sees_it(qemus: Hatchery) -> None:
    state, _ = await saved(qemus, machine="pc-i440fx-6.2")
    destination = qemus.start(*INCOMING, machine="pc-i440fx-7.0")
    async with beside(destination) as machine:
        await machine.expect(MIGRATION)
        reason = (
            r"machine type pc-i440fx-6\.2 at its source and pc-i440fx-7\.0 here: start QEMU with "
            r"-machine pc-i440fx-6\.2"
        )
        with pytest.raises(Refused, match=reason):
            await machine.load(state)


def with_stream(state: bytes, change: Any) -> bytes:
    heading, stream = device_state.decode(state)
    return device_state.encode(heading, change(bytes(stream)))


DAMAGES = [
    ("no stream", lambda _stream: b""),
    ("another magic", lambda stream: b"QEVN" + stream[4:]),
    ("cut short", lambda stream: stream[: len(stream) // 2]),
    ("another kind of section", lambda stream: stream[:8] + b"\xee" + stream[9:]),
    ("another device", lambda stream: stream.replace(b"\x05timer", b"\x05tamer", 1)),
]


@pytest.mark.parametrize(("name", "change"), DAMAGES, ids=[row[0] for row in DAMAGES])
async def test_a_damaged_state_is_an_error_and_the_guest_does_not_run(
    qemus: Hatchery, name: str, change: Any
) -> None:
    state, ram = await saved(qemus)
    state = with_stream(state, change)
    destination = qemus.start(*INCOMING)
    filled(destination, ram)
    async with beside(destination) as machine:
        await machine.expect(MIGRATION)
        with pytest.raises(
            GuestError, match=r"QEMU did not take the device state in .* what it printed says why"
        ):
            await machine.load(state)
        with pytest.raises(GuestError, match="the guest has no device state yet"):
            await machine.start()
        with pytest.raises(GuestError, match="or not twice"):
            await machine.load(state)


async def test_what_is_no_state_of_a_qemu_does_not_reach_it(new_qemus: Hatchery) -> None:
    async with beside(new_qemus.start(*INCOMING)) as machine:
        await machine.expect(MIGRATION)
        with pytest.raises(GuestError, match="not that of a QEMU"):
            await machine.load(b"the state of a stub")


# -- the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), INCOMING], ids=["running", "incoming"])
async def test_a_qemu_that_is_to_end_ends(qemus: Hatchery, words: Sequence[str]) -> None:
    qemu = qemus.start(*words)
    async with beside(qemu) as machine:
        await machine.quit()
        assert qemu.wait() == 0
        await machine.quit()  # there is nothing left to end
        assert not machine.process.alive


async def test_the_end_of_qemu_is_an_error_of_whatever_was_asked(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with beside(qemu) as machine:
        await machine.pause(MIGRATION)
        qemu.kill()
        for ask in (machine.save(), machine.resume()):
            with pytest.raises(GuestError, match=r"QEMU is gone|takes no descriptor"):
                await ask
        await asyncio.wait_for(machine.monitor.ended(), 10)


async def test_a_qemu_that_is_held_up_for_a_while_is_spoken_to_afterwards(new_qemus: Hatchery) -> None:
    """Its answer comes when nobody waits for it any more, and is no answer to anything else."""
    qemu = new_qemus.start()
    async with beside(qemu) as machine:
        qemu.suspend()
        with pytest.raises(GuestError, match="QEMU did not answer stop within 2 s"):
            await machine.monitor.ask("stop")
        qemu.go_on()
        assert await run_state(machine.monitor) == "paused"
        await machine.monitor.ask("cont")
        assert await run_state(machine.monitor) == "running"


async def test_a_monitor_that_somebody_else_uses_is_named(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with qemu.monitor():
        with pytest.raises(GuestError, match=r"no QMP greeting within 0\.1 s; .* give migd one of its own"):
            await Monitor.connect(qemu.qmp, 0.1)
    with pytest.raises(GuestError, match=r"no QMP there: .*No such file"):
        await Monitor.connect(qemu.directory / "none", 0.1)


# -- found again ----------------------------------------------------------------------------------------


async def test_settings_left_behind_by_one_that_was_killed_are_set_back(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        await configure(machine.monitor)
        before = await as_found(machine.monitor)
        await machine.prepare()
        assert await as_found(machine.monitor) != before
    async with beside(qemu) as machine:
        assert machine.state is GuestState.RUNNING
        assert await as_found(machine.monitor) == before


async def test_a_guest_that_stood_still_for_a_moment_when_it_was_left_goes_on(new_qemus: Hatchery) -> None:
    """Whoever reads soft-dirty marks stops the guest for it, and may be killed then."""
    qemu = new_qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        await machine.prepare(holds_still=True)
        await machine.monitor.ask("stop")
    async with beside(qemu) as machine:
        assert machine.state is GuestState.RUNNING
        assert await run_state(machine.monitor) == "running"
        assert await as_found(machine.monitor) == before


async def test_one_that_somebody_else_has_stopped_does_not(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        await machine.prepare()
        await machine.monitor.ask("stop")
    async with beside(qemu) as machine:
        assert await run_state(machine.monitor) == "paused"
        assert await as_found(machine.monitor) == before


async def test_a_guest_about_to_be_paused_when_it_was_left_runs_on(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with qemu.monitor() as monitor:
        before = await as_found(monitor)
        own = await Settings.of(monitor)
        await MemoStore(monitor, ()).write(Memo(GuestState.PAUSED, MIGRATION, own))
        await own.for_migd().apply(monitor)
    async with beside(qemu) as machine:
        assert (machine.state, machine.migration) == (GuestState.RUNNING, "")
        assert await as_found(machine.monitor) == before


@pytest.mark.parametrize("was_saved", [False, True], ids=["paused", "saved"])
async def test_a_guest_that_was_left_paused_stays_so_and_can_go_on_or_away(
    qemus: Hatchery, was_saved: bool
) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        await_ticks(qemu.ram)
        await machine.pause(MIGRATION)
        if was_saved:
            await machine.save()
        stands_at = ticks(qemu.ram)
    async with beside(qemu) as machine:
        assert (machine.state, machine.migration) == (GuestState.PAUSED, MIGRATION)
        await machine.pause(MIGRATION)
        if was_saved:
            with pytest.raises(CommandRefused, match="paused due to previous migration"):
                await machine.save()
        else:
            assert len(await machine.save()) < 2 * MIB
        assert ticks(qemu.ram) == stands_at
        await machine.resume()
        assert await as_found(machine.monitor) == before
        await_ticks(qemu.ram, stands_at)


async def test_a_guest_whose_state_was_half_saved_when_it_was_left_is_paused(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        before = await as_found(machine.monitor)
        await machine.pause(MIGRATION)
        with reader_that_does_not_read() as fd:
            await machine.monitor.lend("out", fd)
            await machine.monitor.ask("migrate", {"uri": "fd:out"})
    async with beside(qemu) as machine:
        assert (machine.state, machine.migration) == (GuestState.PAUSED, MIGRATION)
        assert await machine.save()
        await machine.resume()
        assert await run_state(machine.monitor) == "running"
        assert await as_found(machine.monitor) == before


async def test_a_guest_that_was_loaded_when_it_was_left_can_be_started(qemus: Hatchery) -> None:
    source, destination = qemus.start(), qemus.start(*INCOMING)
    async with beside(destination) as arriving:
        before = await as_found(arriving.monitor)
        await arriving.expect(MIGRATION)
        async with beside(source) as leaving:
            state, ram = await left(source, leaving)
        filled(destination, ram)
        await arriving.load(state)
    async with beside(destination) as arriving:
        assert (arriving.state, arriving.migration) == (GuestState.INCOMING, MIGRATION)
        assert await run_state(arriving.monitor) == "paused"
        stands_at = ticks(destination.ram)
        await arriving.start()
        await_ticks(destination.ram, stands_at)
    async with beside(destination) as arriving:  # left again, before it was settled
        assert (arriving.state, arriving.migration) == (GuestState.RUNNING, "")
        assert await as_found(arriving.monitor) == before


async def test_one_that_had_only_said_what_it_waits_for_can_be_told_again(qemus: Hatchery) -> None:
    """Left between the memo and `migrate-incoming`: what it has by then are not QEMU's own settings."""
    source, destination = qemus.start(), qemus.start(*INCOMING)
    async with destination.monitor() as monitor:
        await configure(monitor)
        before = await as_found(monitor)
        own = await Settings.of(monitor)
        await MemoStore(monitor, ()).write(Memo(GuestState.INCOMING, MIGRATION, own))
        await own.for_migd().apply(monitor)
    async with beside(destination) as arriving, beside(source) as leaving:
        assert (arriving.state, arriving.migration) == (GuestState.INCOMING, MIGRATION)
        await arriving.expect(MIGRATION)
        state, ram = await left(source, leaving)
        filled(destination, ram)
        await arriving.load(state)
        await arriving.start()
        await arriving.started()
        assert await as_found(arriving.monitor) == before


async def test_one_that_waits_for_a_state_ends_with_whoever_was_to_bring_it(qemus: Hatchery) -> None:
    """QEMU reads the end of the stream, and finds that no state. It has never run: nothing is lost."""
    qemu = qemus.start(*INCOMING)
    async with beside(qemu) as machine:
        await machine.expect(MIGRATION)
    assert qemu.wait() != 0


async def test_a_memo_of_another_version_keeps_us_away_and_qemu_as_it_is(new_qemus: Hatchery) -> None:
    qemu = new_qemus.start()
    async with qemu.monitor() as monitor:
        await monitor.ask("object-add", {"qom-type": "secret", "id": "migd-memo-1", "data": '{"state":"x"}'})
        before = await as_found(monitor)
    open_before = descriptors()
    with pytest.raises(GuestError, match="of another version of migd"):
        async with beside(qemu):
            pass
    assert descriptors() == open_before
    async with qemu.monitor() as monitor:
        assert await as_found(monitor) == before


async def test_disarming_a_guest_that_runs_sets_everything_back(qemus: Hatchery) -> None:
    qemu = qemus.start()
    async with beside(qemu) as machine:
        await configure(machine.monitor)
        before = await as_found(machine.monitor)
        await machine.prepare()
        await machine.disarm()
        assert await as_found(machine.monitor) == before
        await machine.disarm()
        await machine.pause(MIGRATION)
        paused = await as_found(machine.monitor)
        await machine.disarm()  # its daemon died: it stays as it is
        assert await as_found(machine.monitor) == paused
