"""What a tape says by the specification: whether a guest may be ready, with which image, and may start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from xxhash import xxh3_128_digest

from tests.fuzz import reading
from tests.fuzz.reading import Read, Unreadable
from tests.fuzz.tape import Connection, Tape

HELLO, STREAM, PING, PONG, BARRIER, END, STATE, FINISH, GO = 1, 4, 6, 7, 19, 20, 32, 33, 35
_RECORDS = (16, 17, 18)


@dataclass
class Meaning:
    """Of one migration on a tape. ``image``: for each page every content that the order of streams allows."""

    ready: bool = False
    image: dict[int, set[bytes]] = field(default_factory=dict)
    state: bytes = b""
    go: bool = False


def meaning(tape: Tape, migration: str) -> Meaning:
    """Of the first HELLO of this migration. Not ready whatever is wrong, with no matter what."""
    found = Meaning()
    for connection in tape.connections:
        first = next(_readable(connection), None)
        if first is None:
            continue
        said = _map(first)
        if first.kind == GO and said.get("migration") == migration:
            found.go = True
        if first.kind == HELLO and said.get("migration") == migration and not found.ready:
            _follow(tape, connection, said, found)
    return found


def _follow(tape: Tape, control: Connection, hello: dict[str, object], found: Meaning) -> None:
    migration, blocks, streams = hello["migration"], hello.get("blocks"), hello.get("streams")
    try:
        assert isinstance(blocks, list)
        assert isinstance(streams, int)
        pages = sum(int(block["pages"]) for block in blocks)
        state, go = _state(control, migration)
        found.image = _image(_streams(tape, str(migration), streams), str(migration), pages)
        found.state, found.ready, found.go = state, True, found.go or go
    except (Unreadable, KeyError, TypeError, ValueError, AssertionError):
        return


def _state(control: Connection, migration: object) -> tuple[bytes, bool]:
    """The device state up to a FINISH that fits, and whether a GO follows."""
    state, finished = b"", False
    frames = reading.frames(control.data)
    next(frames)
    while (frame := _next(frames, finished)) is not None:
        if frame.kind == STATE:
            state += b"" if finished else frame.metadata
            continue
        said = _map(frame)
        if said.get("migration") != migration:
            break
        if frame.kind == FINISH and not finished:
            if (said.get("state_bytes"), said.get("state_digest")) != (len(state), xxh3_128_digest(state)):
                raise Unreadable("FINISH")
            finished = True
        elif frame.kind == GO and finished:
            return state, True
        elif frame.kind not in (PING, PONG) and not finished:
            break
    if not finished:
        raise Unreadable("no FINISH")
    return state, False


def _next(frames: Iterator[Read], finished: bool) -> Read | None:
    """What follows a FINISH may be unreadable: the guest was ready before that was looked at."""
    try:
        return next(frames, None)
    except Unreadable:
        if finished:
            return None
        raise


def _streams(tape: Tape, migration: str, count: int) -> list[list[Read]]:
    """The frames of every data stream behind its STREAM, up to its END."""
    found: dict[object, list[Read]] = {}
    for connection in tape.connections:
        first = next(_readable(connection), None)
        if first is None or first.kind != STREAM:
            continue
        said = _map(first)
        index = said.get("index")
        right = said.get("migration") == migration and said.get("token") == tape.token
        if right and isinstance(index, int) and index < count and index not in found:
            found[index] = _up_to_end(connection)
    if len(found) != count:
        raise Unreadable("a stream is missing")
    return list(found.values())


def _up_to_end(connection: Connection) -> list[Read]:
    frames = []
    for number, frame in enumerate(reading.frames(connection.data)):
        if number:
            frames.append(frame)
        if frame.kind == END:
            return frames
    raise Unreadable("no END")


def _image(streams: list[list[Read]], migration: str, pages: int) -> dict[int, set[bytes]]:
    """All records in their iterations; streams are in any order within one."""
    iterations: list[list[dict[int, bytes]]] = []
    barriers = set()
    for stream in streams:
        parts: list[dict[int, bytes]] = [{}]
        counted = [0, 0, 0, 0]
        chain = bytes(16)
        for frame in stream:
            if frame.kind in _RECORDS:
                parts[-1] |= reading.pages_of(frame, pages)
                counted[0] += 1
                counted[frame.kind - 15] += frame.count
                chain = xxh3_128_digest(chain + frame.digest)
                continue
            said = _map(frame)
            if said.get("migration") != migration or frame.kind not in (BARRIER, END):
                raise Unreadable("no frame of a data stream")
            if frame.kind == BARRIER:
                parts.append({})
            elif [said.get(key) for key in ("frames", "pages", "zero", "free", "digest")] != [
                *counted,
                chain,
            ]:
                raise Unreadable("END")
        iterations.append(parts)
        barriers.add(len(parts))
    if len(barriers) != 1:
        raise Unreadable("streams with different numbers of barriers")
    image: dict[int, set[bytes]] = {}
    for parts in zip(*iterations, strict=True):
        for page in {page for part in parts for page in part}:
            image[page] = {part[page] or bytes(4096) for part in parts if page in part}
    return image


def _readable(connection: Connection) -> Iterator[Read]:
    try:
        yield from reading.frames(connection.data)
    except Unreadable:
        return


def _map(frame: Read) -> dict[str, object]:
    """A message without types. Unreadable if it is no map."""
    try:
        found = msgspec.msgpack.decode(frame.metadata)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Unreadable("no MessagePack") from error
    if not isinstance(found, dict):
        raise Unreadable("no map")
    return found
