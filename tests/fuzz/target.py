"""Target: one parser of migd as the fuzzer sees it: bytes in, and how far they came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import msgspec

ACCEPTED = "accepted"


class Broken(AssertionError):
    """A parser took what it must refuse, or did what it must never do; the text says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input."""

    verdict: str
    """ACCEPTED, or the class of the documented error that refused it."""
    depth: int
    """Whole frames, records or messages that were accepted first: how deep it went."""


class Target(Protocol):
    """What is made of an input is gone when ``run`` returns, so that any input can be replayed alone."""

    name: str
    shared: int
    """Its part of all inputs, in proportion to the other targets: slow ones get few."""
    seeds: list[bytes]
    """Recorded, each of them accepted to its end."""

    def mutate(self, data: bytes, chance: Random) -> bytes:
        """An input made from a seed, or from another input."""

    def run(self, data: bytes) -> Outcome:
        """Parse. Broken if a criterion is violated; any other exception is a finding, too."""

    def close(self) -> None:
        """Descriptors and files go."""


def survives(record: msgspec.Struct) -> None:
    """Broken if its JSON does not say the same."""
    if msgspec.json.decode(msgspec.json.encode(record), type=type(record)) != record:
        raise Broken(f"{type(record).__name__} does not survive being written")


def flipped_bits(data: bytes, seed: bytes, most: int = 2) -> list[int]:
    """Which bits of ``seed`` are flipped in ``data``; empty if that is not all, or more than ``most``."""
    if len(data) != len(seed) or data == seed:
        return []
    low, high = _first_difference(data, seed), _last_difference(data, seed)
    if high - low > 64:
        return []
    differing = int.from_bytes(data[low : high + 1], "little") ^ int.from_bytes(
        seed[low : high + 1], "little"
    )
    if differing.bit_count() > most:
        return []
    return [8 * low + bit for bit in range(differing.bit_length()) if differing >> bit & 1]


def _first_difference(one: bytes, other: bytes) -> int:
    return _bisect(len(one), lambda size: one[:size] == other[:size])


def _last_difference(one: bytes, other: bytes) -> int:
    size = len(one)
    return size - 1 - _bisect(size, lambda tail: one[size - tail :] == other[size - tail :])


def _bisect(size: int, same: Callable[[int], bool]) -> int:
    """How long the equal part is."""
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if same(middle):
            low = middle
        else:
            high = middle - 1
    return low
