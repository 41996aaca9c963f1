"""Sizes and bandwidths as people write them: ``512Mi``, ``1G``, ``unlimited``; 1G = 10^9, 1Gi = 2^30."""

from __future__ import annotations

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
            "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip

UNLIMITED = 0
"""The bandwidth that holds nobody up."""

LEAST_BANDWIDTH_BYTES_S = 100_000
"""Less is taken for a forgotten suffix, 500 for 500M: a guest of 1 GiB takes three hours at this."""


def parse_bytes(text: str) -> int:
    """A number of bytes. ValueError, in words for whoever wrote it."""
    bare = text.removesuffix("B")
    number = bare.rstrip("KMGTi")
    factor = _FACTORS.get(bare[len(number) :])
    try:
        if factor is None or float(number) < 0:
            raise ValueError
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no size; write it like 512Mi, 1Gi or 50M") from None


def parse_bandwidth(text: str) -> int:
    """Bytes per second, 0 for ``unlimited``. ValueError, in words for whoever wrote it."""
    if text == "unlimited":
        return UNLIMITED
    try:
        bytes_s = parse_bytes(text.removesuffix("/s"))
    except ValueError:
        raise ValueError(f"{text!r} is no bandwidth; write it like 1G, 500M or unlimited") from None
    return check_bandwidth(bytes_s)


def check_bandwidth(bytes_s: int) -> int:
    """The bandwidth itself. ValueError for one that is too low to move a guest, or negative."""
    if bytes_s != UNLIMITED and bytes_s < LEAST_BANDWIDTH_BYTES_S:
        raise ValueError(f"{bytes_s} bytes/s is too little; the least is 100K, and 0 is unlimited")
    return bytes_s


def bandwidth_text(bytes_s: int) -> str:
    """The shortest exact way to write a bandwidth, as ``parse_bandwidth`` reads it."""
    if bytes_s == UNLIMITED:
        return "unlimited"
    for suffix in ("T", "G", "M", "K"):
        if bytes_s % _FACTORS[suffix] == 0:
            return f"{bytes_s // _FACTORS[suffix]}{suffix}"
    return str(bytes_s)
