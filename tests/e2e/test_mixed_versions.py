"""Daemons, and commands, of versions that do not exist yet: they agree, or one line says who speaks what.

The other version is played by hand, over real sockets to real daemons; of its own side every test uses what a
user of migd would use.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from migd import __version__
from migd.control import commands
from migd.control.client import ControlClient
from migd.errors import PeerLost
from migd.wire import handshake, messages
from migd.wire.framing import FrameEncoder
from migd.wire.protocol import FRAMING_VERSION, SOFTWARE, FrameType
from tests.support.pair import DaemonPair, GuestProcess, daemon_pair, migd
from tests.support.raw_daemon import daemon_that_says
from tests.support.raw_peer import RawPeer, hello, new_id, raw_server

UPDATE_DESTINATION = "update migd at the destination"


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def guest(pair: DaemonPair) -> GuestProcess:
    return pair.guest(ram="4Mi", workload="idle")


@pytest.fixture
def peer(pair: DaemonPair) -> Iterator[RawPeer]:
    with contextlib.closing(RawPeer.connect(pair.address)) as peer:
        yield peer


def reframed(data: bytes, version: int) -> bytes:
    """A frame as another framing version would begin it."""
    return data[:4] + bytes((version,)) + data[5:]


def packed(kind: FrameType, fields: dict[str, object]) -> bytes:
    """A frame with any fields in its message."""
    encoder = FrameEncoder()
    return encoder._seal(kind, msgspec.msgpack.encode(fields))


def fields_of(message: messages.Message) -> dict[str, object]:
    found: dict[str, object] = msgspec.msgpack.decode(messages.pack(message)[1])
    return found


# -- framing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theirs", "whose"), [(1, "the other side"), (3, "this side"), (255, "this side")])
def test_a_source_of_another_framing_version_is_told_in_ours(
    pair: DaemonPair, peer: RawPeer, theirs: int, whose: str
) -> None:
    """It reads just that ours differs, and says so itself; our log has both versions."""
    peer.sock.sendall(reframed(FrameEncoder().message(hello(new_id())), theirs))
    refusal = peer.message()
    assert isinstance(refusal, messages.Refuse)
    line = f"the peer frames with version {theirs}, this side ({SOFTWARE}) with {FRAMING_VERSION}"
    assert refusal.reason == f"{line}: update migd on {whose}"
    assert peer.closed()
    assert line in pair.destination.log


def test_a_destination_of_another_framing_version(pair: DaemonPair, guest: GuestProcess) -> None:
    def serve(peer: RawPeer) -> None:
        peer.receive()
        refusal = messages.Refuse(migration=messages.NO_MIGRATION, reason="in bytes nobody here can read")
        peer.sock.sendall(reframed(FrameEncoder().message(refusal), 3))
        peer.closed()

    with raw_server(serve) as address:
        output = pair.migrate(guest.name, "--to", address)
    assert output.exit_code == 1
    assert output.result.error == (
        f"the peer frames with version 3, this side ({SOFTWARE}) with {FRAMING_VERSION}: "
        "update migd on this side"
    )
    assert pair.source.guest(guest.name).state == "running"


# -- protocol versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "said", "place"),
    [(2, 3, "2 to 3", "destination"), (2, 2, "2", "destination"), (0, 0, "0", "source")],
)
def test_a_source_of_versions_that_do_not_meet(
    pair: DaemonPair, peer: RawPeer, low: int, high: int, said: str, place: str
) -> None:
    later = {**fields_of(hello(new_id())), "min_version": low, "max_version": high, "software": "migd 9.0"}
    peer.sock.sendall(packed(FrameType.HELLO, {**later, "guest": {"uuid": 7}}))
    refusal = peer.message()
    assert isinstance(refusal, messages.Refuse)
    assert refusal.reason == (
        f"protocol versions do not meet: the source (migd 9.0) speaks {said}, the destination ({SOFTWARE}) "
        f"speaks 1: update migd at the {place}"
    )
    assert peer.closed()
    assert pair.destination.migrations("raw") == []


def test_a_destination_of_versions_that_do_not_meet(pair: DaemonPair, guest: GuestProcess) -> None:
    """What it says reaches the operator at the source, word for word."""
    ours, theirs = handshake.Side.ours("source"), handshake.Side("destination", "migd 0.0.9", 0, 0)
    said = f"protocol versions do not meet: {ours}, {theirs}: {UPDATE_DESTINATION}"

    def serve(peer: RawPeer) -> None:
        peer.receive()
        refusal = fields_of(messages.Refuse(migration=messages.NO_MIGRATION, reason=said))
        peer.sock.sendall(packed(FrameType.REFUSE, {**refusal, "see": "https://migd.example"}))
        peer.closed()

    with raw_server(serve) as address:
        output = pair.migrate(guest.name, "--to", address)
    assert output.exit_code == 3
    assert output.result.error == f"the destination refused: {said}"


# -- what a later version adds ------------------------------------------------------------------------------


def test_unknown_offers_are_passed_over(peer: RawPeer) -> None:
    offer = {**fields_of(hello(new_id())), "features": ["time-travel", "lz4"], "colour": "blue"}
    peer.sock.sendall(packed(FrameType.HELLO, offer))
    accept = peer.message()
    assert isinstance(accept, messages.Accept)
    assert accept.features == ("lz4",)


def test_a_feature_that_was_not_offered_is_not_used(pair: DaemonPair, guest: GuestProcess) -> None:
    def serve(peer: RawPeer) -> None:
        offer = peer.message()
        assert isinstance(offer, messages.Hello)
        accept = handshake.accept(offer, bytes(16), max_streams=16)
        later = {**fields_of(accept), "features": ["time-travel"], "colour": "blue"}
        peer.sock.sendall(packed(FrameType.ACCEPT, later))
        peer.encoder._sequence = 1
        peer.send(messages.Begin(migration=offer.migration))
        peer.closed()

    with raw_server(serve) as address:
        output = pair.migrate(guest.name, "--to", address)
    assert output.exit_code == 1
    assert "accepted features that were not offered" in output.result.error
    assert pair.source.guest(guest.name).state == "running"


# -- PROBE ------------------------------------------------------------------------------------------------


def test_a_probe_is_answered_once_and_changes_nothing(pair: DaemonPair, peer: RawPeer) -> None:
    before = pair.destination.status()
    question = handshake.probe(new_id())
    peer.send(question)
    answer = peer.message()
    assert isinstance(answer, messages.About)
    assert (answer.migration, answer.software) == (question.migration, SOFTWARE)
    assert (answer.min_version, answer.max_version, answer.max_streams) == (1, 1, 16)
    assert 0 < answer.free_bytes < 1 << 60
    assert answer.realtime_ns > 1_600_000_000 * 10**9
    assert peer.closed()
    after = pair.destination.status()
    assert (after.guests, after.migrations) == (before.guests, before.migrations)


def test_a_probe_of_any_version_is_answered(peer: RawPeer) -> None:
    question = {**fields_of(handshake.probe(new_id())), "min_version": 7, "max_version": 9, "colour": "blue"}
    peer.sock.sendall(packed(FrameType.PROBE, question))
    answer = peer.message()
    assert isinstance(answer, messages.About)
    assert answer.max_version == 1


@pytest.mark.parametrize("fields", [{}, {"migration": "x"}, {"migration": "0" * 32, "software": "\x1b[31m"}])
def test_a_bad_probe_ends_its_connection(peer: RawPeer, fields: dict[str, object]) -> None:
    peer.sock.sendall(packed(FrameType.PROBE, fields))
    assert peer.receive() is None


def test_an_answer_is_no_question(peer: RawPeer) -> None:
    peer.send(handshake.about(handshake.probe(new_id()), realtime_ns=1, free_bytes=1, max_streams=1))
    assert peer.receive() is None


# -- a command and a daemon ---------------------------------------------------------------------------------


def ask_raw(directory: Path, request: dict[str, object]) -> dict[str, object]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(directory / "control.sock"))
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile("rb") as lines:
            answer: dict[str, object] = json.loads(lines.readline())
            return answer


@pytest.mark.parametrize(
    ("request_", "about"),
    [
        ({"type": "teleport", "version": "9.9"}, "'teleport'"),
        ({"type": "status", "version": "9.9", "verbose": True}, "`verbose`"),
    ],
)
def test_a_command_of_a_later_version_is_told_both(
    pair: DaemonPair, request_: dict[str, object], about: str
) -> None:
    answer = ask_raw(pair.source.directory, request_)
    assert (answer["type"], answer["exit_code"]) == ("failed", 2)
    line = str(answer["error"])
    assert line.startswith(f"this daemon is migd {__version__} and does not understand migd 9.9: ")
    assert about in line
    assert line.endswith("; restart the daemon with the version that is installed, guests outlive that")


def test_nonsense_of_our_own_version_is_not_called_another(pair: DaemonPair) -> None:
    answer = ask_raw(pair.source.directory, {"type": "teleport", "version": __version__})
    assert str(answer["error"]).startswith("not a request: ")


Change = Callable[[dict[str, object]], dict[str, object]]


def reply_of_today(pair: DaemonPair, change: Change) -> bytes:
    return json.dumps(change(ask_raw(pair.source.directory, {"type": "status"}))).encode() + b"\n"


def test_a_reply_may_say_more_than_a_command_knows(pair: DaemonPair, tmp_path: Path) -> None:
    line = reply_of_today(pair, lambda reply: {**reply, "version": "9.9", "weather": {"rain": 1}})
    with daemon_that_says(tmp_path, line):
        report = ControlClient(tmp_path).ask_once(commands.Status())
    assert isinstance(report, commands.StatusReport)
    assert report.version == "9.9"


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: {**reply, "version": "9.9", "guests": "many"},
        lambda reply: {"type": "status_report_2", "version": "9.9"},
    ],
)
def test_a_reply_that_is_not_understood_is_one_line_with_both_versions(
    pair: DaemonPair, tmp_path: Path, change: Change
) -> None:
    with daemon_that_says(tmp_path, reply_of_today(pair, change)):
        output = migd("status", "--runtime-dir", tmp_path)
    assert output.exit_code == 1
    assert output.complaint.startswith(
        f"migd: the daemon at {tmp_path}/control.sock is migd 9.9, and this command, migd {__version__}, "
        "does not understand it: "
    )
    assert output.complaint.endswith(
        "; restart the daemon with the version that is installed, guests outlive that"
    )


def test_a_reply_without_a_version(tmp_path: Path) -> None:
    with (
        daemon_that_says(tmp_path, b'{"type":"news"}\n'),
        pytest.raises(PeerLost, match=f"is migd of an unknown version, and this command, migd {__version__}"),
    ):
        ControlClient(tmp_path).ask_once(commands.Status())
