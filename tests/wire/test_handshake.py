"""What two daemons must agree on: versions that meet and do not, page size, streams, RAM blocks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from migd.errors import ProtocolError, Refused
from migd.ram.block import MAX_RAM_PAGES, BlockShape
from migd.wire import handshake, messages
from migd.wire.framing import Frame, FrameEncoder
from migd.wire.messages import BlockInfo, Hello
from migd.wire.protocol import SOFTWARE, Codec, FrameType, Keeper
from tests.wire.feeding import Feed

ID = "0123456789abcdef" * 2
TOKEN = bytes(range(16))
HELLO = handshake.hello(ID, "vm1", (BlockShape("ram", 256), BlockShape("rom", 1)), 2)


def offer(**fields: Any) -> Frame:
    """A HELLO frame as another software might send it."""
    return raw(msgspec.msgpack.encode({**msgspec.to_builtins(HELLO, builtin_types=(bytes,)), **fields}))


def raw(metadata: bytes) -> Frame:
    return Frame(FrameType.HELLO, Codec.NONE, 0, 0, bytes(16), metadata, memoryview(b""))


def test_hello_reads_back_what_was_offered() -> None:
    (frame,) = Feed().feed(FrameEncoder().message(HELLO)).frames
    hello = handshake.read_hello(frame)
    assert hello == HELLO
    assert (hello.min_version, hello.max_version, hello.page_bytes, hello.guest) == (1, 1, 4096, "vm1")
    assert hello.blocks == (BlockInfo("ram", 256), BlockInfo("rom", 1))
    accept = handshake.accept(hello, TOKEN, max_streams=2)
    assert (accept.migration, accept.version, accept.token) == (ID, 1, TOKEN)
    assert accept.software == SOFTWARE


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 1), (1, 3), 1),
        ((1, 1), (0, 1), 1),
        ((1, 3), (1, 2), 2),
        ((2, 3), (1, 2), 2),
        ((1, 2), (2, 9), 2),
        ((1, 1), (2, 3), None),
        ((2, 3), (1, 1), None),
        ((1, 1), (0, 0), None),
    ],
)
def test_version_ranges(
    ours: tuple[int, int], theirs: tuple[int, int], chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "MIN_VERSION", ours[0])
    monkeypatch.setattr(handshake, "MAX_VERSION", ours[1])
    frame = offer(min_version=theirs[0], max_version=theirs[1], software="other 9.9")
    if chosen is not None:
        assert handshake.accept(handshake.read_hello(frame), TOKEN, 16).version == chosen
        return
    with pytest.raises(Refused) as refused:
        handshake.read_hello(frame)
    assert str(refused.value) == (
        f"protocol versions do not meet: the source (other 9.9) speaks {span(theirs)}, "
        f"the destination ({SOFTWARE}) speaks {span(ours)}: update migd at the "
        f"{'source' if theirs < ours else 'destination'}"
    )


def span(versions: tuple[int, int]) -> str:
    return str(versions[0]) if versions[0] == versions[1] else f"{versions[0]} to {versions[1]}"


def test_a_newer_hello_with_fields_unknown_here_is_refused_by_its_versions() -> None:
    """Not as garbage: whoever runs it shall read which side to update."""
    frame = offer(min_version=2, max_version=4, software="migd 7.0", cipher="aes", guest={"name": "vm1"})
    with pytest.raises(Refused, match=r"\(migd 7\.0\) speaks 2 to 4, .* speaks 1: update migd at the dest"):
        handshake.read_hello(frame)


# -- what a later migd adds ------------------------------------------------------------------------------

GREETINGS: dict[FrameType, messages.Message] = {
    FrameType.HELLO: HELLO,
    FrameType.ACCEPT: handshake.accept(HELLO, TOKEN, max_streams=2),
    FrameType.REFUSE: messages.Refuse(migration=ID, reason="no"),
    FrameType.PROBE: handshake.probe(ID),
    FrameType.ABOUT: handshake.about(handshake.probe(ID), realtime_ns=1, free_bytes=2, max_streams=3),
}
BARE: dict[FrameType, messages.Message] = {
    FrameType.STREAM: messages.Stream(migration=ID, token=TOKEN, index=0),
    FrameType.BEGIN: messages.Begin(migration=ID),
    FrameType.PREPARED: messages.Prepared(migration=ID),
    FrameType.PING: messages.Ping(migration=ID, nonce=0),
    FrameType.PONG: messages.Pong(migration=ID, nonce=0, applied_bytes=0),
    FrameType.ABORT: messages.Abort(migration=ID, reason="no"),
    FrameType.BARRIER: messages.Barrier(migration=ID, iteration=0),
    FrameType.END: messages.End(migration=ID, frames=0, pages=0, zero=0, free=0, digest=bytes(16)),
    FrameType.FINISH: messages.Finish(migration=ID, state_bytes=0, state_digest=bytes(16)),
    FrameType.READY: messages.Ready(migration=ID),
    FrameType.GO: messages.Go(migration=ID),
    FrameType.STARTED: messages.Started(migration=ID, stopped_at_ns=0, resumed_at_ns=0),
    FrameType.ABORTED: messages.Aborted(migration=ID, reason="no"),
    FrameType.VERDICT: messages.Verdict(migration=ID, ok=True, detail=""),
    FrameType.CHECKED: messages.Checked(migration=ID, pages=0, wrong=0, first_wrong=-1),
    FrameType.RESOLVE: messages.Resolve(migration=ID, keeper=Keeper.SOURCE, detail=""),
}


def later(message: messages.Message) -> bytes:
    """The message with a field that this version does not know."""
    fields = msgspec.msgpack.decode(messages.pack(message)[1])
    return msgspec.msgpack.encode({**fields, "cipher": {"name": "aes"}})


@pytest.mark.parametrize("kind", GREETINGS)
def test_a_greeting_may_say_more_than_this_version_knows(kind: FrameType) -> None:
    assert messages.unpack(kind, later(GREETINGS[kind])) == GREETINGS[kind]


@pytest.mark.parametrize("kind", BARE)
def test_any_other_message_may_not(kind: FrameType) -> None:
    with pytest.raises(ProtocolError, match=f"bad {kind.name} message: .*unknown field `cipher`"):
        messages.unpack(kind, later(BARE[kind]))


def test_every_message_is_held_to_the_rule() -> None:
    assert {type(message) for message in (GREETINGS | BARE).values()} == set(messages.Message.__args__)


def test_a_ram_block_in_a_hello_may_say_more_too() -> None:
    blocks = [{"name": "ram", "pages": 256, "numa_node": 1}, {"name": "rom", "pages": 1}]
    assert handshake.read_hello(offer(blocks=blocks, cipher="aes")) == HELLO


@pytest.mark.parametrize("software", ["migd\n9", "migd\x1b[31m 9", "migd é", "x" * 101])
@pytest.mark.parametrize("versions", [(1, 1), (2, 3)])
def test_what_calls_itself_unprintably_is_a_protocol_error(software: str, versions: tuple[int, int]) -> None:
    """It would end up in the terminals of people, also where the versions do not meet."""
    with pytest.raises(ProtocolError, match="bad HELLO message"):
        handshake.read_hello(offer(min_version=versions[0], max_version=versions[1], software=software))


def test_a_probe_is_answered_with_what_it_asked_for() -> None:
    question = msgspec.structs.replace(handshake.probe(ID), min_version=7, max_version=9, software="migd 9")
    answer = handshake.about(question, realtime_ns=17, free_bytes=4096, max_streams=3)
    assert answer == messages.About(
        migration=ID,
        min_version=1,
        max_version=1,
        software=SOFTWARE,
        realtime_ns=17,
        free_bytes=4096,
        max_streams=3,
        features=("lz4", "resolve"),
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("an id that is none", {"migration": "vm1"}),
        ("an empty guest name", {"guest": ""}),
        ("a path as guest name", {"guest": "../vm1"}),
        ("a guest name with a line feed", {"guest": "vm1\n"}),
        ("a long guest name", {"guest": "x" * 65}),
        ("no blocks", {"blocks": []}),
        ("too many blocks", {"blocks": [{"name": f"b{n}", "pages": 1} for n in range(65)]}),
        ("a block of no pages", {"blocks": [{"name": "ram", "pages": 0}]}),
        ("a block of negative size", {"blocks": [{"name": "ram", "pages": -1}]}),
        ("a block without a size", {"blocks": [{"name": "ram"}]}),
        ("no streams", {"streams": 0}),
        ("too many streams for any daemon", {"streams": 65}),
        ("a page size that is text", {"page_bytes": "4096"}),
        ("a version that is text", {"min_version": "1"}),
        ("a version that is a float", {"max_version": 1.5}),
        ("versions the wrong way round", {"min_version": 3, "max_version": 1}),
    ],
)
def test_a_bad_hello_is_a_protocol_error(name: str, fields: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="bad HELLO message"):
        handshake.read_hello(offer(**fields))


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"GET / HTTP/1.1",
        msgspec.msgpack.encode({"min_version": 1}),
        msgspec.msgpack.encode(HELLO)[:-1],
        msgspec.msgpack.encode(HELLO).replace(b"migd 0", b"migd\xff0"),
        b"\x81\xa1z" + b"\x91" * 1_000_000,
    ],
    ids=["empty", "invalid", "a list", "HTTP", "half", "cut", "not UTF-8", "nesting without end"],
)
def test_bytes_that_are_no_hello_are_a_protocol_error(metadata: bytes) -> None:
    """They come from anybody who can reach the port: nothing else may escape."""
    with pytest.raises(ProtocolError, match="bad HELLO message"):
        handshake.read_hello(raw(metadata))


@pytest.mark.parametrize("kind", sorted(set(FrameType) - {FrameType.HELLO}))
def test_any_other_frame_is_a_protocol_error(kind: FrameType) -> None:
    frame = Frame(kind, Codec.NONE, 0, 0, bytes(16), b"", memoryview(b""))
    with pytest.raises(ProtocolError, match=f"{kind.name} where HELLO was due"):
        handshake.read_hello(frame)


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"page_bytes": 65536}, "page size 65536 does not match 4096"),
        ({"streams": 17}, "17 streams requested, at most 16"),
        ({"blocks": (BlockInfo("a", 1 << 32),)}, "4294967296 pages of RAM, a guest has at most 2^32-1"),
        ({"blocks": (BlockInfo("a", 1 << 31), BlockInfo("b", 1 << 31))}, "4294967296 pages of RAM"),
        ({"blocks": (BlockInfo("a", 1), BlockInfo("a", 2))}, "two RAM blocks have the same name"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(hello: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as refused:
        handshake.accept(msgspec.structs.replace(HELLO, **hello), TOKEN, max_streams=16)
    assert reason in str(refused.value)
    assert handshake.accept(HELLO, TOKEN, max_streams=16).token == TOKEN


def test_the_largest_guest_there_may_be_is_one_run_on_the_wire() -> None:
    largest = msgspec.structs.replace(HELLO, blocks=(BlockInfo("a", MAX_RAM_PAGES - 1), BlockInfo("b", 1)))
    assert handshake.accept(largest, TOKEN, max_streams=16).token == TOKEN
    (frame,) = Feed().feed(FrameEncoder().runs(FrameType.FREE, [(0, MAX_RAM_PAGES)])).frames
    assert (frame.count, frame.page_runs(MAX_RAM_PAGES)) == (MAX_RAM_PAGES, [(0, MAX_RAM_PAGES)])


def test_only_features_both_sides_know_are_accepted() -> None:
    offer = msgspec.structs.replace(HELLO, features=("time-travel", "lz4"))
    assert handshake.accept(offer, TOKEN, max_streams=16).features == ("lz4",)
    without = msgspec.structs.replace(HELLO, features=())
    assert handshake.accept(without, TOKEN, max_streams=16).features == ()


def test_every_message_type_is_known_by_its_frame_type() -> None:
    """Frame type and class meet in one table; a message forgotten there could not be sent at all."""
    records = {FrameType.PAGES, FrameType.ZERO, FrameType.FREE, FrameType.STATE}
    assert set(messages._CLASSES) == set(FrameType) - records
    assert set(messages._CLASSES.values()) == set(messages.Message.__args__)
    for kind, message in messages._CLASSES.items():
        assert message.__name__.upper() == kind.name
    assert Hello in messages._CLASSES.values()
