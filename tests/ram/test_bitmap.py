"""PageBitmap against Python's sets: every method, windows at odd places, pages that fill no word."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migd.ram import bitmap as bitmap_module
from migd.ram.bitmap import PageBitmap, expand_runs, runs_of

EXAMPLES = settings(max_examples=50, deadline=None)
SIZES = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200, 640, 1000])


@st.composite
def bitmaps(draw: st.DrawFn, pages: int) -> tuple[PageBitmap, set[int]]:
    """A bitmap and the same as a set; its window begins and ends anywhere, and may be wider than needed."""
    low = draw(st.integers(0, pages - 1))
    high = draw(st.integers(low, pages - 1))
    wide = draw(st.sets(st.integers(low, high), max_size=80))
    for start, length in draw(st.lists(st.tuples(st.integers(low, high), st.integers(1, 130)), max_size=3)):
        wide |= set(range(start, min(start + length, high + 1)))
    kept = {page for page in wide if page % draw(st.integers(1, 4)) == 0} if draw(st.booleans()) else wide
    result = PageBitmap.of(pages, sorted(wide))
    result -= PageBitmap.of(pages, sorted(wide - kept))  # leaves empty words within the window
    return result, kept


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, PageBitmap, set[int], PageBitmap, set[int]]:
    pages = draw(SIZES)
    a, set_a = draw(bitmaps(pages))
    b, set_b = draw(bitmaps(pages))
    return pages, a, set_a, b, set_b


@st.composite
def singles(draw: st.DrawFn) -> tuple[int, PageBitmap, set[int]]:
    pages = draw(SIZES)
    return pages, *draw(bitmaps(pages))


def content(bitmap: PageBitmap) -> set[int]:
    return set(bitmap.indices().tolist())


def words(bitmap: PageBitmap) -> int:
    return len(bitmap._words)


OPERATIONS: list[Callable[..., object]] = [operator.or_, operator.and_, operator.sub]
IN_PLACE: list[Callable[..., object]] = [operator.ior, operator.iand, operator.isub]


@pytest.mark.parametrize("operation", OPERATIONS)
@EXAMPLES
@given(case=pairs())
def test_algebra_is_that_of_sets_and_leaves_its_operands(operation, case) -> None:
    _, a, set_a, b, set_b = case
    result = operation(a, b)
    assert content(result) == operation(set_a, set_b)
    assert (content(a), content(b)) == (set_a, set_b)
    result |= PageBitmap.full(a.pages)  # shares no memory with either
    assert (content(a), content(b)) == (set_a, set_b)


@pytest.mark.parametrize("operation", IN_PLACE)
@EXAMPLES
@given(case=pairs())
def test_algebra_in_place_is_that_of_sets(operation, case) -> None:
    pages, a, set_a, b, set_b = case
    same_object = a
    a = operation(a, b)
    assert a is same_object
    assert content(a) == operation(set(set_a), set_b)
    assert content(b) == set_b
    a |= PageBitmap.full(pages)
    assert content(b) == set_b


@pytest.mark.parametrize("operation", OPERATIONS + IN_PLACE)
@EXAMPLES
@given(case=singles())
def test_algebra_with_itself(operation, case) -> None:
    _, a, set_a = case
    assert content(operation(a, a)) == operation(set(set_a), set_a)


@EXAMPLES
@given(case=pairs())
def test_isdisjoint_and_equality_are_those_of_sets_whatever_the_windows(case) -> None:
    pages, a, set_a, b, set_b = case
    assert a.isdisjoint(b) == set_a.isdisjoint(set_b)
    assert (a == b) == (set_a == set_b)
    wider = a | PageBitmap.full(pages)
    wider &= a | b
    wider -= b - a
    assert wider == a
    assert a == wider
    assert not a != wider  # noqa: SIM202  # both operators are meant


def test_equality_looks_at_the_bound_and_at_the_type() -> None:
    assert PageBitmap(64) != PageBitmap(65)
    assert PageBitmap(64) != "bitmap"
    with pytest.raises(TypeError):
        hash(PageBitmap(1))


@EXAMPLES
@given(case=singles(), limit=st.integers(-1, 1100), start=st.integers(0, 1100))
def test_lowest_indices_count_stop_contains(case, limit: int, start: int) -> None:
    pages, a, set_a = case
    expected = sorted(page for page in set_a if page >= start)[: max(0, limit)]
    assert sorted(content(a.lowest(limit, start))) == expected
    assert a.indices().tolist() == sorted(set_a)
    assert a.count() == len(set_a)
    assert bool(a) == bool(set_a)
    assert a.stop() == max(set_a, default=-1) + 1
    assert {page for page in range(-70, pages + 70) if page in a} == set_a
    assert repr(a) == f"<PageBitmap {len(set_a)} of {pages}>"


@EXAMPLES
@given(case=singles())
def test_runs_are_maximal_ascending_and_complete(case) -> None:
    pages, a, set_a = case
    runs = list(a.runs())
    assert {page for start, stop in runs for page in range(start, stop)} == set_a
    assert all(start < stop for start, stop in runs)
    assert all(left[1] < right[0] for left, right in pairwise(runs))
    assert PageBitmap.from_runs(pages, runs) == a
    at_once = PageBitmap(pages)
    at_once.add_runs(np.array(runs[::-1], np.int64).reshape(-1, 2))
    assert at_once == a
    assert runs == runs_of(a.indices())
    assert expand_runs(np.array(runs, np.int64).reshape(-1, 2)).tolist() == sorted(set_a)


@EXAMPLES
@given(case=singles(), more=st.data())
def test_add_run_is_a_union_and_widens_the_window(case, more) -> None:
    pages, a, set_a = case
    start = more.draw(st.integers(0, pages))
    stop = more.draw(st.integers(start, pages))
    a.add_run(start, stop)
    assert content(a) == set_a | set(range(start, stop))


@EXAMPLES
@given(case=singles())
def test_bytes_are_one_bit_per_page_least_significant_first(case) -> None:
    pages, a, set_a = case
    data = a.to_bytes()
    assert data == sum(1 << page for page in set_a).to_bytes(-(-pages // 8), "little")
    for kind in (bytes, bytearray, memoryview):
        assert PageBitmap.from_bytes(kind(data), pages) == a


@EXAMPLES
@given(pages=SIZES, word=st.integers(0, 16), data=st.binary(max_size=140))
def test_from_bytes_anywhere_drops_what_is_beyond_the_bound_and_refuses_more(pages, word, data) -> None:
    first = word * 64
    if len(data) > max(0, -(-(pages - first) // 8)):
        with pytest.raises(ValueError, match="exceed"):
            PageBitmap.from_bytes(data, pages, first)
    elif first < pages:
        expected = {
            first + bit
            for bit in range(len(data) * 8)
            if data[bit // 8] >> bit % 8 & 1 and first + bit < pages
        }
        made = PageBitmap.from_bytes(data, pages, first)
        assert content(made) == expected
        assert made.count() == len(expected)
        assert len(made.to_bytes()) == -(-pages // 8)


@EXAMPLES
@given(case=pairs())
def test_a_copy_is_independent(case) -> None:
    pages, a, set_a, b, _ = case
    copy = a.copy()
    copy |= b
    copy.add_run(0, pages)
    assert content(a) == set_a


@EXAMPLES
@given(pages=SIZES, indices=st.lists(st.integers(0, 999)))
def test_of_takes_any_order_duplicates_and_arrays(pages, indices) -> None:
    inside = [index for index in indices if index < pages]
    assert content(PageBitmap.of(pages, inside)) == set(inside)
    assert content(PageBitmap.of(pages, np.array(inside, np.int64))) == set(inside)
    assert content(PageBitmap.of(pages, np.array(inside, np.uint32))) == set(inside)


@pytest.mark.parametrize("pages", [0, 1, 64, 65])
def test_full_and_empty(pages: int) -> None:
    assert content(PageBitmap.full(pages)) == set(range(pages))
    assert list(PageBitmap.full(pages).runs()) == ([(0, pages)] if pages else [])
    assert not PageBitmap(pages)
    assert PageBitmap(pages).stop() == 0
    assert len(PageBitmap.full(pages).to_bytes()) == -(-pages // 8)


@pytest.mark.parametrize("bad", [(-1, 3), (5, 101), (7, 6), (101, 101)])
def test_a_run_outside_or_backwards_is_an_error_and_changes_nothing(bad: tuple[int, int]) -> None:
    bitmap = PageBitmap.of(100, [3])
    with pytest.raises(IndexError):
        bitmap.add_run(*bad)
    with pytest.raises(IndexError):
        PageBitmap.from_runs(100, [bad])
    assert content(bitmap) == {3}


@pytest.mark.parametrize("indices", [[-1], [100], [5, 100], [-64, 3], [1 << 40]])
def test_an_index_outside_is_an_error(indices: list[int]) -> None:
    with pytest.raises(IndexError, match="not inside"):
        PageBitmap.of(100, indices)
    with pytest.raises(IndexError):
        PageBitmap.of(100, np.array(indices))


def test_bitmaps_of_different_guests_do_not_combine() -> None:
    a, b = PageBitmap.full(64), PageBitmap.full(128)
    for operation in (*OPERATIONS, *IN_PLACE):
        with pytest.raises(ValueError, match="do not combine"):
            operation(a, b)
    with pytest.raises(ValueError, match="do not combine"):
        a.isdisjoint(b)


def test_negative_sizes_and_odd_beginnings_are_errors() -> None:
    with pytest.raises(ValueError, match="-1 pages"):
        PageBitmap(-1)
    for first in (-64, 1, 63):
        with pytest.raises(ValueError, match="multiple of 64"):
            PageBitmap.from_bytes(b"", 100, first)


def test_runs_and_lowest_across_the_scratch_boundary() -> None:
    """What is unpacked at a time is 262144 pages; a run may cross from one piece into the next."""
    piece = bitmap_module._SCRATCH_WORDS * 64
    pages = 3 * piece
    runs = [(5, 6), (piece - 70, piece + 70), (2 * piece - 1, 2 * piece), (2 * piece + 1, pages)]
    bitmap = PageBitmap.from_runs(pages, runs)
    assert list(bitmap.runs()) == runs
    expected = expand_runs(np.array(runs, np.int64).reshape(-1, 2))
    for limit, start in [(1, 0), (2, 0), (100, 6), (200, piece), (pages, 0), (3, 2 * piece - 1), (1, pages)]:
        wanted = expected[expected >= start][:limit]
        assert np.array_equal(bitmap.lowest(limit, start).indices(), wanted)


def test_a_batch_costs_a_few_words_whatever_the_size_of_the_ram() -> None:
    pages = 1 << 28  # 1 TiB
    batch = PageBitmap.from_runs(pages, [(pages - 300, pages - 44)])
    assert words(batch) <= 6
    assert words(batch.lowest(100, 0)) <= 3
    assert words(batch & PageBitmap.full(1 << 28)) <= 6


def test_a_set_that_grows_by_batches_is_not_copied_for_each() -> None:
    """Counts the words that ``|=`` copies to widen a window: linear in the RAM, in either direction."""
    pages, batch = 1 << 20, 256
    for order in (range(0, pages, batch), range(pages - batch, -1, -batch)):
        grown, copied = PageBitmap(pages), 0
        for start in order:
            before = grown._words
            grown |= PageBitmap.from_runs(pages, [(start, start + batch)])
            if grown._words is not before:
                copied += len(before)
        assert grown == PageBitmap.full(pages)
        assert words(grown) == pages // 64
        assert copied <= 2 * pages // 64


@EXAMPLES
@given(st.lists(st.integers(0, 500), unique=True).map(sorted))
def test_runs_of_and_expand_runs_are_inverse(indices: list[int]) -> None:
    runs = runs_of(np.array(indices, np.int64))
    assert expand_runs(np.array(runs, np.int64).reshape(-1, 2)).tolist() == indices
    assert all(start < stop for start, stop in runs)
    assert all(left[1] < right[0] for left, right in pairwise(runs))
