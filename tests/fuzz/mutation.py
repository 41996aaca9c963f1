"""Mutations of bytes and of trees of values, drawn from a seeded random number generator."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""What msgspec decodes untyped: None, numbers, text, bytes, lists, maps."""

EDGES = (0, 1, 2, 7, 8, 15, 16, 31, 32, 127, 128, 255, 256, 511, 512, 513, 1023, 4095, 4096, 4097, 65535,
         65536, 1 << 20, (1 << 20) + 1, 2 << 20, (2 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
         1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
"""Where limits lie, and one beyond."""

_FLOATS = (0.0, -0.0, 1.5, -1.0, 1e300, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "",
    "a",
    "-1",
    "..",
    "/",
    "x" * 65,
    "y" * 1001,
    "\0",
    "\n",
    "\u202e",
    "\ud7ff",
    "\U0010ffff",
    "null",
)
_DEEP = (3, 60, 900, 1100, 5000)
"""Levels: below and above the interpreter's 1000."""


def number(chance: Random, bits: int = 64) -> int:
    """An edge or one beside it, or any number, of so many bits."""
    mask = (1 << bits) - 1
    if chance.random() < 0.7:
        return (chance.choice(EDGES) + chance.choice((0, 0, 0, 1, -1))) & mask
    return chance.getrandbits(bits)


# -- bytes ------------------------------------------------------------------------------------------


def mangled(data: bytes, other: bytes, chance: Random) -> bytes:
    """One to four mutations of the bytes; ``other`` is what is spliced in."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_BYTE_MUTATIONS)(data, other, chance)
    return data


def flipped(data: bytes, _other: bytes, chance: Random) -> bytes:
    """One bit, flipped."""
    if not data:
        return data
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _replaced(data: bytes, _other: bytes, chance: Random) -> bytes:
    at, size = _place(data, chance)
    return data[:at] + chance.randbytes(min(size, 16)) + data[at + min(size, 16) :]


def _spliced(data: bytes, other: bytes, chance: Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


def _truncated(data: bytes, _other: bytes, chance: Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _deleted(data: bytes, _other: bytes, chance: Random) -> bytes:
    at, size = _place(data, chance)
    return data[:at] + data[at + size :]


def _repeated(data: bytes, _other: bytes, chance: Random) -> bytes:
    at, size = _place(data, chance)
    return data[: at + size] + data[at:]


def _inserted(data: bytes, _other: bytes, chance: Random) -> bytes:
    at, _ = _place(data, chance)
    return data[:at] + chance.randbytes(chance.choice((1, 2, 4, 8, 48))) + data[at:]


def _renumbered(data: bytes, _other: bytes, chance: Random) -> bytes:
    """A length field, wherever one may be, says something else."""
    size, code = chance.choice(((1, "B"), (2, "<H"), (4, "<I"), (4, ">I"), (8, "<Q")))
    if len(data) < size:
        return data
    at = chance.randrange(len(data) - size + 1)
    return data[:at] + struct.pack(code, number(chance, 8 * size)) + data[at + size :]


def _place(data: bytes, chance: Random) -> tuple[int, int]:
    """Somewhere, and a short way on."""
    at = chance.randrange(len(data) + 1)
    return at, min(len(data) - at, chance.choice((1, 1, 2, 4, 8, 16, 64, 256)))


_BYTE_MUTATIONS: tuple[Callable[[bytes, bytes, Random], bytes], ...] = (
    flipped, flipped, _replaced, _spliced, _truncated, _deleted, _repeated, _inserted, _renumbered,
)  # fmt: skip


# -- order ------------------------------------------------------------------------------------------


def reordered(parts: list[Any], chance: Random) -> list[Any]:
    """Some part gone, repeated, swapped with another or moved; or only some of them left."""
    if not parts:
        return parts
    at, to = chance.randrange(len(parts)), chance.randrange(len(parts))
    match chance.randrange(5):
        case 0:
            return parts[:at] + parts[at + 1 :]
        case 1:
            return parts[: at + 1] + parts[at:]
        case 2:
            parts = list(parts)
            parts[at], parts[to] = parts[to], parts[at]
            return parts
        case 3:
            rest = parts[:at] + parts[at + 1 :]
            return [*rest[:to], parts[at], *rest[to:]]
        case _:
            return parts[min(at, to) : max(at, to) + 1]


# -- trees ------------------------------------------------------------------------------------------


def grown(tree: Tree, chance: Random) -> Tree:
    """A tree with one value of it changed, or one key gone, repeated under another name, or added."""
    if isinstance(tree, dict) and tree and chance.random() < 0.9:
        key = chance.choice(list(tree))
        match chance.randrange(8):
            case 0:
                return {name: value for name, value in tree.items() if name != key}
            case 1:
                return {**tree, _text(chance): tree[key]}
            case 2:
                return {**tree, _text(chance): leaf(chance)}
            case 3:
                return {**tree, key: tree[chance.choice(list(tree))]}
            case _:
                return {**tree, key: grown(tree[key], chance)}
    if isinstance(tree, list) and tree and chance.random() < 0.9:
        if chance.random() < 0.3:
            return reordered(tree, chance)
        at = chance.randrange(len(tree))
        return [*tree[:at], grown(tree[at], chance), *tree[at + 1 :]]
    return _beside(tree, chance) if chance.random() < 0.6 else leaf(chance)


def _beside(value: Tree, chance: Random) -> Tree:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return chance.choice((value + 1, value - 1, -value, number(chance), -(number(chance) >> 1)))
        case float():
            return chance.choice(_FLOATS)
        case str():
            at = chance.randrange(len(value) + 1)
            return value[:at] + _text(chance) + value[at + chance.choice((0, 1, 8)) :]
        case bytes():
            return mangled(value, b"", chance)
        case _:
            return leaf(chance)


def leaf(chance: Random) -> Tree:
    """Any value; seldom a deep one."""
    if chance.random() < 0.02:
        return nested(chance.choice(_DEEP), chance.random() < 0.5)
    return chance.choice(
        (None, True, False, number(chance), -(number(chance) >> 1), chance.choice(_FLOATS), _text(chance), [],
         {}, [number(chance)] * chance.choice((1, 3, 70)), {_text(chance): number(chance)})
    )  # fmt: skip


def nested(levels: int, maps: bool) -> Tree:
    """Lists in lists, or maps in maps."""
    tree: Tree = 0
    for _ in range(levels):
        tree = {"a": tree} if maps else [tree]
    return tree


def _text(chance: Random) -> str:
    return chance.choice(_TEXTS) if chance.random() < 0.7 else f"k{chance.getrandbits(16):x}"


def pick_other(seeds: Sequence[bytes], chance: Random) -> bytes:
    """What to splice in."""
    return chance.choice(seeds) if seeds else b""
