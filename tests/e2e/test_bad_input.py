"""What an operator, a peer or a guest can get wrong: one clear line, nothing lost, the guest running."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from migd.guest import control
from migd.migration.journal import Journal, Mark
from migd.migration.stats import Result
from migd.ram.block import PAGE_BYTES
from migd.ram.digest import page_digests
from migd.wire import messages
from migd.wire.framing import FrameEncoder
from migd.wire.protocol import FRAMING_VERSION, HEADER, Codec, FrameType
from tests.support.pair import DaemonPair, GuestProcess, daemon_pair, eventually, migd, ram_digest
from tests.support.raw_peer import RawPeer, hello, new_id, raw_server

PAGES = 256


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    """Quick to give up on peers that say nothing."""
    limits = "[limits]\nbegin_s = 0.5\nhello_s = 1\nready_s = 5\n"
    with daemon_pair(source=limits, destination=limits) as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: DaemonPair) -> GuestProcess:
    """One that every test of this module leaves as it was: running, here."""
    return pair.guest(workload="churn")


@pytest.fixture(autouse=True)
def nothing_lost(pair: DaemonPair, guest: GuestProcess) -> Iterator[None]:
    yield
    here = eventually(lambda: pair.source.guest(guest.name), "the guest")
    assert (here.state, here.migration) == ("running", "")
    before = ram_digest(here.pid)
    eventually(lambda: ram_digest(here.pid) != before, "the guest to write")
    arrived = [found.name for found in pair.destination.status().guests]
    assert [name for name in arrived if name in (guest.name, "raw")] == []


# -- the operator -----------------------------------------------------------------------------------


def test_a_guest_that_is_not_there(pair: DaemonPair, guest: GuestProcess) -> None:
    output = pair.migrate("nobody")
    assert output.exit_code == 1
    assert output.complaint == f"migd: no guest 'nobody' is attached here (attached: {guest.name})"


def test_a_daemon_that_is_not_there() -> None:
    for command in (
        ["migrate", "vm", "--to", "127.0.0.1:1"],
        ["cancel", "vm"],
        ["resolve", "vm"],
        ["status"],
    ):
        output = migd(*command, "--runtime-dir", "/nowhere")
        assert output.exit_code == 2
        assert output.complaint.startswith("migd: no migd daemon answers at /nowhere/control.sock")
    output = migd("guest", "--name", "vm", "--socket", "/nowhere/guest.sock")
    assert output.exit_code == 2
    assert "/nowhere/guest.sock" in output.complaint


@pytest.mark.parametrize(
    ("address", "exit_code", "reason"),
    [
        ("127.0.0.1:{closed}", 1, "127.0.0.1:{closed}: Connect"),
        ("nonsense", 2, "'nonsense' is no HOST:PORT"),
        ("127.0.0.1:99999", 2, "'127.0.0.1:99999' is no HOST:PORT"),
    ],
)
def test_a_destination_that_is_not_there(
    pair: DaemonPair, guest: GuestProcess, address: str, exit_code: int, reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    output = pair.migrate(guest.name, "--to", address.format(closed=port))
    assert output.exit_code == exit_code
    said = output.result.error if exit_code == 1 else output.complaint
    assert reason.format(closed=port) in said
    assert "\n" not in said


def test_a_daemon_is_started_twice(pair: DaemonPair) -> None:
    for daemon in (pair.source, pair.destination):
        output = migd(daemon.role, "--runtime-dir", daemon.directory)
        assert output.exit_code == 3
        assert output.complaint.endswith(f"another migd daemon uses {daemon.directory}")


def test_a_port_that_is_taken(pair: DaemonPair, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("d")
    config = directory / "config.toml"
    config.write_text(f'[destination]\nlisten = "{pair.address}"\n')
    output = migd("destination", "--config", config, "--runtime-dir", directory)
    assert output.exit_code == 3
    assert f"cannot listen on {pair.address}: Address already in use" in output.complaint


def test_a_guest_larger_than_the_destination_has_room_for(pair: DaemonPair) -> None:
    """RAM counts as given away before it is touched: the second cannot get what the first may write."""
    mib = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") >> 20) * 6 // 10
    options = {"ram": f"{mib}Mi", "workload": "idle", "live": "0.00001"}
    first = pair.guest("big1", **options)
    try:
        assert pair.migrate(first.name).exit_code == 0
        second = pair.guest("big2", **options)
        output = pair.migrate(second.name)
        assert output.exit_code == 3
        assert f"the destination refused: {mib} MiB of guest RAM wanted" in output.result.error
        here = pair.source.guest(second.name)
        assert here is not None
        assert here.state == "running"
    finally:
        pair.discard(first.name)
        pair.discard("big2")


def test_a_name_that_is_taken_at_the_destination(pair: DaemonPair) -> None:
    first = pair.guest("twin", workload="idle")
    assert pair.migrate("twin").exit_code == 0
    assert first.wait() == 0
    pair.guest("twin", workload="idle")
    output = pair.migrate("twin")
    assert output.exit_code == 3
    assert "the destination refused: a guest named 'twin' is here already" in output.result.error
    here = pair.source.guest("twin")
    assert here is not None
    assert here.state == "running"
    pair.discard("twin")


def test_a_name_that_is_taken_at_the_source(pair: DaemonPair, guest: GuestProcess) -> None:
    second = migd(
        "guest", "--name", guest.name, "--ram", "16Mi", "--socket", pair.source.directory / "guest.sock"
    )
    assert second.exit_code == 3
    assert second.complaint == (
        f"guest {guest.name}: the daemon declined: a guest named '{guest.name}' is attached already"
    )


# -- a destination that is not what it should be ------------------------------------------------------


def _refuses_versions(peer: RawPeer) -> None:
    peer.receive()
    peer.send(
        messages.Refuse(migration="0" * 32, reason="protocol versions do not meet: update the older one")
    )
    peer.closed()


def _accepts_another_version(peer: RawPeer) -> None:
    offer = peer.message()
    peer.send(messages.Accept(migration=offer.migration, version=9, software="migd 9", token=bytes(16)))
    peer.closed()


def _answers_for_another_migration(peer: RawPeer) -> None:
    peer.receive()
    peer.send(messages.Accept(migration=new_id(), version=1, software="migd", token=bytes(16)))
    peer.closed()


def _speaks_http(peer: RawPeer) -> None:
    peer.sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    peer.closed()


def _hangs_up(peer: RawPeer) -> None:
    peer.receive()


def _says_nothing(peer: RawPeer) -> None:
    peer.receive()
    peer.closed()


@pytest.mark.parametrize(
    ("serve", "exit_code", "reason"),
    [
        (_refuses_versions, 3, "the destination refused: protocol versions do not meet"),
        (_accepts_another_version, 1, "accepted with version 9, which was not offered"),
        (_answers_for_another_migration, 1, "of another migration"),
        (_speaks_http, 1, "does not speak the migd protocol"),
        (_hangs_up, 1, "closed the connection"),
        (_says_nothing, 1, "no ACCEPT from the peer within 1 s"),
    ],
)
def test_a_destination_of_another_kind(
    pair: DaemonPair, guest: GuestProcess, serve: Callable[[RawPeer], None], exit_code: int, reason: str
) -> None:
    with raw_server(serve) as address:
        output = pair.migrate(guest.name, "--to", address)
    assert output.exit_code == exit_code, output
    assert reason in output.result.error
    assert output.result.states == ["connecting", "aborting", "failed"]


# -- a source that is not what it should be -----------------------------------------------------------


@pytest.fixture
def peer(pair: DaemonPair) -> Iterator[RawPeer]:
    with contextlib.closing(RawPeer.connect(pair.address)) as peer:
        yield peer


def test_a_source_of_a_later_version(peer: RawPeer) -> None:
    offer = msgspec.structs.replace(hello(new_id()), min_version=2, max_version=3, software="migd 9.0")
    peer.send(offer)
    refusal = peer.message()
    assert isinstance(refusal, messages.Refuse)
    assert refusal.reason.startswith("protocol versions do not meet: the source (migd 9.0) speaks 2 to 3")
    assert peer.closed()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"page_bytes": 65536}, "page size 65536 does not match 4096"),
        ({"streams": 64}, "64 streams requested, at most 16"),
        ({"blocks": (messages.BlockInfo("a", 1), messages.BlockInfo("a", 1))}, "the same name"),
        ({"blocks": (messages.BlockInfo("a", 1 << 40),)}, "at most 2^32-1"),
    ],
)
def test_an_offer_that_does_not_fit(peer: RawPeer, change: dict[str, object], reason: str) -> None:
    peer.send(msgspec.structs.replace(hello(new_id()), **change))
    refusal = peer.message()
    assert isinstance(refusal, messages.Refuse)
    assert reason in refusal.reason
    assert peer.closed()


def _header(**changes: int) -> bytes:
    fields = {
        "kind": FrameType.HELLO, "sequence": 0, "count": 0, "runs": 0, "metadata": 8, "payload": 0, **changes
    }  # fmt: skip
    return HEADER.pack(
        b"MIGD", FRAMING_VERSION, fields["kind"], Codec.NONE, 0, fields["sequence"], fields["count"],
        fields["runs"], fields["metadata"], fields["payload"], bytes(16),
    )  # fmt: skip


GARBAGE = {
    "not migd": b"GET / HTTP/1.1\r\nHost: migd\r\n\r\n" + bytes(64),
    "metadata beyond its limit": _header(metadata=1 << 31),
    "payload where none may be": _header(payload=4096),
    "payload beyond its limit": _header(kind=FrameType.PAGES, count=1, runs=1, metadata=24, payload=1 << 31),
    "an unknown type": _header(kind=99),
    "a number out of order": _header(sequence=7),
    "a wrong digest": _header(metadata=8) + bytes(8),
    "the end in mid-frame": _header(metadata=8) + bytes(3),
    "pages before HELLO": FrameEncoder().runs(FrameType.ZERO, [(0, 1)]),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=list(GARBAGE))
def test_a_connection_that_begins_with_garbage(peer: RawPeer, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it may have hung up already
        peer.sock.sendall(data)
        peer.sock.shutdown(socket.SHUT_WR)
    assert peer.closed()


@contextlib.contextmanager
def arriving(pair: DaemonPair, streams: int = 1) -> Iterator[tuple[RawPeer, messages.Accept, str]]:
    """An accepted migration, before any stream; afterwards the destination has forgotten its guest."""
    migration = new_id()
    with contextlib.closing(RawPeer.connect(pair.address)) as peer:
        peer.send(hello(migration, pages=PAGES, streams=streams))
        accept = peer.message()
        assert isinstance(accept, messages.Accept)
        yield peer, accept, migration
    eventually(lambda: pair.destination.guest("raw") is None, "the destination to clean up")
    eventually(lambda: not pair.copies("raw"), "the incoming process to end")


def join(pair: DaemonPair, migration: str, token: bytes, index: int = 0) -> RawPeer:
    stream = RawPeer.connect(pair.address)
    stream.send(messages.Stream(migration=migration, token=token, index=index))
    return stream


def _abort(peer: RawPeer) -> str:
    """Why the destination gave up."""
    while not isinstance(message := peer.message(), messages.Abort):
        assert isinstance(message, messages.Begin)
    return message.reason


def test_streams_that_never_connect(pair: DaemonPair) -> None:
    with arriving(pair, streams=3) as (peer, accept, migration):
        stream = join(pair, migration, accept.token, 1)
        assert _abort(peer) == "streams [0, 2] did not connect within 0.5 s"
        assert stream.closed()
        stream.close()


@pytest.mark.parametrize("wrong", ["token", "migration", "index", "twice", "late"])
def test_a_stream_that_does_not_belong(pair: DaemonPair, wrong: str) -> None:
    """It is closed, and the migration goes on without it."""
    with arriving(pair, streams=1) as (peer, accept, migration):
        if wrong == "twice":
            streams = [join(pair, migration, accept.token) for _ in range(2)]
            assert isinstance(peer.message(), messages.Begin)
            # Whichever came second is refused; the first stays.
            false, right = (streams[1], streams[0]) if _is_closed(streams[1]) else (streams[0], streams[1])
            assert false.closed()
        else:
            right = join(pair, migration, accept.token) if wrong == "late" else None
            if right is not None:
                assert isinstance(peer.message(), messages.Begin)
            false = join(
                pair,
                new_id() if wrong == "migration" else migration,
                bytes(16) if wrong == "token" else accept.token,
                7 if wrong == "index" else 0,
            )
            assert false.closed()
            if right is None:
                right = join(pair, migration, accept.token)
                assert isinstance(peer.message(), messages.Begin)
        right.sock.sendall(right.encoder.runs(FrameType.ZERO, [(0, PAGES)]))
        peer.send(messages.Ping(migration=migration, nonce=1))
        assert isinstance(peer.message(), messages.Pong)
        false.close()
        right.close()


def _is_closed(peer: RawPeer) -> bool:
    peer.sock.settimeout(0.5)
    try:
        return peer.closed()
    except TimeoutError:
        return False


def _pages_beyond_ram(stream: RawPeer) -> bytes:
    return stream.encoder.runs(FrameType.ZERO, [(PAGES - 1, PAGES + 1)])


def _runs_that_overlap(stream: RawPeer) -> bytes:
    return stream.encoder.runs(FrameType.FREE, [(0, 2), (1, 3)])


def _undecodable(stream: RawPeer) -> bytes:
    return stream.encoder.pages([(0, 1)], bytes(16), Codec.LZ4, 64) + bytes(range(64))


def _wrong_page_digest(stream: RawPeer) -> bytes:
    return stream.encoder.pages([(0, 1)], bytes(16), Codec.NONE, 4096) + b"x" * 4096


def _a_whole_page(stream: RawPeer) -> bytes:
    content = np.full((1, PAGE_BYTES), 7, np.uint8)
    digest = page_digests(content).tobytes()
    return stream.encoder.pages([(0, 1)], digest, Codec.NONE, PAGE_BYTES) + content.tobytes()


def _a_flipped_bit(stream: RawPeer) -> bytes:
    data = bytearray(stream.encoder.runs(FrameType.ZERO, [(0, 1)]))
    data[-1] ^= 1
    return bytes(data)


def _a_frame_left_out(stream: RawPeer) -> bytes:
    stream.encoder.runs(FrameType.ZERO, [(0, 1)])
    return stream.encoder.runs(FrameType.ZERO, [(1, 2)])


def _a_message_of_the_control_connection(stream: RawPeer) -> bytes:
    return stream.encoder.message(messages.Go(migration=new_id()))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_pages_beyond_ram, f"pages up to {PAGES + 1} of a RAM of {PAGES} pages"),
        (_runs_that_overlap, "runs are empty, touch, overlap"),
        (_undecodable, "undecodable lz4 payload"),
        (_wrong_page_digest, "1 pages arrived damaged, the first is page 0"),
        (_a_flipped_bit, "the digest is wrong"),
        (_a_frame_left_out, "frame 2 where 1 was due: lost or repeated"),
        (_a_message_of_the_control_connection, "GO on a data stream"),
    ],
)
def test_a_record_that_breaks_the_protocol_ends_the_migration(
    pair: DaemonPair, build: Callable[[RawPeer], bytes], reason: str
) -> None:
    with arriving(pair) as (peer, accept, migration):
        stream = join(pair, migration, accept.token)
        assert isinstance(peer.message(), messages.Begin)
        stream.sock.sendall(build(stream))
        assert reason in _abort(peer)
        stream.close()


def test_a_stream_that_ends_before_its_end(pair: DaemonPair) -> None:
    with arriving(pair) as (peer, accept, migration):
        stream = join(pair, migration, accept.token)
        assert isinstance(peer.message(), messages.Begin)
        stream.close()
        assert "closed the connection" in _abort(peer)


@pytest.mark.parametrize("cut", ["header", "metadata", "payload"])
def test_a_source_that_stops_inside_a_frame_is_not_waited_for(cut: str) -> None:
    """G6, although it goes on to ping: what it holds room for, others may need."""
    limits = "[limits]\nprogress_s = 0.5\nping_s = 0.2\n"
    with daemon_pair(destination=limits) as pair, arriving(pair) as (peer, accept, migration):
        stream = join(pair, migration, accept.token)
        assert isinstance(peer.message(), messages.Begin)
        record = _a_whole_page(stream)
        stream.sock.sendall(record[: {"header": 20, "metadata": 50, "payload": -1}[cut]])
        assert _abort(peer) == "the source stopped inside a frame for 0.5 s"
        stream.close()


def test_a_source_with_nothing_to_send_is_waited_for() -> None:
    """Between two frames: its guest may have nothing new for long."""
    limits = "[limits]\nprogress_s = 0.3\nping_s = 0.1\n"
    with daemon_pair(destination=limits) as pair, arriving(pair) as (peer, accept, migration):
        stream = join(pair, migration, accept.token)
        assert isinstance(peer.message(), messages.Begin)
        for pages in (1, 2):
            stream.sock.sendall(_a_whole_page(stream))
            time.sleep(0.6)
            eventually(lambda pages=pages: _applied(peer, migration) == pages * PAGE_BYTES, "a page")
        stream.close()


def _applied(peer: RawPeer, migration: str) -> int:
    peer.send(messages.Ping(migration=migration, nonce=0))
    pong = peer.message()
    assert isinstance(pong, messages.Pong)
    return pong.applied_bytes


def test_counts_that_do_not_add_up(pair: DaemonPair) -> None:
    with arriving(pair) as (peer, accept, migration):
        stream = join(pair, migration, accept.token)
        assert isinstance(peer.message(), messages.Begin)
        stream.sock.sendall(stream.encoder.runs(FrameType.ZERO, [(0, 1)]))
        end = stream.encoder.account.end(migration)
        stream.send(msgspec.structs.replace(end, zero=2))
        assert "END does not match what arrived" in _abort(peer)
        stream.close()


def test_a_go_for_a_migration_nobody_knows(pair: DaemonPair, peer: RawPeer) -> None:
    """Durably refused before it is answered: a late migration of that id can never start a guest (G3)."""
    migration = new_id()
    peer.send(messages.Go(migration=migration))
    answer = peer.message()
    assert answer == messages.Aborted(
        migration=migration, reason="the destination does not know this migration"
    )
    journal = Journal(pair.destination.directory / "journal" / "destination")
    assert [record.mark for record in journal.records(migration)] == [Mark.ABORTED]
    with contextlib.closing(RawPeer.connect(pair.address)) as late:
        late.send(hello(migration))
        refusal = late.message()
        assert isinstance(refusal, messages.Refuse)
        assert "was here before" in refusal.reason


def test_more_strangers_than_it_listens_to(pair: DaemonPair) -> None:
    """Connections that say nothing are bounded, and time out; then there is room again."""
    strangers = [RawPeer.connect(pair.address) for _ in range(20)]
    assert all(stranger.closed() for stranger in strangers)
    for stranger in strangers:
        stranger.close()


def test_after_all_that_it_still_serves(pair: DaemonPair) -> None:
    good = pair.guest(workload="churn")
    output = pair.migrate(good.name)
    assert output.exit_code == 0
    assert output.result.wrong_pages == 0
    assert "Traceback" not in pair.destination.log
    assert "Traceback" not in pair.source.log
    pair.discard(good.name)


# -- a guest that lies --------------------------------------------------------------------------------


@contextlib.contextmanager
def attaching(pair: DaemonPair) -> Iterator[socket.socket]:
    with control.new_socket() as sock:
        sock.settimeout(10)
        sock.connect(str(pair.source.directory / "guest.sock"))
        yield sock


def _attach(**changes: object) -> control.Attach:
    block = control.Block("ram", PAGES)
    attach = control.Attach(
        version=control.VERSION,
        name="liar",
        pid=os.getpid(),
        state=control.GuestState.RUNNING,
        blocks=(block,),
    )
    return msgspec.structs.replace(attach, **changes)


def _too_small(size: int = 4096) -> int:
    fd = os.memfd_create("liar")
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize(
    ("changes", "fds", "reason"),
    [
        ({"version": 99}, 0, "control version 99"),
        ({"blocks": ()}, 0, "RAM blocks, not 0"),
        ({"blocks": (control.Block("ram", 0),)}, 0, "pages"),
        ({"blocks": (control.Block("ram", -5),)}, 0, "pages"),
        ({"blocks": (control.Block("ram", 1 << 50),)}, 0, "pages of RAM in all"),
        ({"blocks": (control.Block("ram", (1 << 32) - 1),)}, 0, "MiB of guest RAM wanted"),
        ({"state": control.GuestState.PAUSED, "migration": "0" * 32}, 0, "brings no RAM"),
        ({}, 1, "256 pages announced, the file has 4096 bytes"),
        ({}, 2, "1 RAM blocks and 2 descriptors"),
        ({"blocks": (control.Block("ram", 1),), "read_only": True}, 1, "can be written through"),
        ({"name": "../evil"}, 0, "name"),
        ({"name": ""}, 0, "name"),
    ],
)
def test_a_guest_that_lies_when_it_attaches(
    pair: DaemonPair, changes: dict[str, object], fds: int, reason: str
) -> None:
    passed = [_too_small() for _ in range(fds)]
    try:
        with attaching(pair) as sock:
            control.send(sock, _attach(**changes), passed)
            answer = control.receive_from_daemon(sock)
            assert answer is not None
            assert isinstance(answer[0], control.Declined)
            assert reason in answer[0].reason
    finally:
        control.close_all(passed)
    assert pair.source.guest("liar") is None


@pytest.mark.parametrize("data", [b"garbage", b"{}", b'{"type": "paused"}', b"\xff" * 1000])
def test_a_guest_connection_that_begins_with_garbage(pair: DaemonPair, data: bytes) -> None:
    with attaching(pair) as sock:
        sock.send(data)
        assert sock.recv(1 << 16) == b""


def _with_false_answer(pair: DaemonPair, answer: Callable[[socket.socket, control.ToGuest], None]) -> Result:
    """Migrate a guest that attaches rightly and answers ARM as it likes."""
    with attaching(pair) as sock:
        control.send(sock, _attach())
        attached = control.receive_from_daemon(sock)
        assert attached is not None
        assert isinstance(attached[0], control.Attached)
        eventually(lambda: pair.source.guest("liar"), "the liar to attach")
        migration = pair.start_migration("liar", "--no-hints", "--dirty-log", "userfaultfd")
        asked = control.receive_from_daemon(sock)
        assert asked is not None
        answer(sock, asked[0])
        out, err = migration.communicate(timeout=20)
        assert err == ""
        control.close_all(attached[1])
    eventually(lambda: pair.source.guest("liar") is None, "the liar to be forgotten")
    eventually(lambda: pair.destination.guest("liar") is None, "the destination to clean up")
    result = msgspec.json.decode(out, type=Result)
    assert result.outcome == "failed"
    assert migration.returncode == result.exit_code
    return result


def _armed_nowhere(sock: socket.socket, asked: control.ToGuest) -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    control.send(sock, control.Armed(id=asked.id, addresses=(4096,)), [fd])
    os.close(fd)


def _armed_with_another_file(sock: socket.socket, asked: control.ToGuest) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    control.send(sock, control.Armed(id=asked.id, addresses=(1 << 40,)), [fd])
    os.close(fd)


def _armed_at_an_impossible_address(sock: socket.socket, asked: control.ToGuest) -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    control.send(sock, control.Armed(id=asked.id, addresses=(-1,)), [fd])
    os.close(fd)


def _armed_without_a_descriptor(sock: socket.socket, asked: control.ToGuest) -> None:
    control.send(sock, control.Armed(id=asked.id, addresses=(4096,)))


def _answered_with_something_else(sock: socket.socket, asked: control.ToGuest) -> None:
    control.send(sock, control.Done(id=asked.id))


def _refused(sock: socket.socket, asked: control.ToGuest) -> None:
    control.send(sock, control.Failed(id=asked.id, reason="no mood"))


def _silent(_sock: socket.socket, _asked: control.ToGuest) -> None:
    return


@pytest.mark.parametrize(
    ("answer", "exit_code", "reason"),
    [
        (_armed_nowhere, 1, "armed"),
        (_armed_with_another_file, 1, "dirty log"),
        (_armed_at_an_impossible_address, 1, "impossible address"),
        (_armed_without_a_descriptor, 1, "armed 1 blocks with 0 descriptors"),
        (_answered_with_something_else, 1, "answered ARM with Done"),
        (_refused, 3, "refused ARM: no mood"),
        (_silent, 1, "did not answer ARM within 2 s"),
    ],
)
def test_a_guest_that_lies_when_it_is_armed(
    pair: DaemonPair,
    answer: Callable[[socket.socket, control.ToGuest], None],
    exit_code: int,
    reason: str,
) -> None:
    result = _with_false_answer(pair, answer)
    assert reason in result.error
    assert "\n" not in result.error
    assert result.exit_code == exit_code
