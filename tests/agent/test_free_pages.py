"""Where RAM is, what its page flags say, and an answer as migd's decoder and receiver understand it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest

from migd.guest import agent
from migd.guest.agent import PageFlags, Run, answer, system_ram, windows
from migd.guest.hints import Bitmap, End, HintDecoder, Ranges
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES

BUDDY = 1 << 10
WINDOW = 1 << 9
"""Pages of a window in these tests: smaller than the agent's, so that there are many."""

PC = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
0009fc00-0009ffff : Reserved
000a0000-000bffff : PCI Bus 0000:00
000c0000-000c99ff : Video ROM
000f0000-000fffff : Reserved
  000f0000-000fffff : System ROM
00100000-bffdafff : System RAM
  01000000-01e00e70 : Kernel code
  02000000-0278dfff : Kernel rodata
  02800000-02bb68ff : Kernel data
  03000000-035fffff : Kernel bss
  2f000000-36ffffff : Crash kernel
bffdb000-bfffffff : Reserved
c0000000-febfffff : PCI Bus 0000:00
  fd000000-fdffffff : 0000:00:02.0
100000000-23fffffff : System RAM
"""
TABLE: list[tuple[str, str, list[Run]]] = [
    ("a pc with a hole", PC, [Run(0x1, 0x9F), Run(0x100, 0xBFFDB), Run(0x100000, 0x240000)]),
    ("without root", "".join("00000000-00000000 : System RAM\n" for _ in range(3)), []),
    ("one page", "00001000-00001fff : System RAM", [Run(1, 2)]),
    ("less than a page", "00001001-00002ffe : System RAM", []),
    ("rounded inwards", "00000001-00003ffe : System RAM", [Run(1, 3)]),
    (
        "nested, as virtio-mem has it",
        "100000000-1ffffffff : virtio0\n  100000000-107ffffff : System RAM\n",
        [],
    ),
    ("another kind", "100000000-1ffffffff : System RAM (virtio_mem)\n", []),
    ("not in order", "5000-5fff : System RAM\n1000-1fff : System RAM\n", [Run(1, 2), Run(5, 6)]),
    ("nothing", "", []),
]


@pytest.mark.parametrize(("name", "iomem", "ram"), TABLE, ids=[name for name, _, _ in TABLE])
def test_system_ram(name: str, iomem: str, ram: list[Run]) -> None:
    assert system_ram(iomem, 4096) == ram


def test_windows_cover_ram_once_and_fit_into_the_buffer() -> None:
    ram = [Run(1, 0x9F), Run(0x100, 5 * WINDOW), Run(6 * WINDOW - 1, 6 * WINDOW + 1)]
    pieces = list(windows(ram, WINDOW))
    assert [page for first, stop in pieces for page in range(first, stop)] == [
        page for first, stop in ram for page in range(first, stop)
    ]
    assert all(first // WINDOW == (stop - 1) // WINDOW for first, stop in pieces)


# -- flags ------------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    """Page flags in a file, and the agent's reader of them."""

    path: Path
    reader: PageFlags

    def change(self, page: int, flags: list[int]) -> None:
        with self.path.open("r+b") as file:
            file.seek(8 * page)
            file.write(struct.pack(f"<{len(flags)}Q", *flags))


@pytest.fixture
def flags_file(tmp_path: Path) -> Iterator[Callable[[list[int]], Flags]]:
    """Flags of as many pages as are given; any number of such files."""
    with ExitStack() as files:

        def made(flags: list[int]) -> Flags:
            path = tmp_path / f"flags-{len(list(tmp_path.iterdir()))}"
            path.write_bytes(struct.pack(f"<{len(flags)}Q", *flags))
            return Flags(path, files.enter_context(closing(PageFlags(str(path), WINDOW))))

        yield made


FlagsFile = Callable[[list[int]], Flags]


def understood(frames: list[bytes], pages: int) -> tuple[set[int], int]:
    """The pages of an answer and the number that END tells; the receiver would refuse none of it."""
    decoder = HintDecoder()
    found = [frame for data in frames for frame in decoder.feed(data)]
    assert (decoder.garbage_bytes, decoder.rejected_frames) == (0, 0)
    free: set[int] = set()
    for frame in found[:-1]:
        assert isinstance(frame, (Bitmap, Ranges))
        assert frame.epoch == 9
        if isinstance(frame, Bitmap):
            first, rest = divmod(frame.start, PAGE_BYTES)
            assert (rest, first % 64) == (0, 0)
            assert first + frame.pages <= pages
            more = set(PageBitmap.from_bytes(frame.bits, pages, first).indices().tolist())
        else:
            assert all(start % PAGE_BYTES == 0 and size % PAGE_BYTES == 0 for start, size in frame.ranges)
            more = {
                page
                for start, size in frame.ranges
                for page in range(start // PAGE_BYTES, (start + size) // PAGE_BYTES)
            }
        assert free.isdisjoint(more)
        free |= more
    end = found[-1]
    assert isinstance(end, End)
    return free, end.pages


@pytest.mark.parametrize("seed", range(40))
def test_an_answer_equals_a_slow_reference(flags_file: FlagsFile, seed: int) -> None:
    """Random flags in random RAM: the bit of the free list counts, the other 63 do not."""
    chance = random.Random(seed)
    pages = chance.randrange(1, 6 * WINDOW)
    share = chance.choice([0.0, 0.001, 0.03, 0.5, 0.97, 1.0])
    run = chance.choice([1, 1, 7, 64])  # neighbours are often free together
    flags = [
        (chance.getrandbits(64) & ~BUDDY) | (BUDDY if free else 0)
        for free in [chance.random() < share for _ in range(0, pages, run)]
        for _ in range(run)
    ][:pages]
    edges = sorted(chance.sample(range(pages + 1), min(pages + 1, 6)))
    ram = [Run(first, stop) for first, stop in zip(edges[::2], edges[1::2], strict=False)]
    expected = {page for first, stop in ram for page in range(first, stop) if flags[page] & BUDDY}
    free, said = understood(list(answer(9, ram, flags_file(flags).reader)), pages)
    assert free == expected
    assert said == len(expected)


@pytest.mark.parametrize(
    ("free", "kind"),
    [
        (range(WINDOW), Ranges),
        (range(3, WINDOW - 2), Ranges),
        ([3, 100], Ranges),
        (range(0, WINDOW, 2), Bitmap),
        ([page for page in range(WINDOW) if page % 7], Bitmap),
    ],
)
def test_a_window_is_told_in_the_smaller_way(flags_file: FlagsFile, free: list[int], kind: type) -> None:
    flags = flags_file([BUDDY * (page in free) for page in range(WINDOW)])
    frames = list(answer(9, [Run(0, WINDOW)], flags.reader))
    assert isinstance(HintDecoder().feed(frames[0])[0], kind)
    assert understood(frames, WINDOW) == (set(free), len(free))


def test_a_window_without_free_pages_costs_no_byte(flags_file: FlagsFile) -> None:
    """But it is a step of its own, so that the host is heard between two of them."""
    flags = flags_file([0] * 3 * WINDOW)
    assert [len(frame) for frame in answer(9, [Run(0, 3 * WINDOW)], flags.reader)] == [0, 0, 0, 36]


def test_pages_beyond_the_last_flags_are_not_free(flags_file: FlagsFile) -> None:
    """RAM that the kernel does not use, or that went: nothing of an earlier window is left in the buffer."""
    flags = flags_file([BUDDY] * (WINDOW + 5))
    assert understood(list(answer(9, [Run(0, 3 * WINDOW)], flags.reader)), 3 * WINDOW)[0] == set(
        range(WINDOW + 5)
    )


def test_only_what_is_free_at_both_looks_counts(flags_file: FlagsFile) -> None:
    chance = random.Random(3)
    looks = [[BUDDY * chance.randrange(2) for _ in range(WINDOW)] for _ in range(2)]
    expected = {page for page in range(WINDOW) if looks[0][page] and looks[1][page]}
    flags = flags_file(looks[0])

    class Changing(PageFlags):
        """The kernel's flags change between two looks."""

        def _look(self, window: Run) -> bytes:
            found = super()._look(window)
            flags.change(0, looks[1])
            return found

    with closing(Changing(str(flags.path), WINDOW)) as reader:
        assert understood(list(answer(9, [Run(0, WINDOW)], reader)), WINDOW)[0] == expected


def test_pages_are_looked_at_when_they_are_asked_for_and_not_before(flags_file: FlagsFile) -> None:
    """R5: the request was read by then. What changes during an answer is seen by its later frames."""
    flags = flags_file([0] * 2 * WINDOW)
    frames = answer(9, [Run(0, 2 * WINDOW)], flags.reader)
    flags.change(0, [BUDDY] * WINDOW)
    first = next(frames)
    flags.change(WINDOW, [BUDDY])
    assert understood([first, *frames], 2 * WINDOW)[0] == set(range(WINDOW + 1))


def test_a_bitmap_of_the_agent_s_own_window_is_small() -> None:
    """The worst of them still goes through a virtio-serial port in one piece (32 KiB)."""
    chance = random.Random(1)
    digits = bytes(chance.choice(b"01") for _ in range(agent.WINDOW_PAGES))
    window = Run(agent.WINDOW_PAGES, 2 * agent.WINDOW_PAGES)
    frame = agent._window_frame(9, window, digits)
    assert len(frame) < 28 + 12 + agent.WINDOW_PAGES // 8 + 64
    decoded = HintDecoder().feed(frame)[0]
    assert isinstance(decoded, Bitmap)
    assert int.from_bytes(decoded.bits, "little") == int(digits, 2)
