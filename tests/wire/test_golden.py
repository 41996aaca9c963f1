"""Golden bytes: every frame type as exact bytes, through the encoder and through the decoder.

Whoever changes a byte of the protocol changes this table, and with it ``FRAMING_VERSION`` or the versions
that HELLO offers. The table is hexadecimal: the header's fields separated by blanks (magic, framing version,
type, codec, zero, sequence, count, runs, metadata bytes, payload bytes, digest), then metadata and payload.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.ram.digest import frame_digest
from migd.wire import messages
from migd.wire.codec import decompress
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder
from migd.wire.messages import BlockInfo, Message
from migd.wire.protocol import HEADER, MAGIC, Codec, FrameType, Keeper
from tests.wire.feeding import Feed

ID = "00112233445566778899aabbccddeeff"
TOKEN = bytes(range(16))
PAGE = bytes(range(256)) * 16
REPEATED_PAGE = b"migd" * 1024
PACKED_PAGE = bytes.fromhex("4f6d6967640400fffffffffffffffffffffffffffffff350646d696764")
DIGEST = frame_digest(PAGE)
REPEATED_DIGEST = frame_digest(REPEATED_PAGE)
HELLO = messages.Hello(
    migration=ID,
    min_version=1,
    max_version=1,
    software="migd 0.1.0",
    guest="vm1",
    page_bytes=4096,
    blocks=(BlockInfo("ram", 262144), BlockInfo("rom", 16)),
    streams=2,
    features=("lz4",),
)
ACCEPT = messages.Accept(
    migration=ID, version=1, software="migd 0.1.0", token=TOKEN, features=("lz4",), max_frame_pages=512
)
ABOUT = messages.About(
    migration=ID,
    min_version=1,
    max_version=1,
    software="migd 0.1.0",
    realtime_ns=1_700_000_000_000_000_000,
    free_bytes=1 << 34,
    max_streams=16,
    features=("lz4",),
)

Encode = Callable[[FrameEncoder], bytes]


def say(message: Message) -> Encode:
    return lambda encoder: encoder.message(message)


def runs(kind: FrameType, *which: tuple[int, int]) -> Encode:
    return lambda encoder: encoder.runs(kind, which)


def pages(which: list[tuple[int, int]], digests: bytes, codec: Codec, payload: bytes) -> Encode:
    return lambda encoder: encoder.pages(which, digests, codec, len(payload)) + payload


def third(encode: Encode) -> Encode:
    """The same frame behind two others of its connection: only its sequence and digest differ."""

    def encode_third(encoder: FrameEncoder) -> bytes:
        encoder.message(messages.Ready(migration=ID))
        encoder.message(messages.Ready(migration=ID))
        return encode(encoder)

    return encode_third


GOLDEN: list[tuple[str, Encode, str]] = [
    (
        "HELLO",
        say(HELLO),
        "4d494744 02 01 00 00 0000000000000000 00000000 00000000 b8000000 00000000 "
        "b9d296b57453a9f5336cd76c851c56a9"
        "89ab6d696e5f76657273696f6e01ab6d61785f76657273696f6e01a8736f667477617265aa6d69676420302e312e30a5"
        "6775657374a3766d31aa706167655f6279746573cd1000a6626c6f636b739282a46e616d65a372616da57061676573ce"
        "0004000082a46e616d65a3726f6da5706167657310a773747265616d7302a8666561747572657391a36c7a34a96d6967"
        "726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "ACCEPT",
        say(ACCEPT),
        "4d494744 02 02 00 00 0000000000000000 00000000 00000000 83000000 00000000 "
        "3201af7054dfae9789a2bd3a721206a7"
        "86a776657273696f6e01a8736f667477617265aa6d69676420302e312e30a5746f6b656ec41000010203040506070809"
        "0a0b0c0d0e0fa8666561747572657391a36c7a34af6d61785f6672616d655f7061676573cd0200a96d6967726174696f"
        "6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "REFUSE",
        say(messages.Refuse(migration=ID, reason="no room")),
        "4d494744 02 03 00 00 0000000000000000 00000000 00000000 3c000000 00000000 "
        "5a30ad38ea090244844317a2a7476d54"
        "82a6726561736f6ea76e6f20726f6f6da96d6967726174696f6ed9203030313132323333343435353636373738383939"
        "616162626363646465656666",
    ),
    (
        "STREAM",
        say(messages.Stream(migration=ID, token=TOKEN, index=1)),
        "4d494744 02 04 00 00 0000000000000000 00000000 00000000 4c000000 00000000 "
        "5ac0a4101938ca43f9dfddc1f6a46369"
        "83a5746f6b656ec410000102030405060708090a0b0c0d0e0fa5696e64657801a96d6967726174696f6ed92030303131"
        "32323333343435353636373738383939616162626363646465656666",
    ),
    (
        "BEGIN",
        say(messages.Begin(migration=ID)),
        "4d494744 02 05 00 00 0000000000000000 00000000 00000000 2d000000 00000000 "
        "f2a17b5512bbd0394039588afad2adce"
        "81a96d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "PREPARED",
        say(messages.Prepared(migration=ID)),
        "4d494744 02 09 00 00 0000000000000000 00000000 00000000 2d000000 00000000 "
        "345e9197233c9c1cc5bd13753b629ee8"
        "81a96d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "PROBE",
        say(messages.Probe(migration=ID, min_version=1, max_version=1, software="migd 0.1.0")),
        "4d494744 02 0a 00 00 0000000000000000 00000000 00000000 5b000000 00000000 "
        "65c37a8248e4f440c0334ced9e66f74d"
        "84ab6d696e5f76657273696f6e01ab6d61785f76657273696f6e01a8736f667477617265aa6d69676420302e312e30a9"
        "6d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "ABOUT",
        say(ABOUT),
        "4d494744 02 0b 00 00 0000000000000000 00000000 00000000 9f000000 00000000 "
        "be67d89b2944065e7dbfdb380409e823"
        "88ab6d696e5f76657273696f6e01ab6d61785f76657273696f6e01a8736f667477617265aa6d69676420302e312e30ab"
        "7265616c74696d655f6e73cf17979cfe362a0000aa667265655f6279746573cf0000000400000000ab6d61785f737472"
        "65616d7310a8666561747572657391a36c7a34a96d6967726174696f6ed9203030313132323333343435353636373738"
        "383939616162626363646465656666",
    ),
    (
        "PING",
        say(messages.Ping(migration=ID, nonce=7)),
        "4d494744 02 06 00 00 0000000000000000 00000000 00000000 34000000 00000000 "
        "29aab8b69406e3a0970b5e40ac66834c"
        "82a56e6f6e636507a96d6967726174696f6ed92030303131323233333434353536363737383839396161626263636464"
        "65656666",
    ),
    (
        "PONG",
        say(messages.Pong(migration=ID, nonce=7, applied_bytes=1 << 33)),
        "4d494744 02 07 00 00 0000000000000000 00000000 00000000 4b000000 00000000 "
        "508af420bb393ba890a6ad15d392b30f"
        "83a56e6f6e636507ad6170706c6965645f6279746573cf0000000200000000a96d6967726174696f6ed9203030313132"
        "323333343435353636373738383939616162626363646465656666",
    ),
    (
        "ABORT",
        say(messages.Abort(migration=ID, reason="cancelled")),
        "4d494744 02 08 00 00 0000000000000000 00000000 00000000 3e000000 00000000 "
        "a081f2e39cdcb33cad204470b204dd11"
        "82a6726561736f6ea963616e63656c6c6564a96d6967726174696f6ed920303031313232333334343535363637373838"
        "3939616162626363646465656666",
    ),
    (
        "PAGES, raw",
        pages([(5, 6)], DIGEST, Codec.NONE, PAGE),
        "4d494744 02 10 00 00 0000000000000000 01000000 01000000 18000000 00100000 "
        "d782de3834316cf9768797015919dfad"
        "050000000100000003916578969f7a66eb4b7c3707879151" + PAGE.hex(),
    ),
    (
        "PAGES, lz4",
        pages([(5, 6)], REPEATED_DIGEST, Codec.LZ4, PACKED_PAGE),
        "4d494744 02 10 01 00 0000000000000000 01000000 01000000 18000000 1d000000 "
        "27ec12dbf4a6b144449d0f2f378e27f5"
        "0500000001000000461517eba0bb58449c9d15eeb9db1fc04f6d6967640400fffffffffffffffffffffffffffffff350"
        "646d696764",
    ),
    (
        "PAGES, two runs",
        pages([(0, 2), (4096, 4097)], DIGEST * 3, Codec.LZ4, PACKED_PAGE),
        "4d494744 02 10 01 00 0000000000000000 03000000 02000000 40000000 1d000000 "
        "f78e2db2d40f2c3a60507cd42dc7358b"
        "0000000002000000001000000100000003916578969f7a66eb4b7c370787915103916578969f7a66eb4b7c3707879151"
        "03916578969f7a66eb4b7c37078791514f6d6967640400fffffffffffffffffffffffffffffff350646d696764",
    ),
    (
        "ZERO",
        runs(FrameType.ZERO, (0, 1), (2, 300)),
        "4d494744 02 11 00 00 0000000000000000 2b010000 02000000 10000000 00000000 "
        "a346230489426994adee00c92057737c"
        "0000000001000000020000002a010000",
    ),
    (
        "FREE",
        runs(FrameType.FREE, (0xFFFFFF00, 0xFFFFFFFF)),
        "4d494744 02 12 00 00 0000000000000000 ff000000 01000000 08000000 00000000 "
        "aa304c226e9e92b52133e0d653df8acf"
        "00ffffffff000000",
    ),
    (
        "BARRIER",
        say(messages.Barrier(migration=ID, iteration=3)),
        "4d494744 02 13 00 00 0000000000000000 00000000 00000000 38000000 00000000 "
        "2d1f9c4b9200f063961b5862564c4925"
        "82a9697465726174696f6e03a96d6967726174696f6ed920303031313232333334343535363637373838393961616262"
        "6363646465656666",
    ),
    (
        "END",
        say(messages.End(migration=ID, frames=4, pages=1000, zero=70000, free=1, digest=DIGEST)),
        "4d494744 02 14 00 00 0000000000000000 00000000 00000000 67000000 00000000 "
        "15922acfcb79ab415376bc473c156246"
        "86a66672616d657304a57061676573cd03e8a47a65726fce00011170a46672656501a6646967657374c4100391657896"
        "9f7a66eb4b7c3707879151a96d6967726174696f6ed92030303131323233333434353536363737383839396161626263"
        "63646465656666",
    ),
    (
        "STATE",
        lambda encoder: encoder.state(b"device state"),
        "4d494744 02 20 00 00 0000000000000000 00000000 00000000 0c000000 00000000 "
        "818c51e5d1fb3ddd55461971d9d12a4f"
        "646576696365207374617465",
    ),
    (
        "STATE, empty",
        lambda encoder: encoder.state(b""),
        "4d494744 02 20 00 00 0000000000000000 00000000 00000000 00000000 00000000 "
        "1e739f35f7ba6815f536b9557267d3a3",
    ),
    (
        "FINISH",
        say(messages.Finish(migration=ID, state_bytes=12, state_digest=DIGEST)),
        "4d494744 02 21 00 00 0000000000000000 00000000 00000000 59000000 00000000 "
        "8a77b96057c07e54a3b46c0bbc21bbad"
        "83ab73746174655f62797465730cac73746174655f646967657374c41003916578969f7a66eb4b7c3707879151a96d69"
        "67726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "READY",
        say(messages.Ready(migration=ID)),
        "4d494744 02 22 00 00 0000000000000000 00000000 00000000 2d000000 00000000 "
        "7bec32de0ea85cd41bab0a477ada14dc"
        "81a96d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "GO",
        say(messages.Go(migration=ID)),
        "4d494744 02 23 00 00 0000000000000000 00000000 00000000 2d000000 00000000 "
        "9d6933a8ccec1d83053bb8cc10cbcb06"
        "81a96d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "STARTED",
        say(messages.Started(migration=ID, stopped_at_ns=1_700_000_000_000_000_000, resumed_at_ns=-1)),
        "4d494744 02 24 00 00 0000000000000000 00000000 00000000 53000000 00000000 "
        "c279f6e89d0f42f70623b69e22e2a34a"
        "83ad73746f707065645f61745f6e73cf17979cfe362a0000ad726573756d65645f61745f6e73ffa96d6967726174696f"
        "6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "ABORTED",
        say(messages.Aborted(migration=ID, reason="")),
        "4d494744 02 25 00 00 0000000000000000 00000000 00000000 35000000 00000000 "
        "f64a7db4be3360cd0391c19680e684f0"
        "82a6726561736f6ea0a96d6967726174696f6ed920303031313232333334343535363637373838393961616262636364"
        "6465656666",
    ),
    (
        "VERDICT",
        say(messages.Verdict(migration=ID, ok=True, detail="0 pages differ")),
        "4d494744 02 26 00 00 0000000000000000 00000000 00000000 47000000 00000000 "
        "26d544206e20d9ed2385d9a73b4d8449"
        "83a26f6bc3a664657461696cae3020706167657320646966666572a96d6967726174696f6ed920303031313232333334"
        "3435353636373738383939616162626363646465656666",
    ),
    (
        "CHECKED",
        say(messages.Checked(migration=ID, pages=5000, wrong=0, first_wrong=-1)),
        "4d494744 02 27 00 00 0000000000000000 00000000 00000000 4a000000 00000000 "
        "f1ccfb151850cbdb69099abdef4448f0"
        "84a57061676573cd1388a577726f6e6700ab66697273745f77726f6e67ffa96d6967726174696f6ed920303031313232"
        "3333343435353636373738383939616162626363646465656666",
    ),
    (
        "RESOLVE",
        say(messages.Resolve(migration=ID, keeper=Keeper.SOURCE, detail="forced by the operator")),
        "4d494744 02 28 00 00 0000000000000000 00000000 00000000 59000000 00000000 "
        "dbb538cc92d583fca4902f8916b2c65d"
        "83a66b6565706572a6736f75726365a664657461696cb6666f7263656420627920746865206f70657261746f72a96d69"
        "67726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
    (
        "GO, third of its connection",
        third(say(messages.Go(migration=ID))),
        "4d494744 02 23 00 00 0200000000000000 00000000 00000000 2d000000 00000000 "
        "790ae6ab1ffa2b2ef66a54d3d6459db0"
        "81a96d6967726174696f6ed9203030313132323333343435353636373738383939616162626363646465656666",
    ),
]


TYPES = sorted(FrameType)
NAMES = [name for name, _, _ in GOLDEN]


def frames_of(encode: Encode) -> FrameDecoder:
    """A decoder that has seen what the encoder of a table's row has sealed before that row's frame."""
    encoder, decoder = FrameEncoder(), FrameDecoder()
    encode(encoder)
    decoder._sequence = encoder._sequence - 1
    return decoder


def same(frame: Frame, data: bytes) -> bool:
    """Whether a decoded frame is what the bytes say, read off them without the code under test."""
    _, _, kind, codec, _, _, count, run_count, metadata, payload, digest = HEADER.unpack_from(data)
    content = data[HEADER.size :]
    assert len(content) == metadata + payload
    return (frame.type, frame.codec, frame.count, frame.run_count, frame.digest, frame.metadata) == (
        kind, codec, count, run_count, digest, content[:metadata],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "encode", "text"), GOLDEN, ids=NAMES)
def test_golden_bytes_through_encoder_and_decoder_byte_by_byte(name: str, encode: Encode, text: str) -> None:
    data = bytes.fromhex(text)
    assert encode(FrameEncoder()).hex() == data.hex()

    feed = Feed(frames_of(encode))
    for at in range(len(data) - 1):
        feed.feed(data[at : at + 1])
        assert feed.frames == []
        assert not feed.decoder.at_boundary
    feed.feed(data[-1:])
    assert feed.decoder.at_boundary
    (frame,) = feed.frames
    assert same(frame, data)
    assert feed.payloads == [data[len(data) - len(feed.payloads[0]) :] if feed.payloads[0] else b""]


@pytest.mark.parametrize(("name", "encode", "text"), GOLDEN, ids=NAMES)
def test_a_decoded_message_is_the_one_that_was_encoded(name: str, encode: Encode, text: str) -> None:
    (frame,) = Feed(frames_of(encode)).feed(bytes.fromhex(text)).frames
    if frame.type in (FrameType.PAGES, FrameType.ZERO, FrameType.FREE, FrameType.STATE):
        assert name.startswith(frame.type.name)
        return
    again = FrameEncoder()
    again._sequence = frame_sequence(text)
    assert again.message(frame.message()).hex() == bytes.fromhex(text).hex()


def frame_sequence(text: str) -> int:
    return int.from_bytes(bytes.fromhex(text)[8:16], "little")


def test_the_page_records_of_the_table_say_which_pages() -> None:
    decoded = {}
    for name, encode, text in GOLDEN:
        (frame,) = Feed(frames_of(encode)).feed(bytes.fromhex(text)).frames
        if frame.run_count:
            decoded[name] = (frame.page_runs(1 << 32), frame.count)
    assert decoded == {
        "PAGES, raw": ([(5, 6)], 1),
        "PAGES, lz4": ([(5, 6)], 1),
        "PAGES, two runs": ([(0, 2), (4096, 4097)], 3),
        "ZERO": ([(0, 1), (2, 300)], 299),
        "FREE": ([(0xFFFFFF00, 0xFFFFFFFF)], 255),
    }


def test_the_payload_of_the_table_unpacks_to_the_page_whose_digest_it_carries() -> None:
    text = {name: text for name, _, text in GOLDEN}["PAGES, lz4"]
    feed = Feed().feed(bytes.fromhex(text))
    assert decompress(memoryview(feed.payloads[0]), 4096) == REPEATED_PAGE
    assert feed.frames[0].page_digests == REPEATED_DIGEST


def test_every_frame_type_has_golden_bytes() -> None:
    assert sorted({FrameType(bytes.fromhex(text)[5]) for _, _, text in GOLDEN}) == TYPES
    assert [(kind.name, int(kind)) for kind in TYPES] == [
        ("HELLO", 1), ("ACCEPT", 2), ("REFUSE", 3), ("STREAM", 4), ("BEGIN", 5), ("PING", 6), ("PONG", 7),
        ("ABORT", 8), ("PREPARED", 9), ("PROBE", 10), ("ABOUT", 11),
        ("PAGES", 16), ("ZERO", 17), ("FREE", 18), ("BARRIER", 19),
        ("END", 20), ("STATE", 32), ("FINISH", 33), ("READY", 34), ("GO", 35), ("STARTED", 36),
        ("ABORTED", 37), ("VERDICT", 38), ("CHECKED", 39), ("RESOLVE", 40),
    ]  # fmt: skip
    assert [(codec.name, int(codec)) for codec in Codec] == [("NONE", 0), ("LZ4", 1)]


def test_the_header_is_laid_out_as_the_specification_says() -> None:
    text = {name: text for name, _, text in GOLDEN}["PAGES, two runs"]
    data = bytes.fromhex(text)
    assert data[0:4] == MAGIC == b"MIGD"
    assert (data[4], data[5], data[6], data[7]) == (2, FrameType.PAGES, Codec.LZ4, 0)
    numbers = [int.from_bytes(data[at : at + 4], "little") for at in (16, 20, 24, 28)]
    assert numbers == [3, 2, 2 * 8 + 3 * 16, len(PACKED_PAGE)]
    assert data[32:48] == frame_digest(data[:32] + data[48 : 48 + numbers[2]])


# -- the whole table as one connection, in any pieces ----------------------------------------------------


def stream() -> tuple[bytes, list[str]]:
    """Every row as one frame of one connection, and which type each is."""
    encoder = FrameEncoder()
    rows = [row for row in GOLDEN if not row[0].startswith("GO, third")]
    return b"".join(encode(encoder) for _, encode, _ in rows), [name.partition(",")[0] for name, _, _ in rows]


STREAM, STREAM_TYPES = stream()


def test_the_whole_stream_byte_by_byte() -> None:
    feed = Feed().feed(STREAM, [1] * len(STREAM))
    assert [frame.type.name for frame in feed.frames] == STREAM_TYPES
    assert feed.decoder.at_boundary


@given(sizes=st.lists(st.integers(1, 5000), max_size=40))
def test_any_split_of_the_stream_gives_the_same_frames(sizes: list[int]) -> None:
    whole, split = Feed().feed(STREAM), Feed().feed(STREAM, sizes)
    assert [frame.type.name for frame in split.frames] == STREAM_TYPES
    assert [(frame.digest, frame.metadata) for frame in split.frames] == [
        (frame.digest, frame.metadata) for frame in whole.frames
    ]
    assert split.payloads == whole.payloads
    assert split.decoder.account == whole.decoder.account
