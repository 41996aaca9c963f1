"""The control protocol over real SEQPACKET sockets: every message, its descriptors, and none left behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from migd.errors import GuestError
from migd.guest import control
from migd.guest.control import GuestState, receive_from_daemon, receive_from_guest, send

FROM_GUEST: list[Any] = [
    control.Attach(
        id=1, version=1, name="vm1", pid=42, state=GuestState.RUNNING,
        blocks=(control.Block("ram", 262144), control.Block("low", 160)), migration="m1",
    ),
    control.Armed(id=2, addresses=(0x7F00_0000_0000, 4096)),
    control.Paused(id=3),
    control.Running(id=4, stopped_at_ns=1_700_000_000_000_000_000, resumed_at_ns=1_700_000_000_000_000_001),
    control.Checked(pages=10, wrong=1, first_wrong=7),
    control.Done(id=5),
    control.Failed(id=6, reason="no: \u00fc \x00"), control.Failed(id=6, reason="never", immovable=True),
    control.Prepared(pid=7, kind="QEMU 10.0.2", tracking="userfaultfd"), control.Harvested(id=9),
    control.Armed(id=2, addresses=(4096,), log=control.Log.SOFT_DIRTY), control.Saved(id=10),
]  # fmt: skip
TO_GUEST: list[Any] = [
    control.Attached(id=1, blocks=(control.Block("ram", 1),)), control.Declined(id=1, reason="full"),
    control.Arm(id=2), control.Disarm(id=3), control.Pause(id=4, migration="m1"), control.Resume(id=5),
    control.Load(id=6), control.Start(id=7), control.Quit(id=8), control.Expect(migration="m1"),
    control.Harvest(id=9), control.Save(id=10),
]  # fmt: skip

Pair = tuple[socket.socket, socket.socket]


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.settimeout(10)
    with left, right:
        yield left, right


@pytest.fixture
def spare() -> Iterator[list[int]]:
    """More descriptors than a packet may carry."""
    fds = [os.eventfd(number) for number in range(control.MAX_PACKET_FDS + 4)]
    yield fds
    control.close_all(fds)


@pytest.mark.parametrize("message", FROM_GUEST, ids=lambda message: type(message).__name__)
def test_every_message_of_a_guest_arrives_as_it_was_sent(pair: Pair, message: Any) -> None:
    send(pair[0], message)
    assert receive_from_guest(pair[1]) == (message, [])


@pytest.mark.parametrize("message", TO_GUEST, ids=lambda message: type(message).__name__)
def test_every_message_of_a_daemon_arrives_as_it_was_sent(pair: Pair, message: Any) -> None:
    send(pair[0], message)
    assert receive_from_daemon(pair[1]) == (message, [])


def test_the_lists_above_are_complete() -> None:
    assert {type(message) for message in FROM_GUEST} == set(get_args(control.FromGuest))
    assert {type(message) for message in TO_GUEST} == set(get_args(control.ToGuest))


def test_a_packet_is_json_with_type_and_id(pair: Pair) -> None:
    send(pair[0], control.Armed(id=2, addresses=(4096,)))
    assert pair[1].recv(1000) == b'{"type":"armed","id":2,"addresses":[4096]}'


@pytest.mark.parametrize("message", FROM_GUEST, ids=lambda message: type(message).__name__)
def test_neither_side_takes_the_other_sides_messages(pair: Pair, message: Any) -> None:
    send(pair[0], message)
    with pytest.raises(GuestError, match="no message"):
        receive_from_daemon(pair[1])
    send(pair[0], control.Start())
    with pytest.raises(GuestError, match="no message"):
        receive_from_guest(pair[1])


@pytest.mark.parametrize("count", [1, 2, control.MAX_PACKET_FDS])
def test_descriptors_arrive_in_order_as_new_ones_that_no_child_inherits(
    pair: Pair, spare: list[int], count: int
) -> None:
    send(pair[0], control.Paused(id=1), spare[:count])
    received = receive_from_guest(pair[1])
    assert received is not None
    message, fds = received
    try:
        assert message == control.Paused(id=1)
        assert not set(fds) & set(spare)
        assert not any(os.get_inheritable(fd) for fd in fds)
        assert [os.eventfd_read(fd) for fd in fds[1:]] == list(range(1, count))  # fd 0 holds 0: not readable
    finally:
        control.close_all(fds)


def test_packets_keep_their_borders_and_their_own_descriptors(pair: Pair, spare: list[int]) -> None:
    send(pair[0], control.Done(id=1), spare[1:2])
    send(pair[0], control.Done(id=2))
    send(pair[0], control.Done(id=3), spare[3:5])
    before = open_fds()
    for expected, count in ((1, 1), (2, 0), (3, 2)):
        received = receive_from_guest(pair[1])
        assert received is not None
        assert (received[0].id, len(received[1])) == (expected, count)
        control.close_all(received[1])
    assert open_fds() == before


GARBAGE = {
    "not json": b"\0\1\2",
    "cut": b'{"type":"done","id":1',
    "trailing": b'{"type":"done"} ,',
    "no type": b'{"id":1}',
    "unknown type": b'{"type":"explode","id":1}',
    "type is no text": b'{"type":1}',
    "unknown field": b'{"type":"done","id":1,"extra":true}',
    "missing field": b'{"type":"armed","id":1}',
    "wrong field": b'{"type":"armed","id":1,"addresses":"all"}',
    "wrong element": b'{"type":"armed","id":1,"addresses":[1.5]}',
    "unknown state": b'{"type":"attach","version":1,"name":"x","pid":1,"state":"asleep","blocks":[]}',
    "unknown field inside": b'{"type":"attach","version":1,"name":"x","pid":1,"state":"paused",'
    b'"blocks":[{"name":"a","pages":1,"at":0}]}',
    "a huge number": b'{"type":"done","id":' + b"9" * 60_000 + b"}",
    "an array": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_guest_error_and_leaks_nothing(pair: Pair, spare: list[int], name: str) -> None:
    before = open_fds()
    for fds in ([], spare[:1], spare[: control.MAX_PACKET_FDS]):
        socket.send_fds(pair[0], [GARBAGE[name]], fds)
        with pytest.raises(GuestError, match="no message"):
            receive_from_guest(pair[1])
        assert open_fds() == before
    send(pair[0], control.Done(id=9))  # and the next packet is read as if nothing had been
    assert receive_from_guest(pair[1]) == (control.Done(id=9), [])


@pytest.mark.parametrize(
    "packet",
    [b'{"a":' + b"[" * 60_000, b'{"type":"failed","reason":"\xff\xfe"}'],
    ids=["nested beyond the recursion limit", "text that is not UTF-8"],
)
def test_what_the_json_decoder_raises_beside_its_own_errors_is_a_guest_error(
    pair: Pair, spare: list[int], packet: bytes
) -> None:
    before = open_fds()
    socket.send_fds(pair[0], [packet], spare[:3])
    with pytest.raises(GuestError, match="no message"):
        receive_from_guest(pair[1])
    assert open_fds() == before


def test_a_packet_larger_than_the_limit_is_refused_whole(pair: Pair, spare: list[int]) -> None:
    before = open_fds()
    send(pair[0], control.Failed(id=1, reason="x" * control.MAX_PACKET_BYTES), spare[:3])
    with pytest.raises(GuestError, match="too large"):
        receive_from_guest(pair[1])
    assert open_fds() == before
    longest = control.MAX_PACKET_BYTES - len(b'{"type":"failed","id":1,"reason":""}')
    send(pair[0], control.Failed(id=1, reason="x" * longest))
    received = receive_from_guest(pair[1])
    assert received is not None
    assert received[0] == control.Failed(id=1, reason="x" * longest)


def test_more_descriptors_than_the_limit_are_refused_and_none_leaks(pair: Pair, spare: list[int]) -> None:
    before = open_fds()
    send(pair[0], control.Paused(id=1), spare)
    with pytest.raises(GuestError, match="too large"):
        receive_from_guest(pair[1])
    assert open_fds() == before


def test_the_end_of_the_connection_is_none_again_and_again(pair: Pair) -> None:
    send(pair[0], control.Done(id=1))
    pair[0].close()
    assert receive_from_guest(pair[1]) == (control.Done(id=1), [])
    assert receive_from_guest(pair[1]) is None
    assert receive_from_guest(pair[1]) is None


def test_an_empty_packet_with_descriptors_leaks_nothing(pair: Pair, spare: list[int]) -> None:
    before = open_fds()
    socket.send_fds(pair[0], [b""], spare[:2])
    assert receive_from_guest(pair[1]) is None
    assert open_fds() == before


def test_sending_to_a_peer_that_is_gone_is_the_sockets_error(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(BrokenPipeError):
        send(pair[0], control.Arm(id=1))


def test_a_new_socket_keeps_packets_apart_and_is_not_inherited() -> None:
    with control.new_socket() as sock:
        assert (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert not sock.get_inheritable()


# -- blobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 5 << 20])
def test_a_blob_survives_the_round_trip_through_a_packet(pair: Pair, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    fd = control.blob_fd(data)
    assert not os.get_inheritable(fd)
    send(pair[0], control.Paused(id=1), [fd])
    os.close(fd)
    received = receive_from_guest(pair[1])
    assert received is not None
    (arrived,) = received[1]
    assert control.blob_bytes(arrived) == data
    assert control.blob_bytes(arrived) == data  # wherever its file position is
    os.close(arrived)


def test_a_blob_beyond_the_limit_is_refused_before_it_is_read() -> None:
    fd = control.blob_fd(b"")
    os.ftruncate(fd, control.MAX_BLOB_BYTES + 1)
    with pytest.raises(GuestError, match="more than"):
        control.blob_bytes(fd)
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_a_blob_with_less_in_it_than_its_size_says_is_a_guest_error() -> None:
    """What a guest achieves by shrinking the file in the middle; sysfs files are like that by nature."""
    fd = os.open("/sys/devices/system/cpu/online", os.O_RDONLY)
    assert os.fstat(fd).st_size > len(os.pread(fd, 4096, 0))
    with pytest.raises(GuestError, match="shrank"):
        control.blob_bytes(fd)
    os.close(fd)
