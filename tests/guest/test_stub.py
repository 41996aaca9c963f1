"""The stub guest as a process of its own, driven by a small daemon in the test over real sockets."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from migd.errors import ConfigError
from migd.guest import control, hints
from migd.guest.hint_answers import FRAME_PAGES, answer
from migd.guest.options import GuestOptions
from migd.guest.stub import run_guest
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES, BlockShape, RamBlock
from migd.ram.dirty_log import ArmedRange, KernelDirtyLog
from tests.support.placing import put_pages

PAGES = 32 << 8  # 32 MiB
RAM_BYTES = PAGES * PAGE_BYTES
WAIT_S = 10.0
CODE = """
import sys
from migd.guest import options, stub
{before}
sys.exit(stub.run_guest(options.GuestOptions(**{options})))
"""

M = TypeVar("M")


@dataclass
class Connection:
    """One guest, attached. Requests are answered in order, but for Checked."""

    control: socket.socket
    attach: control.Attach
    fds: list[int]
    hint_socket: socket.socket | None = None
    checked: list[control.Checked] = field(default_factory=list)
    frames: hints.HintDecoder = field(default_factory=hints.HintDecoder)
    last_id: int = 0

    def accept(self, blocks: tuple[control.Block, ...], ram_fds: list[int]) -> None:
        """Attach it, with a hint socket."""
        self.hint_socket, theirs = socket.socketpair()
        self.hint_socket.settimeout(WAIT_S)
        with theirs:
            answer = control.Attached(id=self.attach.id, blocks=blocks)
            control.send(self.control, answer, [*ram_fds, theirs.fileno()])

    def ask(self, kind: Callable[..., control.ToGuest], fds: list[int] | None = None, **fields: str) -> None:
        self.last_id += 1
        control.send(self.control, kind(id=self.last_id, **fields), fds)

    def expect(self, kind: type[M]) -> tuple[M, list[int]]:
        """The answer to the last request."""
        while True:
            packet = control.receive_from_guest(self.control)
            assert packet is not None, f"the guest hung up instead of {kind.__name__}"
            message, fds = packet
            if isinstance(message, control.Checked) and kind is not control.Checked:
                self.checked.append(message)
                continue
            assert isinstance(message, kind), message
            assert message.id == (0 if kind is control.Checked else self.last_id)
            return message, fds

    def report(self) -> control.Checked:
        """Its self-check, come or to come."""
        return self.checked.pop() if self.checked else self.expect(control.Checked)[0]

    def pause(self, migration: str) -> tuple[bytes, PageBitmap]:
        self.ask(control.Pause, migration=migration)
        _, fds = self.expect(control.Paused)
        state, free = (control.blob_bytes(fd) for fd in fds)
        control.close_all(fds)
        return state, PageBitmap.from_bytes(free, PAGES)

    def next_frames(self) -> list[hints.HintFrame]:
        assert self.hint_socket is not None
        data = self.hint_socket.recv(1 << 16)
        assert data, "the guest closed its hint socket"
        return self.frames.feed(data)

    def request(self, epoch: int) -> tuple[PageBitmap, int]:
        """Its free pages as hinted, and as counted."""
        assert self.hint_socket is not None
        self.hint_socket.sendall(hints.encode(hints.Request(epoch)))
        free = PageBitmap(PAGES)
        while True:
            for frame in self.next_frames():
                assert getattr(frame, "epoch", 0) == epoch
                match frame:
                    case hints.Ranges(_, ranges):
                        for start, length in ranges:
                            free.add_run(start // PAGE_BYTES, (start + length) // PAGE_BYTES)
                    case hints.Bitmap(_, start, pages, bits):
                        assert start + pages * PAGE_BYTES <= RAM_BYTES
                        free |= PageBitmap.from_bytes(bits, PAGES, start // PAGE_BYTES)
                    case hints.End(_, pages):
                        return free, pages

    def close(self) -> None:
        self.control.close()
        if self.hint_socket is not None:
            self.hint_socket.close()
        control.close_all(self.fds)
        self.fds = []


class Daemon:
    """Listens for guests; every process and connection it saw ends with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.guests: list[subprocess.Popen[str]] = []
        self.connections: list[Connection] = []
        self.listen()

    def listen(self) -> None:
        self.listener = control.new_socket()
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.settimeout(WAIT_S)

    def spawn(self, before: str = "", **options: object) -> subprocess.Popen[str]:
        given = {"daemon": str(self.path), "name": "vm1", **options}
        code = CODE.format(before=before, options=given)
        guest = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.guests.append(guest)
        return guest

    def connection(self) -> Connection:
        sock, _ = self.listener.accept()
        sock.settimeout(WAIT_S)
        packet = control.receive_from_guest(sock)
        assert packet is not None
        attach, fds = packet
        assert isinstance(attach, control.Attach)
        connection = Connection(sock, attach, fds)
        self.connections.append(connection)
        return connection

    def new_guest(self, **options: object) -> tuple[subprocess.Popen[str], Connection, RamBlock]:
        """A guest that is ready."""
        guest = self.spawn(**{"ram_bytes": (RAM_BYTES,), **options})
        connection = self.connection()
        ram = RamBlock.create(BlockShape("ram", PAGES))
        connection.accept(connection.attach.blocks, [ram.fd])
        assert line(guest).startswith("guest vm1 ready: 8192 pages")
        return guest, connection, ram

    def incoming_guest(self, ram: RamBlock, **options: object) -> tuple[subprocess.Popen[str], Connection]:
        guest = self.spawn(incoming="m1", **options)
        connection = self.connection()
        assert connection.attach.state is control.GuestState.INCOMING
        assert connection.attach.migration == "m1"
        assert connection.attach.blocks == ()
        connection.accept((control.Block("ram", ram.pages),), [ram.fd])
        return guest, connection

    def close(self) -> None:
        for guest in self.guests:
            guest.kill()
            guest.communicate()
        for connection in self.connections:
            connection.close()
        self.listener.close()


def line(guest: subprocess.Popen[str]) -> str:
    """The first that is not about filling, of which a guest speaks after a second."""
    assert guest.stdout is not None
    ready, _, _ = select.select([guest.stdout], [], [], WAIT_S)
    assert ready, "the guest says nothing"
    return next(said for said in guest.stdout if "filling" not in said)


def end(guest: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = guest.communicate(timeout=WAIT_S)
    return guest.returncode, out, err


def load(connection: Connection, state: bytes) -> None:
    fd = control.blob_fd(state)
    connection.ask(control.Load, [fd])
    os.close(fd)


def copied(ram: RamBlock, free: PageBitmap) -> RamBlock:
    """Fresh RAM with the pages that are not free, as a migration leaves it."""
    copy = RamBlock.create(BlockShape("ram", ram.pages))
    owned = (PageBitmap.full(ram.pages) - free).indices()
    put_pages(copy, owned, ram.read(owned, np.empty((len(owned), PAGE_BYTES), np.uint8)))
    return copy


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "guests.sock")
    yield daemon
    daemon.close()


def test_it_starts_without_numpy() -> None:
    """70-100 ms of CPU that an incoming guest would take from the migration it waits for."""
    code = "import sys, migd.guest.stub; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- a migration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "contract"), [("churn", "zero"), ("hog", "anything"), ("idle", "none")])
def test_it_moves_to_a_second_process_and_finds_every_page_right(
    daemon: Daemon, workload: str, contract: str
) -> None:
    guest, source, ram = daemon.new_guest(workload=workload, contract=contract)
    assert source.attach.pid == guest.pid
    state, free = source.pause("m1")
    assert 0 < PAGES - free.count() <= PAGES * 0.06
    frozen = ram.view.copy()
    assert source.pause("m1")[0] == state
    new_ram = copied(ram, free)
    incoming, destination = daemon.incoming_guest(new_ram)
    load(destination, state)
    destination.expect(control.Done)
    destination.ask(control.Start)
    running, _ = destination.expect(control.Running)
    assert running.stopped_at_ns < running.resumed_at_ns < time.time_ns()
    report = destination.report()
    assert (report.wrong, report.first_wrong) == (0, -1)
    assert report.pages == PAGES - free.count()
    assert line(incoming) == f"guest vm1 checked: {report.pages} pages, 0 wrong\n"
    assert (ram.view == frozen).all()  # the paused one wrote nothing
    destination.ask(control.Start)
    assert destination.expect(control.Running)[0].resumed_at_ns == running.resumed_at_ns
    source.ask(control.Quit)
    assert end(guest)[0] == 0
    # ... and on from there, with everything it wrote since.
    state, free = destination.pause("m2")
    _, third = daemon.incoming_guest(copied(new_ram, free))
    load(third, state)
    third.expect(control.Done)
    third.ask(control.Start)
    third.expect(control.Running)
    assert third.report().wrong == 0


def test_a_lost_page_is_reported(daemon: Daemon) -> None:
    _, source, ram = daemon.new_guest(workload="write-heavy")
    state, free = source.pause("m1")
    new_ram = copied(ram, free)
    lost = (PageBitmap.full(PAGES) - free).indices()[3]
    new_ram.view[lost, 4095] ^= 1
    _, destination = daemon.incoming_guest(new_ram)
    load(destination, state)
    destination.expect(control.Done)
    destination.ask(control.Start)
    destination.expect(control.Running)
    report = destination.report()
    assert (report.wrong, report.first_wrong) == (1, lost)


def test_after_a_failed_attempt_it_goes_on(daemon: Daemon) -> None:
    _, source, ram = daemon.new_guest(workload="write-heavy")
    source.pause("m1")
    before = ram.view.copy()
    source.ask(control.Resume)
    running, _ = source.expect(control.Running)
    source.ask(control.Resume)
    assert source.expect(control.Running)[0] == control.Running(
        id=source.last_id, stopped_at_ns=running.stopped_at_ns, resumed_at_ns=running.resumed_at_ns
    )
    time.sleep(0.05)
    source.pause("m1")
    assert (ram.view != before).any()


def test_what_an_incoming_guest_cannot_do_is_refused_with_a_reason(daemon: Daemon) -> None:
    ram = RamBlock.create(BlockShape("ram", PAGES))
    _, guest = daemon.incoming_guest(ram)
    for kind, fields in [
        (control.Start, {}),
        (control.Arm, {}),
        (control.Resume, {}),
        (control.Pause, {"migration": "m1"}),
        (control.Load, {}),
    ]:
        guest.ask(kind, **fields)
        assert guest.expect(control.Failed)[0].reason
    load(guest, b"garbage that is no device state at all")
    assert "device state" in guest.expect(control.Failed)[0].reason
    guest.ask(control.Disarm)
    guest.expect(control.Done)


# -- the dirty log ----------------------------------------------------------------------------------


def test_what_it_writes_is_harvested_from_outside(daemon: Daemon) -> None:
    _, guest, ram = daemon.new_guest(workload="churn", rate_bytes_s=20_000_000)
    for _ in range(2):  # the second ARM replaces the first
        guest.ask(control.Arm)
        armed, fds = guest.expect(control.Armed)
    log = KernelDirtyLog(fds[0], [ArmedRange(armed.addresses[0], PAGES, 0)], PAGES)
    log.collect()
    before = ram.view.copy()
    time.sleep(0.1)
    guest.pause("m1")
    changed = np.flatnonzero((ram.view != before).any(axis=1))
    assert len(changed)
    assert set(changed.tolist()) <= set(log.collect().indices().tolist())
    assert not log.collect()
    guest.ask(control.Disarm)
    guest.expect(control.Done)
    log.close()


# -- hints ------------------------------------------------------------------------------------------


def test_its_hints_are_its_free_list(daemon: Daemon) -> None:
    _, guest, _ = daemon.new_guest(workload="hog", contract="zero")
    assert guest.hint_socket is not None
    guest.hint_socket.sendall(hints.encode(hints.Greet()))
    assert guest.next_frames() == [hints.Hello(2, hints.Strength.STRONG, PAGE_BYTES, PAGES)]
    _, free = guest.pause("m1")
    guest.hint_socket.sendall(b"garbage" + hints.encode(hints.Done(0)))
    for epoch in (1, 2):
        assert guest.request(epoch) == (free, free.count())


def test_a_hint_socket_that_is_never_read_costs_the_guest_nothing(daemon: Daemon) -> None:
    _, guest, _ = daemon.new_guest(workload="write-heavy")
    assert guest.hint_socket is not None
    guest.hint_socket.settimeout(0.2)
    flood = hints.encode(hints.Greet()) + hints.encode(hints.Request(1))
    for _ in range(3000):
        try:
            guest.hint_socket.send(flood)
        except TimeoutError:
            break
    guest.ask(control.Disarm)
    guest.expect(control.Done)
    guest.hint_socket.close()
    guest.ask(control.Disarm)
    guest.expect(control.Done)


@pytest.mark.parametrize("pages", [1, 7, 64, FRAME_PAGES + 13])
@pytest.mark.parametrize("every", [1, 2, 1000])
def test_an_answer_is_small_frames_that_add_up(pages: int, every: int) -> None:
    free = PageBitmap.of(pages, range(0, pages, every))
    decoder, found = hints.HintDecoder(), PageBitmap(pages)
    for data in answer(9, free.to_bytes(), pages):
        assert len(data) < 1 << 19
        for frame in decoder.feed(data):
            match frame:
                case hints.Ranges(9, ranges):
                    for start, length in ranges:
                        found.add_run(start // PAGE_BYTES, (start + length) // PAGE_BYTES)
                case hints.Bitmap(9, start, count, bits):
                    assert start // PAGE_BYTES + count <= pages
                    found |= PageBitmap.from_bytes(bits, pages, start // PAGE_BYTES)
                case hints.End(9, total):
                    assert total == free.count()
    assert found == free
    assert decoder.garbage_bytes == decoder.rejected_frames == 0


# -- losing the daemon ------------------------------------------------------------------------------


def test_it_outlives_its_daemon_and_hands_its_ram_back(daemon: Daemon) -> None:
    guest, first, ram = daemon.new_guest(workload="churn")
    first.ask(control.Arm)
    first.expect(control.Armed)
    daemon.listener.close()
    daemon.path.unlink()
    first.close()
    before = ram.view.copy()
    time.sleep(0.3)
    assert (ram.view != before).any()
    daemon.listen()
    second = daemon.connection()
    assert second.attach.state is control.GuestState.RUNNING
    assert second.attach.blocks == (control.Block("ram", PAGES),)
    assert RamBlock.adopt(BlockShape("ram", PAGES), second.fds.pop()).view.shape == ram.view.shape
    second.accept(second.attach.blocks, [])
    _, free = second.pause("m7")
    assert second.request(1) == (free, free.count())
    second.close()
    third = daemon.connection()
    assert third.attach.state is control.GuestState.PAUSED
    assert third.attach.migration == "m7"
    third.accept(third.attach.blocks, [])
    third.ask(control.Resume)
    third.expect(control.Running)
    assert guest.poll() is None


def test_a_declined_return_is_tried_again(daemon: Daemon) -> None:
    guest, first, _ = daemon.new_guest(workload="idle")
    first.close()
    for _ in range(2):
        again = daemon.connection()
        control.send(again.control, control.Declined(reason="busy"))
    again = daemon.connection()
    again.accept(again.attach.blocks, [])
    again.ask(control.Quit)
    code, _, err = end(guest)
    assert (code, err) == (0, "guest vm1: the daemon declined: busy\n")


def test_a_loaded_guest_survives_its_daemon_and_is_started_by_the_next(daemon: Daemon) -> None:
    _, source, ram = daemon.new_guest()
    state, free = source.pause("m1")
    _, first = daemon.incoming_guest(copied(ram, free))
    load(first, state)
    first.expect(control.Done)
    first.close()
    second = daemon.connection()
    assert (second.attach.state, second.attach.migration) == (control.GuestState.INCOMING, "m1")
    assert second.attach.blocks == (control.Block("ram", PAGES),)
    second.accept(second.attach.blocks, [])
    second.ask(control.Start)
    second.expect(control.Running)
    assert second.report().wrong == 0


def test_an_incoming_guest_without_a_daemon_does_not_wait_for_ever(daemon: Daemon) -> None:
    ram = RamBlock.create(BlockShape("ram", PAGES))
    guest, connection = daemon.incoming_guest(ram, before="stub.ORPHAN_S = 0.3")
    connection.ask(control.Disarm)
    connection.expect(control.Done)
    daemon.listener.close()
    connection.close()
    code, _, err = end(guest)
    assert code == 1
    assert "never started" in err


def test_a_false_hint_socket_does_not_end_it(daemon: Daemon) -> None:
    _, first, ram = daemon.new_guest(workload="idle")
    first.close()
    again = daemon.connection()
    control.send(again.control, control.Attached(blocks=again.attach.blocks), [ram.fd])
    again.expect(control.Failed)
    again.ask(control.Disarm)
    again.expect(control.Done)


# -- how it ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workload", ["idle", "write-heavy"])
def test_a_signal_ends_it_between_two_slices(
    daemon: Daemon, number: signal.Signals, code: int, workload: str
) -> None:
    guest, _, _ = daemon.new_guest(workload=workload)
    guest.send_signal(number)
    assert (result := end(guest))[0] == code
    assert "0 wrong" in result[1]
    assert result[2] == ""


def test_declined_is_one_line_and_exit_3(daemon: Daemon) -> None:
    guest = daemon.spawn(ram_bytes=(RAM_BYTES,))
    control.send(daemon.connection().control, control.Declined(reason="the name is taken"))
    assert end(guest) == (3, "", "guest vm1: the daemon declined: the name is taken\n")


def test_ram_of_the_wrong_size_is_no_ram(daemon: Daemon) -> None:
    guest = daemon.spawn(ram_bytes=(RAM_BYTES,))
    connection = daemon.connection()
    ram = RamBlock.create(BlockShape("ram", PAGES - 1))
    connection.accept(connection.attach.blocks, [ram.fd])
    code, _, err = end(guest)
    assert code == 1
    assert f"{PAGES} pages announced, {RAM_BYTES - PAGE_BYTES} bytes passed" in err


def test_it_answers_while_it_fills(daemon: Daemon) -> None:
    guest = daemon.spawn(ram_bytes=(RAM_BYTES * 8,), workload="hog")
    connection = daemon.connection()
    ram = RamBlock.create(BlockShape("ram", PAGES * 8))
    connection.accept(connection.attach.blocks, [ram.fd])
    connection.ask(control.Pause, migration="m1")
    connection.expect(control.Paused)
    assert guest.stdout is not None
    assert not select.select([guest.stdout], [], [], 0)[0]
    connection.ask(control.Resume)
    connection.expect(control.Running)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"name": ""}, "--name"),
        ({"ram_bytes": (4097,)}, "--ram: 4097 bytes"),
        ({"ram_bytes": (0,)}, "--ram: 0 bytes"),
        ({"ram_bytes": (4096, -4096)}, "--ram: -4096 bytes"),
        ({"ram_bytes": ()}, "--ram: a guest has 1 to 15 RAM blocks, not 0"),
        ({"ram_bytes": (4096,) * 16}, "--ram: a guest has 1 to 15 RAM blocks, not 16"),
        ({"free": "bits"}, "--free: it says what is free in an --image"),
        ({"image": "ram"}, "--ram: the RAM of an image is as large as its file"),
        ({"image": "ram", "ram_bytes": (), "workload": "churn"}, "--workload: .* idle, not churn"),
        ({"workload": "weird"}, "--workload"),
        ({"contract": "poison"}, "--contract"),
        ({"live_fraction": 0.0}, "--live"),
        ({"live_fraction": 1.5}, "--live"),
        ({"rest": "dirty"}, "--rest"),
        ({"run_pages": 63}, "--run-pages: 63 is not between 0 and 62"),
        ({"run_pages": 4, "live_fraction": 0.5}, "--run-pages: with --live above 0.4"),
        ({"rate_bytes_s": -1}, "--rate"),
        ({"seed": -1}, "--seed"),
        ({"fill": ("/nowhere",)}, "--fill"),
        ({"daemon": "/nowhere/guests.sock"}, "--socket /nowhere/guests.sock: No such file"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, object], names: str) -> None:
    options = {"daemon": "/nowhere", "name": "vm1", "ram_bytes": (1 << 20,), **wrong}
    with pytest.raises(ConfigError, match=names):
        run_guest(GuestOptions(**options))  # type: ignore[arg-type]
