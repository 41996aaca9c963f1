"""GuestLink and GuestRegistry against a scripted guest: who may attach, and what a bad guest cannot break."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from migd.errors import GuestError, LiveUnsupported, MigdError, Refused, ResourceError
from migd.guest import control
from migd.guest.control import Block, Checked, GuestState
from migd.guest.hosted import HostedGuest
from migd.guest.link import GuestLink
from migd.guest.registry import GuestRegistry
from migd.limits import Limits
from migd.ram.block import BlockShape
from migd.ram.provider import MemfdRam
from tests.guest_daemon.scripted import (
    MIGRATION,
    PAGES,
    ScriptedGuest,
    Visits,
    attach,
    house,
    open_fds,
    ram_fd,
    until,
)

SHAPES = (BlockShape("ram", PAGES),)
RUNNING = control.Running(stopped_at_ns=1, resumed_at_ns=2)


def gone(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


# -- attaching ------------------------------------------------------------------------------------------


async def test_a_new_guest_is_given_sealed_zero_ram_and_a_hint_socket(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        ram, hints = guest.fds
        assert os.fstat(ram).st_size == PAGES * 4096
        assert os.pread(ram, 4096, 0) == bytes(4096)
        seals = fcntl.fcntl(ram, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_GROW
        assert os.fstat(ram).st_ino == os.fstat(hosted.ram.blocks[0].fd).st_ino
        with socket.socket(fileno=os.dup(hints)) as sock:
            assert sock.recv(4) == b"fpH1"
        assert (hosted.name, hosted.state, hosted.pid, hosted.migration) == (
            "vm1", GuestState.RUNNING, os.getpid(), "",
        )  # fmt: skip
        assert home.returned == []


async def test_a_guest_that_leaves_is_forgotten_and_its_descriptors_closed(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        before = open_fds()
        for _ in range(5):
            hosted, guest = await home.attached()
            guest.close()
            await asyncio.wait_for(hosted.lost(), 10)
            await until(lambda: not home.registry.guests)
        assert open_fds() == before
        with pytest.raises(MigdError, match=r"no guest 'vm1' is attached here \(attached: none\)"):
            home.registry.get("vm1")


async def test_a_guest_hands_its_ram_back_after_a_restart(tmp_path: Path) -> None:
    fd = ram_fd()
    os.pwrite(fd, b"mine", 4096)
    async with house(tmp_path) as home:
        hosted, guest = await home.attached(fds=[fd])
        assert len(guest.fds) == 1  # the hint socket only
        assert bytes(hosted.ram.blocks[0].view[1, :4]) == b"mine"
        await until(lambda: home.returned == [hosted])  # its verdict may still be due
    os.close(fd)


@pytest.mark.parametrize("state", [GuestState.PAUSED, GuestState.INCOMING])
async def test_a_guest_that_comes_back_paused_is_reported(tmp_path: Path, state: GuestState) -> None:
    fd = ram_fd()
    async with house(tmp_path) as home:
        hosted, _ = await home.attached(attach(state=state, migration=MIGRATION), [fd])
        await until(lambda: bool(home.returned))
        assert home.returned == [hosted]
        assert (hosted.state, hosted.migration) == (state, MIGRATION)
    os.close(fd)


async def test_epochs_of_two_attachments_never_meet(tmp_path: Path) -> None:
    """R5: not even after a daemon restart, for the guest may still answer an old request."""
    fd, epochs = ram_fd(), set()
    async with house(tmp_path) as home:
        for _ in range(8):
            hosted, guest = await home.attached(fds=[fd])
            epochs.add(hosted.ledger._next_epoch >> 32)
            guest.close()
            await until(lambda: not home.registry.guests)
    os.close(fd)
    assert len(epochs) == 8


# -- declined -------------------------------------------------------------------------------------------


def appending() -> int:
    fd = os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR | os.O_APPEND)
    os.ftruncate(fd, PAGES * 4096)
    return fd


def read_only() -> int:
    fd = ram_fd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


def two_ends() -> int:
    first, second = socket.socketpair()
    second.close()
    return first.detach()


TIB = 1 << 28
DECLINED: list[tuple[str, control.Attach, list[Callable[[], int]], str]] = [
    ("another version", attach(version=2), [], "speaks control version 2, this daemon 1"),
    ("a path as name", attach(name="../vm1"), [], "is no name"),
    ("an empty name", attach(name=""), [], "'' is no name"),
    ("a long name", attach(name="x" * 60_000), [], "is no name"),
    ("a name with a zero", attach(name="vm\0"), [], "is no name"),
    ("a name with a line feed", attach(name="vm1\n"), [], "is no name"),
    ("a block name with a zero", attach(blocks=(Block("r\0m", 1),)), [], "is no name"),
    ("no blocks", attach(blocks=()), [], "1 to 15 RAM blocks, not 0"),
    ("too many blocks", attach(blocks=tuple(Block(f"b{n}", 1) for n in range(16))), [], "not 16"),
    ("a block of no pages", attach(blocks=(Block("ram", 0),)), [], "0 pages is not between"),
    ("a block of negative size", attach(blocks=(Block("ram", -1),)), [], "-1 pages is not between"),
    ("a block beyond all numbers", attach(blocks=(Block("ram", 1 << 63),)), [], "pages of RAM in all"),
    ("more blocks than a guest may have pages", attach(blocks=(Block("a", 1 << 31), Block("b", 1 << 31))), [],
     r"4294967296 pages of RAM in all, a guest has at most 2\^32-1"),
    ("more RAM than there is", attach(blocks=(Block("ram", 15 * TIB),)), [], "MiB of guest RAM wanted"),
    ("paused without RAM", attach(state=GuestState.PAUSED), [], "is paused and brings no RAM"),
    ("incoming, unknown", attach(state=GuestState.INCOMING), [], "is incoming and brings no RAM"),
    ("RAM of another size", attach(), [lambda: ram_fd(PAGES + 1)], "256 pages announced, the file has"),
    ("more descriptors than blocks", attach(), [ram_fd, ram_fd], "1 RAM blocks and 2 descriptors"),
    ("fewer descriptors than blocks", attach(blocks=(Block("a", PAGES), Block("b", PAGES))), [ram_fd],
     "2 RAM blocks and 1 descriptors"),
    ("RAM that is only appended to", attach(), [appending], "opened with O_APPEND"),
    ("RAM that is a socket", attach(), [two_ends], "'ram': the descriptor is no regular file"),
    ("RAM that is a directory", attach(), [lambda: os.open("/", os.O_RDONLY)], "no regular file"),
    ("RAM that cannot be written", attach(), [read_only], "cannot be read and written through"),
    ("RAM that is never written, but could be", attach(read_only=True), [ram_fd], "can be written through"),
    ("RAM that is never written, and none", attach(read_only=True), [], "and brings none"),
    ("a second block that is wrong", attach(blocks=(Block("a", PAGES), Block("b", PAGES))),
     [ram_fd, appending], "RAM block 'b': .*O_APPEND"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "makers", "reason"), DECLINED, ids=[row[0] for row in DECLINED])
async def test_a_guest_that_does_not_fit_is_declined_with_the_reason(
    tmp_path: Path, name: str, message: control.Attach, makers: list[Callable[[], int]], reason: str
) -> None:
    async with house(tmp_path) as home:
        before = open_fds()
        fds = [make() for make in makers]
        guest = home.dial()
        guest.say(message, fds)
        control.close_all(fds)
        answer = await guest.hear()
        assert isinstance(answer, control.Declined)
        with pytest.raises(MigdError, match=reason):
            raise MigdError(answer.reason)
        assert await guest.hear() is None
        guest.close()
        assert home.registry.guests == {}
        assert open_fds() == before


async def test_a_name_can_be_held_once(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, _ = await home.attached()
        second = home.dial()
        second.say(attach())
        answer = await second.hear()
        assert answer == control.Declined(reason="a guest named 'vm1' is attached already")
        assert home.registry.get("vm1") is hosted
        other, _ = await home.attached(attach(name="vm2"))
        assert set(home.registry.guests) == {"vm1", "vm2"}
        with pytest.raises(MigdError, match=r"\(attached: vm1, vm2\)"):
            home.registry.get("vm3")
        assert other is not hosted


@pytest.mark.parametrize(
    ("name", "packet"),
    [
        ("another message", control._encoder.encode(control.Done())),
        ("a daemon's message", control._encoder.encode(control.Quit())),
        ("no JSON", b"\xff\xfe"),
        ("text that is not UTF-8", b'{"type":"failed","reason":"\xff"}'),
        ("nesting without end", b'{"a":' + b"[" * 30_000),
        ("an unknown field", b'{"type":"attach","x":1}'),
        ("a number too large", b'{"type":"checked","pages":1e400,"wrong":0}'),
        ("the largest packet", b"x" * control.MAX_PACKET_BYTES),
        ("more than the largest packet", b"x" * (control.MAX_PACKET_BYTES + 1)),
    ],
)
async def test_a_wrong_first_packet_ends_the_connection_and_nothing_else(
    tmp_path: Path, name: str, packet: bytes
) -> None:
    async with house(tmp_path) as home:
        before = open_fds()
        guest = home.dial()
        fd = ram_fd()
        socket.send_fds(guest.sock, [packet], [fd, fd])
        os.close(fd)
        assert await guest.hear() is None
        guest.close()
        assert open_fds() == before
        await home.attached()


async def test_a_guest_that_closes_at_once(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        for _ in range(3):
            home.dial().close()
        await home.attached()


async def test_a_guest_that_says_nothing_is_dropped(tmp_path: Path) -> None:
    async with house(tmp_path, hello_s=0.05) as home:
        assert await home.dial().hear() is None
        await home.attached()


async def test_a_guest_that_is_gone_before_it_can_be_declined(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        before = open_fds()
        for _ in range(5):
            guest = home.dial()
            guest.say(attach(version=2))
            guest.close()
        await home.attached()
        home.close()
        await until(lambda: open_fds() == before)


async def test_a_guest_that_is_gone_before_it_can_be_attached(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        before = open_fds()
        for number in range(5):
            guest = home.dial()
            guest.say(attach(name=f"vm{number}"))
            guest.close()
        await until(lambda: not home.registry.guests and open_fds() == before)
        await home.attached()


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """As if this process could open so many more."""
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (fd for fd in range(1 << 20) if fd not in used)
    last = 0
    for _ in range(count + 1):
        last = next(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", range(6))
async def test_no_descriptors_left_at_any_step_of_attaching(tmp_path: Path, left: int) -> None:
    """EMFILE in accept, memfd_create, socketpair ...: this guest may fail, the registry must not."""
    async with house(tmp_path) as home:
        guest = home.dial()
        with descriptors_left(left):
            guest.say(attach())
            await asyncio.sleep(0.05)
        guest.close()
        await until(lambda: not home.registry.guests)
        await home.attached(attach(name="vm2"))


async def test_a_guest_that_was_let_go_does_not_keep_its_name(tmp_path: Path) -> None:
    """Its process takes a moment to end, and the guest may be on its way back already."""
    async with house(tmp_path) as home:
        guest, process = await home.attached()
        await guest.release()
        assert isinstance(await process.hear(), control.Quit)
        with pytest.raises(MigdError, match="no guest 'vm1' is attached here"):
            home.registry.get("vm1")
        back = home.registry.create("vm1", MIGRATION, SHAPES)
        process.close()
        await until(lambda: home.visits.seen == [("attached", "vm1"), ("detached", "vm1")])
        assert home.registry.get("vm1") is back
        await back.discard()


def test_a_socket_that_cannot_be_made(tmp_path: Path) -> None:
    async def returned(_guest: HostedGuest) -> None: ...

    for path in (tmp_path / "no" / "guest.sock", tmp_path / ("x" * 120)):
        with pytest.raises(ResourceError, match=f"guest socket {path}: "):
            GuestRegistry(path, tmp_path, ["true"], Limits(), returned, Visits(), ram=MemfdRam())


async def test_the_socket_is_private_and_removed_in_the_end(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        assert home.path.stat().st_mode & 0o777 == 0o600
        await home.attached()
    assert not home.path.exists()


# -- requests and answers ---------------------------------------------------------------------------------


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[GuestLink, ScriptedGuest]]:
    """A link and the guest at its other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    link, guest = GuestLink(ours, "vm1"), ScriptedGuest(theirs)
    try:
        yield link, guest
    finally:
        link.close()
        guest.close()


async def test_answers_find_their_requests_in_any_order() -> None:
    async with linked() as (link, guest):
        arm = asyncio.create_task(link.ask(control.Arm(), control.Armed, 10))
        disarm = asyncio.create_task(link.order(control.Disarm(), control.Done, 10))
        first, second = await guest.hear(), await guest.hear()
        assert isinstance(first, control.Arm)
        assert isinstance(second, control.Disarm)
        assert first.id != second.id
        guest.say(control.Done(id=second.id))
        guest.say(control.Armed(id=first.id, addresses=(4096,)))
        assert await disarm == control.Done(id=second.id)
        assert await arm == (control.Armed(id=first.id, addresses=(4096,)), [])


async def test_silence_is_a_guest_error() -> None:
    async with linked() as (link, _):
        with pytest.raises(GuestError, match=r"guest vm1 did not answer PAUSE within 0\.02 s"):
            await link.ask(control.Pause(migration=MIGRATION), control.Paused, 0.02)


async def test_a_refusal_and_a_wrong_answer_are_told_apart() -> None:
    async with linked() as (link, guest):
        asking = asyncio.create_task(link.ask(control.Arm(), control.Armed, 10))
        await guest.answer(control.Failed(reason="no userfaultfd"))
        with pytest.raises(GuestError, match="guest vm1 refused ARM: no userfaultfd"):
            await asking
        before = open_fds()
        asking = asyncio.create_task(link.ask(control.Arm(), control.Armed, 10))
        await guest.answer(control.Done(), [0, 0])
        with pytest.raises(GuestError, match="guest vm1 answered ARM with Done"):
            await asking
        assert open_fds() == before


async def test_a_late_answer_is_dropped_and_its_descriptors_closed() -> None:
    async with linked() as (link, guest):
        before = open_fds()
        for _ in range(5):
            with pytest.raises(GuestError, match="did not answer"):
                await link.ask(control.Arm(), control.Armed, 0.01)
            await guest.answer(control.Armed(addresses=(0,)), [0, 0, 0])
        guest.say(control.Armed(id=999, addresses=(0,)), [0])  # never asked for
        guest.say(control.Armed(addresses=(0,)), [0])
        asking = asyncio.create_task(link.order(control.Disarm(), control.Done, 10))
        await guest.answer(control.Done())
        await asking
        assert open_fds() == before


async def test_an_answer_in_the_moment_of_the_time_out_leaks_nothing() -> None:
    """A loop that was busy finds both in one iteration: the answer first, then the time-out."""
    async with linked() as (link, guest):
        before = open_fds()
        asking = asyncio.create_task(link.ask(control.Arm(), control.Armed, 0.05))
        await guest.answer(control.Armed(addresses=(0,)), [0, 0])
        time.sleep(0.1)  # noqa: ASYNC251  # this is the point
        with pytest.raises(GuestError, match="did not answer"):
            await asking
        assert open_fds() == before


async def test_a_cancelled_request_leaks_nothing() -> None:
    async with linked() as (link, guest):
        before = open_fds()
        asking = asyncio.create_task(link.ask(control.Arm(), control.Armed, 10))
        await guest.answer(control.Armed(addresses=(0,)), [0, 0])
        link._readable()
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        assert open_fds() == before


async def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    async with linked() as (link, guest):
        before = open_fds()
        asking = asyncio.create_task(link.order(control.Resume(), control.Running, 10))
        await guest.answer(RUNNING, [0] * 16)
        await asking
        guest.say(Checked(pages=1, wrong=0), [0] * 16)
        assert (await asyncio.wait_for(asyncio.shield(link.checked), 10)).pages == 1
        assert open_fds() == before


async def test_a_guest_that_dies_ends_every_request() -> None:
    async with linked() as (link, guest):
        asking = [
            asyncio.create_task(link.ask(control.Arm(), control.Armed, 10)),
            asyncio.create_task(link.ask(control.Disarm(), control.Done, 10)),
        ]
        await guest.hear()
        guest.close()
        for one in asking:
            with pytest.raises(GuestError, match="guest vm1 closed its control connection"):
                await one
        assert link.gone.is_set()
        assert link.checked.cancelled()
        with pytest.raises(GuestError, match="guest vm1 is not connected"):
            link.tell(control.Quit())
        link.close()


@pytest.mark.parametrize(
    "packet", [b"garbage", b'{"type":"quit"}', b'{"a":' + b"[" * 30_000, b'{"type":"\xff"}']
)
async def test_garbage_gives_the_guest_up(packet: bytes) -> None:
    async with linked() as (link, guest):
        before = open_fds()
        asking = asyncio.create_task(link.ask(control.Arm(), control.Armed, 10))
        await guest.hear()
        socket.send_fds(guest.sock, [packet], [0, 0])
        with pytest.raises(GuestError, match="closed its control connection"):
            await asking
        assert open_fds() == before - 1  # the link's own socket


async def test_a_guest_that_does_not_read_does_not_block_the_daemon() -> None:
    async with linked() as (link, _):

        def fill() -> None:
            for _ in range(100_000):
                link.tell(control.Pause(migration=MIGRATION))

        with pytest.raises(GuestError, match="guest vm1 does not read its control socket"):
            fill()


# -- HostedGuest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "fds", "error"),
    [
        ("no pagemap", control.Armed(addresses=(4096,)), 0, r"armed 1 blocks with 0 descriptors"),
        ("two pagemaps", control.Armed(addresses=(4096,)), 2, r"armed 1 blocks with 2 descriptors"),
        ("no address", control.Armed(addresses=()), 1, r"armed 0 blocks with 1 descriptors"),
        ("an address too many", control.Armed(addresses=(0, 0)), 1, r"armed 2 blocks with 1 descriptors"),
        ("something else as pagemap", control.Armed(addresses=(4096,)), 1, r"dirty log|pagemap|armed"),
        ("a negative address", control.Armed(addresses=(-1,)), 1, r"impossible address"),
        ("a huge address", control.Armed(addresses=(1 << 70,)), 1, r"impossible address"),
        ("another answer", control.Done(), 1, r"answered ARM with Done"),
    ],
)
async def test_arming_with_a_guest_that_lies(
    tmp_path: Path, name: str, answer: control.Message, fds: int, error: str
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        null = os.open("/dev/null", os.O_RDONLY)
        before = open_fds()
        arming = asyncio.create_task(hosted.arm())
        await guest.answer(answer, [null] * fds)
        with pytest.raises(GuestError, match=error):
            await arming
        assert open_fds() == before
        os.close(null)


async def test_a_guest_that_cannot_arm_says_why(tmp_path: Path) -> None:
    """Then the session compares content, unless it was told not to (tests/sessions/test_compare_log.py)."""
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        arming = asyncio.create_task(hosted.arm())
        await guest.answer(control.Failed(reason="the kernel cannot track writes"))
        with pytest.raises(LiveUnsupported, match="refused ARM: the kernel cannot track writes") as error:
            await arming
        assert error.value.exit_code == 3


async def test_pausing_takes_state_and_bitmap(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        before = open_fds()
        blobs = [control.blob_fd(b"device state"), control.blob_fd(b"\x03" + bytes(PAGES // 8 - 1))]
        pausing = asyncio.create_task(hosted.pause(MIGRATION))
        request = await guest.answer(control.Paused(), blobs)
        control.close_all(blobs)
        assert isinstance(request, control.Pause)
        assert request.migration == MIGRATION
        report = await pausing
        assert report.device_state == b"device state"
        assert report.free is not None
        assert list(report.free.runs()) == [(0, 2)]
        assert (hosted.state, hosted.migration) == (GuestState.PAUSED, MIGRATION)
        assert open_fds() == before


def bitmap() -> int:
    return control.blob_fd(bytes(PAGES // 8))


def directory() -> int:
    return os.open("/", os.O_RDONLY)


def write_only() -> int:
    fd = bitmap()
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    os.close(fd)
    return again


def too_large() -> int:
    fd = os.memfd_create("huge")
    os.ftruncate(fd, control.MAX_BLOB_BYTES + 1)
    return fd


@pytest.mark.parametrize(
    ("name", "makers", "error"),
    [
        ("none", [], "paused with 0 descriptors, not 2"),
        ("no bitmap", [bitmap], "paused with 1 descriptors, not 2"),
        ("one too many", [bitmap, bitmap, bitmap], "paused with 3 descriptors, not 2"),
        ("a short bitmap", [bitmap, lambda: control.blob_fd(bytes(PAGES // 8 - 1))], "a free bitmap of 31"),
        ("a long bitmap", [bitmap, lambda: control.blob_fd(bytes(PAGES // 8 + 1))], "a free bitmap of 33"),
        ("an empty bitmap", [bitmap, lambda: control.blob_fd(b"")], "a free bitmap of 0"),
        ("a directory", [directory, bitmap], "its state cannot be read: Is a directory"),
        ("a file for writing only", [write_only, bitmap], "its state cannot be read: Bad file descriptor"),
        ("a socket", [bitmap, two_ends], "a free bitmap of 0"),
        ("more than there may be", [too_large, bitmap], "more than 1073741824"),
    ],
)
async def test_pausing_with_wrong_blobs(
    tmp_path: Path, name: str, makers: list[Callable[[], int]], error: str
) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        before = open_fds()
        fds = [make() for make in makers]
        pausing = asyncio.create_task(hosted.pause(MIGRATION))
        await guest.answer(control.Paused(), fds)
        control.close_all(fds)
        with pytest.raises(GuestError, match=error):
            await pausing
        assert open_fds() == before
        # It may be paused now: it can be resumed.
        resuming = asyncio.create_task(hosted.resume())
        await guest.answer(RUNNING)
        await resuming
        assert (hosted.state, hosted.migration) == (GuestState.RUNNING, "")


async def test_a_guest_that_resumes_late_can_leave_again(tmp_path: Path) -> None:
    async with house(tmp_path, guest_s=0.2) as home:
        hosted, guest = await home.attached()
        pausing = asyncio.create_task(hosted.pause(MIGRATION))
        request = await guest.hear()
        assert request is not None
        with pytest.raises(GuestError, match="did not answer PAUSE"):
            await pausing
        with pytest.raises(GuestError, match="did not answer RESUME"):
            await hosted.resume()
        # Both orders are on their way, and it obeys in their order: it will run.
        assert (hosted.state, hosted.migration) == (GuestState.RUNNING, "")


async def test_a_guest_that_refuses_to_resume_stays_paused(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        hosted.state, hosted.migration = GuestState.PAUSED, MIGRATION
        resuming = asyncio.create_task(hosted.resume())
        await guest.answer(control.Failed(reason="it has not started here"))
        with pytest.raises(GuestError, match="refused RESUME"):
            await resuming
        assert (hosted.state, hosted.migration) == (GuestState.PAUSED, MIGRATION)


async def test_a_guest_that_dies_while_it_is_asked(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        pausing = asyncio.create_task(hosted.pause(MIGRATION))
        await guest.hear()
        guest.close()
        with pytest.raises(GuestError, match="closed its control connection"):
            await pausing
        await asyncio.wait_for(hosted.lost(), 10)
        with pytest.raises(GuestError, match="not connected"):
            await hosted.resume()
        await hosted.release()  # nothing to tell, no error


async def test_a_released_guest_is_told_to_quit(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        await hosted.release()
        assert await guest.hear() == control.Quit()


# -- incoming guests --------------------------------------------------------------------------------------


async def test_an_incoming_guest_from_spawn_to_check(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        assert hosted.process is not None
        _, guest = await home.attached(attach(state=GuestState.INCOMING, migration=MIGRATION, blocks=()))
        await asyncio.wait_for(hosted.attached(), 10)
        assert home.returned == []
        loading = asyncio.create_task(hosted.load(b"device state"))
        request = await guest.hear()
        assert isinstance(request, control.Load)
        assert control.blob_bytes(guest.fds[0]) == b"device state"
        guest.say(control.Done(id=request.id))
        await loading
        starting = asyncio.create_task(hosted.start())
        await guest.answer(control.Running(stopped_at_ns=5, resumed_at_ns=9))
        assert (await starting).resumed_at_ns == 9
        assert (hosted.state, hosted.migration) == (GuestState.RUNNING, "")
        checking = asyncio.create_task(hosted.self_check())
        guest.say(Checked(pages=10, wrong=1, first_wrong=3))
        check = await checking
        assert (check.pages, check.wrong, check.first_wrong) == (10, 1, 3)


async def test_a_guest_that_ends_before_its_check(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        hosted, guest = await home.attached()
        checking = asyncio.create_task(hosted.self_check())
        await asyncio.sleep(0)
        guest.close()
        with pytest.raises(GuestError, match="ended before its self-check"):
            await checking


@pytest.mark.parametrize(
    ("message", "fds", "reason"),
    [
        (attach(state=GuestState.INCOMING, migration="f" * 32), 0, "attached already"),
        (attach(state=GuestState.INCOMING, migration=MIGRATION), 1, "is given its RAM here and brings 1"),
        (attach(version=9, state=GuestState.INCOMING, migration=MIGRATION), 0, "version 9"),
    ],
)
async def test_only_the_spawned_guest_gets_its_ram(
    tmp_path: Path, message: control.Attach, fds: int, reason: str
) -> None:
    async with house(tmp_path) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        before = open_fds()
        guest = home.dial()
        guest.say(message, [0] * fds)
        answer = await guest.hear()
        assert isinstance(answer, control.Declined)
        assert reason in answer.reason
        guest.close()
        assert open_fds() == before
        # The right one still may, once; whatever it says its pid is.
        good = attach(state=GuestState.INCOMING, migration=MIGRATION, pid=0)
        _, spawned = await home.attached(good)
        await asyncio.wait_for(hosted.attached(), 10)
        again = home.dial()
        again.say(good)
        assert isinstance(await again.hear(), control.Declined)
        assert spawned.fds


async def test_a_process_that_never_attaches(tmp_path: Path) -> None:
    async with house(tmp_path, begin_s=0.05) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        with pytest.raises(GuestError, match=r"process of guest vm1 did not attach within 0\.05 s"):
            await hosted.attached()
        await hosted.discard()
        await until(lambda: not home.registry.guests)


async def test_a_process_that_ends_at_once_is_missed(tmp_path: Path) -> None:
    async with house(tmp_path, ["sh", "-c", "echo output of {name}; exit 3"]) as home:
        before = open_fds()
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        await asyncio.wait_for(hosted.lost(), 10)
        hosted.unpin(MIGRATION)
        assert home.registry.guests == {}
        assert (tmp_path / "guest-vm1.log").read_text() == "output of vm1\n"
        await until(lambda: open_fds() == before)


async def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    async with house(tmp_path, ["/no/such/program"]) as home:
        before = open_fds()
        with pytest.raises(ResourceError, match="starting /no/such/program for guest vm1: No such file"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        assert home.registry.guests == {}
        assert open_fds() == before


async def test_only_the_three_names_in_braces_are_replaced(tmp_path: Path) -> None:
    """The command may be a shell's or QEMU's, with braces of its own."""
    script = 'x=1; echo "{socket} {name} {migration} ${x} {} {other}"'
    async with house(tmp_path, ["sh", "-c", script]) as home:
        hosted = home.registry.create("vm1", MIGRATION, SHAPES)
        await asyncio.wait_for(hosted.lost(), 10)
        said = (tmp_path / "guest-vm1.log").read_text()
        assert said == f"{home.path} vm1 {MIGRATION} 1 {{}} {{other}}\n"
        hosted.unpin(MIGRATION)


async def test_a_discarded_guest_makes_room_at_once(tmp_path: Path) -> None:
    """The next attempt may come before the process of the one before it is reaped."""
    async with house(tmp_path) as home:
        for _ in range(3):
            hosted = home.registry.create("vm1", MIGRATION, SHAPES)
            await hosted.discard()
        last = home.registry.create("vm1", MIGRATION, SHAPES)
        with pytest.raises(Refused, match="a guest named 'vm1' is here already"):
            home.registry.create("vm1", MIGRATION, SHAPES)
        await asyncio.sleep(0.05)
        assert home.registry.get("vm1") is last
        await last.discard()


async def test_more_ram_than_there_is_is_not_promised(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        with pytest.raises(ResourceError, match=r"guest RAM wanted, \d+ MiB can be given"):
            home.registry.create("vm1", MIGRATION, (BlockShape("ram", 1 << 32),))
        assert home.registry.guests == {}
