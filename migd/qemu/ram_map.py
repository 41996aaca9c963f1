"""RamMap: where guest-physical memory lies in the RAM files of a QEMU, as its own flat view says.

Never from constants: a pc splits its RAM around the PCI hole at 3 GiB, a q35 at 2 GiB, either only from some
size on, and another machine elsewhere. Offsets count through all RAM blocks, one behind the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from migd.errors import GuestError
from migd.ram.page import PAGE_BYTES

HINTABLE_FROM = 1 << 20
"""Below 1 MiB nothing is skipped: 0xA0000 to 0xFFFFF of the file are SMRAM and BIOS shadows, whatever the
guest may think of them, and the rest is not worth a rule."""

_ALIGNED_PAGES = 64
"""Where a bitmap frame may begin (docs/hint-protocol.md)."""

_FRAME_PAGES = 1 << 22
"""Of one bitmap frame: half of what it may have, as it grows when its bits are moved."""

_VIEW = re.compile(r'^ AS "memory"', re.MULTILINE)
_LINE = re.compile(
    r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]{16}))?(?: .*)?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Segment:
    """Guest-physical bytes ``gpa`` .. ``gpa + bytes`` lie from ``offset`` on."""

    gpa: int
    bytes: int
    offset: int


class RamMap:
    """Guest-physical memory that may be hinted, in pieces that are contiguous on both sides."""

    def __init__(self, segments: list[Segment], ram_bytes: int) -> None:
        self.segments = tuple(sorted(_joined(segments), key=lambda segment: segment.gpa))
        self.ram_bytes = ram_bytes

    @classmethod
    def parse(cls, mtree: str, blocks: Mapping[str, tuple[int, int]]) -> RamMap:
        """Of what the monitor answers to ``info mtree -f``; ``blocks``: name to (offset, bytes).

        GuestError if a block is not to be found there, or a piece lies outside of its block.
        """
        mtree = mtree.replace("\r\n", "\n")
        view = _VIEW.search(mtree)
        text = mtree[view.start() :].split("\n\n", 1)[0] if view else ""
        segments, seen = [], set()
        for low, high, name, at in _LINE.findall(text):
            found = blocks.get(name.removeprefix("/objects/"))
            if found is None:
                continue
            offset, size = found
            start, length, within = int(low, 16), int(high, 16) + 1 - int(low, 16), int(at or "0", 16)
            if within + length > size:
                raise GuestError(f"QEMU maps {within + length} bytes of {name}, which has {size}")
            seen.add(name.removeprefix("/objects/"))
            segments.append(Segment(start, length, offset + within))
        if missing := set(blocks) - seen:
            raise GuestError(f"RAM {', '.join(sorted(missing))} is not in the guest's physical memory")
        return cls(segments, sum(size for _, size in blocks.values()))

    @property
    def end(self) -> int:
        """Behind the highest guest-physical byte."""
        return max((segment.gpa + segment.bytes for segment in self.segments), default=0)

    def ranges(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Guest-physical bytes as (offset, length) pieces; what is no hintable RAM is left out."""
        for segment, low, high in self._within(start, start + length):
            yield segment.offset + low - segment.gpa, high - low

    def bitmaps(self, start: int, pages: int, bits: bytes) -> Iterator[tuple[int, int, bytes]]:
        """One bit a page from guest-physical ``start`` on, as (offset, pages, bits) that each fit a frame.

        ``start`` is a multiple of the page size. Bits of what is no hintable RAM are left out.
        """
        whole = int.from_bytes(bits, "little")
        for segment, low, high in self._within(start, start + pages * PAGE_BYTES):
            first, count = (low - start) // PAGE_BYTES, (high - low) // PAGE_BYTES
            page, lead = (segment.offset + low - segment.gpa) // PAGE_BYTES, 0
            page, lead = page - page % _ALIGNED_PAGES, page % _ALIGNED_PAGES
            piece = (whole >> first & (1 << count) - 1) << lead
            moved = piece.to_bytes(-(-(count + lead) // 8), "little")
            for at in range(0, count + lead, _FRAME_PAGES):
                size = min(_FRAME_PAGES, count + lead - at)
                yield (page + at) * PAGE_BYTES, size, moved[at // 8 : -(-(at + size) // 8)]

    def _within(self, start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
        """The part of each segment in these guest-physical bytes that may be hinted."""
        for segment in self.segments:
            low = max(start, segment.gpa, HINTABLE_FROM)
            high = min(stop, segment.gpa + segment.bytes)
            if low < high:
                yield segment, low, high


def _joined(segments: list[Segment]) -> Iterator[Segment]:
    """Neighbours on both sides as one: a flat view has a line wherever another device looks in between."""
    last: Segment | None = None
    for segment in sorted(segments, key=lambda segment: segment.gpa):
        if last and (last.gpa + last.bytes, last.offset + last.bytes) == (segment.gpa, segment.offset):
            last = Segment(last.gpa, last.bytes + segment.bytes, last.offset)
            continue
        if last:
            yield last
        last = segment
    if last:
        yield last
