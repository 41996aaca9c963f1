"""RamMap: what real QEMUs say of their memory, and the translation of hints against a page-by-page one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migd.errors import GuestError
from migd.guest import hints
from migd.guest.hints import HintDecoder
from migd.qemu.ram_map import HINTABLE_FROM, RamMap, Segment
from migd.ram.block import PAGE_BYTES
from tests.support.qemu import MIB, Hatchery

GIB = 1 << 30
BELOW_4G = "00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic"


def view(*lines: str, spaces: str = ' AS "memory", root: system') -> str:
    """What `info mtree -f` prints of one flat view."""
    listed = "".join(f"  {line}\n" for line in lines)
    return f"FlatView #0\n{spaces}\n Root memory region: system\n{listed}\n"


# -- real QEMUs -----------------------------------------------------------------------------------------

PLACES = [
    ("pc", "64M", [Segment(0, 64 * MIB, 0)]),
    ("pc", "3584M", [Segment(0, 3 * GIB, 0), Segment(4 * GIB, GIB // 2, 3 * GIB)]),
    ("pc", "4G", [Segment(0, 3 * GIB, 0), Segment(4 * GIB, GIB, 3 * GIB)]),
    ("q35", "64M", [Segment(0, 64 * MIB, 0)]),
    ("q35", "2816M", [Segment(0, 2 * GIB, 0), Segment(4 * GIB, 768 * MIB, 2 * GIB)]),
    ("q35", "4G", [Segment(0, 2 * GIB, 0), Segment(4 * GIB, 2 * GIB, 2 * GIB)]),
]


def from_hintable(segments: tuple[Segment, ...]) -> list[Segment]:
    """Without what lies below 1 MiB, which the BIOS maps now so and now so."""
    cut = [(segment, max(segment.gpa, HINTABLE_FROM)) for segment in segments]
    return [
        Segment(low, segment.gpa + segment.bytes - low, segment.offset + low - segment.gpa)
        for segment, low in cut
        if low < segment.gpa + segment.bytes
    ]


@pytest.mark.parametrize(("machine", "memory", "expected"), PLACES)
async def test_the_memory_of_a_real_machine_is_found_where_it_is(
    qemus: Hatchery, machine: str, memory: str, expected: list[Segment]
) -> None:
    """The file is sparse: 4 GiB of it take no more than what the BIOS touches."""
    qemu = qemus.start(machine=machine, memory=memory)
    async with qemu.monitor() as monitor:
        text = await monitor.ask("human-monitor-command", {"command-line": "info mtree -f"})
    size = qemu.ram.stat().st_size
    found = RamMap.parse(text, {"ram": (0, size)})
    assert from_hintable(found.segments) == from_hintable(tuple(expected))
    assert found.ram_bytes == size
    assert found.end == expected[-1].gpa + expected[-1].bytes


async def test_two_backends_lie_one_behind_the_other(qemus: Hatchery) -> None:
    nodes = [
        word
        for name in ("m0", "m1")
        for word in (
            *("-object", f"memory-backend-file,id={name},size=32M,mem-path={{dir}}/{name},share=on"),
            *("-numa", f"node,memdev={name}"),
        )
    ]
    qemu = qemus.start(*nodes, ram=())
    async with qemu.monitor() as monitor:
        text = await monitor.ask("human-monitor-command", {"command-line": "info mtree -f"})
    in_order = RamMap.parse(text, {"m0": (0, 32 * MIB), "m1": (32 * MIB, 32 * MIB)})
    assert from_hintable(in_order.segments) == [Segment(MIB, 63 * MIB, MIB)]  # which are neighbours
    swapped = RamMap.parse(text, {"m0": (32 * MIB, 32 * MIB), "m1": (0, 32 * MIB)})
    assert from_hintable(swapped.segments) == [
        Segment(MIB, 31 * MIB, 33 * MIB),
        Segment(32 * MIB, 32 * MIB, 0),
    ]


# -- texts ----------------------------------------------------------------------------------------------

Places = dict[str, tuple[int, int]]
RAM: Places = {"ram": (0, 64 * MIB)}
WHOLE = "0000000000000000-0000000003ffffff (prio 0, ram): ram"

TEXTS: list[tuple[str, str, Places, list[Segment]]] = [
    ("before the BIOS runs", view(
        "0000000000000000-00000000000bffff (prio 0, ram): ram",
        "00000000000c0000-00000000000dffff (prio 1, rom): pc.rom",
        "00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000",
        "0000000000100000-0000000003ffffff (prio 0, ram): ram @0000000000100000",
        BELOW_4G,
    ), RAM, [Segment(0, 0xC0000, 0), Segment(MIB, 63 * MIB, MIB)]),
    ("in the middle of the BIOS, with shadows", view(
        "0000000000000000-00000000000cffff (prio 0, ram): ram",
        "00000000000d0000-00000000000dffff (prio 1, rom): pc.rom @0000000000010000",
        "00000000000e0000-00000000000effff (prio 0, rom): pc.bios @0000000000020000",
        "00000000000f0000-0000000003ffffff (prio 0, ram): ram @00000000000f0000",
    ), RAM, [Segment(0, 0xD0000, 0), Segment(0xF0000, 64 * MIB - 0xF0000, 0xF0000)]),
    ("one piece", view(WHOLE), RAM, [Segment(0, 64 * MIB, 0)]),
    ("under KVM", view(f"{WHOLE} KVM"), RAM, [Segment(0, 64 * MIB, 0)]),
    ("by its path", view(WHOLE.replace(": ram", ": /objects/ram")), RAM, [Segment(0, 64 * MIB, 0)]),
    ("line ends of the monitor", view(WHOLE, BELOW_4G).replace("\n", "\r\n"), RAM, [Segment(0, 64 * MIB, 0)]),
    ("no line end behind it", view(WHOLE).rstrip(), RAM, [Segment(0, 64 * MIB, 0)]),
    ("below all others", view(WHOLE.replace("prio 0", "prio -1000")), RAM, [Segment(0, 64 * MIB, 0)]),
    ("another view comes first", view(
        "0000000000000000-0000000000ffffff (prio 0, ram): ram", spaces=' AS "dma"'
    ) + view(WHOLE), RAM, [Segment(0, 64 * MIB, 0)]),
    ("another view comes behind", view(WHOLE) + view(
        "0000000010000000-0000000013ffffff (prio 0, ram): ram", spaces=' AS "cpu-smm-0", root: smm'
    ), RAM, [Segment(0, 64 * MIB, 0)]),
    ("a view of several spaces", view(WHOLE, spaces=' AS "dma", root: bus\n AS "memory", root: system'),
     RAM, [Segment(0, 64 * MIB, 0)]),
    ("memory of devices", view(
        WHOLE,
        "00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram",
        "00000000fe000000-00000000fe000fff (prio 0, ramd): ramd",
        "00000000fe001000-00000000fe001fff (prio 0, nvdimm): ram",
    ), RAM, [Segment(0, 64 * MIB, 0)]),
    ("a device looks in between", view(
        "0000000000000000-0000000000ffffff (prio 0, ram): ram",
        "0000000001000000-0000000001000fff (prio 1, i/o): tseg-blackhole",
        "0000000001001000-0000000003ffffff (prio 0, ram): ram @0000000001001000",
    ), RAM, [Segment(0, 16 * MIB, 0), Segment(16 * MIB + 4096, 48 * MIB - 4096, 16 * MIB + 4096)]),
    ("neighbours, out of order", view(
        "0000000001000000-0000000003ffffff (prio 0, ram): ram @0000000001000000",
        "0000000000000000-0000000000ffffff (prio 0, ram): ram",
    ), RAM, [Segment(0, 64 * MIB, 0)]),
    ("neighbours on one side only", view(
        "0000000000000000-0000000001ffffff (prio 0, ram): ram @0000000002000000",
        "0000000002000000-0000000003ffffff (prio 0, ram): ram",
    ), RAM, [Segment(0, 32 * MIB, 32 * MIB), Segment(32 * MIB, 32 * MIB, 0)]),
    ("offsets above 4 GiB", view(
        "0000000000000000-000000007fffffff (prio 0, ram): ram",
        "0000000100000000-000000307fffffff (prio 0, ram): ram @0000000080000000",
    ), {"ram": (0, 192 * GIB)}, [Segment(0, 2 * GIB, 0), Segment(4 * GIB, 190 * GIB, 2 * GIB)]),
    ("the second of two blocks, above 4 GiB", view(
        "0000000000000000-000000007fffffff (prio 0, ram): a",
        "0000000100000000-00000002ffffffff (prio 0, ram): b",
    ), {"b": (2 * GIB, 8 * GIB), "a": (0, 2 * GIB)},
     [Segment(0, 2 * GIB, 0), Segment(4 * GIB, 8 * GIB, 2 * GIB)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "blocks", "expected"), TEXTS, ids=[row[0] for row in TEXTS])
def test_a_text_is_read(name: str, text: str, blocks: Places, expected: list[Segment]) -> None:
    found = RamMap.parse(text, blocks)
    assert list(found.segments) == expected
    assert found.end == expected[-1].gpa + expected[-1].bytes
    assert found.ram_bytes == sum(size for _, size in blocks.values())


REFUSED: list[tuple[str, str, Places, str]] = [
    ("nothing", "", RAM, "RAM ram is not in the guest's physical memory"),
    ("no view of memory", view(WHOLE, spaces=' AS "I/O", root: io'), RAM, "RAM ram is not in"),
    ("another name", view(WHOLE.replace(": ram", ": pc.ram")), RAM, "RAM ram is not in"),
    ("only readable", view(WHOLE.replace(", ram", ", rom")), RAM, "RAM ram is not in"),
    ("only the first of three", view(WHOLE), {**RAM, "b": (1, 1), "a": (2, 1)}, "RAM a, b is not in"),
    ("more than there is", view(WHOLE), {"ram": (0, 32 * MIB)}, "67108864 bytes of ram, which has 33554432"),
    ("from too far on", view(f"{WHOLE} @0000000000001000"), RAM, "maps 67112960 bytes of ram"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "blocks", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_text_without_the_ram_is_refused(name: str, text: str, blocks: Places, reason: str) -> None:
    with pytest.raises(GuestError, match=reason):
        RamMap.parse(text, blocks)


def test_a_map_of_nothing_ends_at_once() -> None:
    empty = RamMap([], 0)
    assert empty.end == 0
    assert list(empty.ranges(0, 1 << 63)) == []
    assert list(empty.bitmaps(0, 64, bytes(8))) == []


# -- translation, against one page after the other ------------------------------------------------------

PAGES = 600
"""Of guest-physical memory that is looked at, around 1 MiB (page 256) and around 4 GiB."""
BASES = (0, 4 * GIB // PAGE_BYTES - 300)


@st.composite
def maps(draw: st.DrawFn) -> tuple[RamMap, dict[int, int]]:
    """A map, and for every guest-physical page that may be hinted its page in the files."""
    cuts = sorted(draw(st.sets(st.integers(0, PAGES), max_size=8)))
    pieces = list(zip(cuts[::2], cuts[1::2], strict=False))
    placed, page = {}, 0
    for index in draw(st.permutations(range(len(pieces)))):
        page += draw(st.sampled_from((0, 0, 1, 7, 64)))  # what no one sees of a file
        placed[index] = page
        page += pieces[index][1] - pieces[index][0]
    far = draw(st.sampled_from((0, 0, 4 * GIB // PAGE_BYTES)))  # a block in front
    segments, by_page = [], {}
    for index, (low, high) in enumerate(pieces):
        base = draw(st.sampled_from(BASES))
        segments.append(
            Segment((base + low) * PAGE_BYTES, (high - low) * PAGE_BYTES, (far + placed[index]) * PAGE_BYTES)
        )
        by_page |= {base + low + at: far + placed[index] + at for at in range(high - low)}
    hintable = {gpa: page for gpa, page in by_page.items() if gpa * PAGE_BYTES >= HINTABLE_FROM}
    return RamMap(segments, (far + page) * PAGE_BYTES), hintable


@given(maps(), st.sampled_from(BASES), st.integers(-PAGE_BYTES, PAGES * PAGE_BYTES), st.data())
def test_ranges_cover_the_pages_that_they_name_and_no_others(
    made: tuple[RamMap, dict[int, int]], base: int, start: int, data: st.DataObject
) -> None:
    ram, pages = made
    start = max(0, base * PAGE_BYTES + start)
    length = data.draw(st.one_of(st.integers(0, PAGES * PAGE_BYTES), st.just((1 << 64) - 1)))
    named = range(-(-start // PAGE_BYTES), (start + length) // PAGE_BYTES)
    expected = {page for gpa, page in pages.items() if gpa in named}
    found: set[int] = set()
    for offset, size in ram.ranges(start, length):
        assert size > 0
        assert offset + size <= ram.ram_bytes
        whole = range(-(-offset // PAGE_BYTES), (offset + size) // PAGE_BYTES)
        assert found.isdisjoint(whole)
        found.update(whole)
    assert found == expected


@given(
    maps(),
    st.integers(0, PAGES),
    st.sampled_from(BASES),
    st.binary(min_size=1, max_size=120),
    st.integers(0, 7),
)
def test_bitmaps_mark_the_pages_that_they_name_and_no_others(
    made: tuple[RamMap, dict[int, int]], start: int, base: int, bits: bytes, short: int
) -> None:
    ram, pages = made
    count = len(bits) * 8 - short
    named = int.from_bytes(bits, "little") & (1 << count) - 1
    bits = named.to_bytes(len(bits), "little")
    expected = {
        pages[base + start + at]
        for at in range(count)
        if named >> at & 1 and base + start + at in pages
    }  # fmt: skip
    found: set[int] = set()
    for offset, size, piece in ram.bitmaps((base + start) * PAGE_BYTES, count, bits):
        assert offset % (64 * PAGE_BYTES) == 0
        assert offset + size * PAGE_BYTES <= ram.ram_bytes
        frame = hints.Bitmap(1, offset, size, piece)
        assert HintDecoder().feed(hints.encode(frame)) == [frame]  # it is one that the daemon takes
        value = int.from_bytes(piece, "little")
        marked = {offset // PAGE_BYTES + at for at in range(size) if value >> at & 1}
        assert found.isdisjoint(marked)
        found |= marked
    assert found == expected


@pytest.mark.parametrize("noise", [b"\x00", b"\xff", None], ids=["none", "all", "noise"])
def test_the_largest_bitmap_still_fits_frames_when_it_is_moved(noise: bytes | None) -> None:
    """A frame of as many pages as one may have, onto pages that do not begin at a multiple of 64."""
    pages = hints.MAX_BITMAP_PAGES
    bits = noise * (pages // 8) if noise is not None else bytes(range(1, 252)) * (pages // 8 // 251 + 1)
    bits = bits[: pages // 8]
    size = pages * PAGE_BYTES
    ram = RamMap([Segment(4 * GIB, size, 5 * PAGE_BYTES)], 2 * size)
    marked = 0
    for offset, count, piece in ram.bitmaps(4 * GIB, pages, bits):
        frame = hints.Bitmap(1, offset, count, piece)
        assert HintDecoder().feed(hints.encode(frame)) == [frame]
        marked |= int.from_bytes(piece, "little") << offset // PAGE_BYTES
    assert marked == int.from_bytes(bits, "little") << 5
