"""IntPages is what PageBitmap is: the model check is worth as much as this equality."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migd.ram.bitmap import PageBitmap
from tests.support.int_pages import IntPages

PAGES = 150
INDICES = st.sets(st.integers(0, PAGES - 1))


def both(indices: set[int]) -> tuple[IntPages, PageBitmap]:
    return IntPages.of(PAGES, indices), PageBitmap.of(PAGES, sorted(indices))


def same(mine: IntPages, theirs: PageBitmap) -> bool:
    return list(mine) == theirs.indices().tolist() and mine.pages == theirs.pages


@pytest.mark.parametrize("name", ["or_", "and_", "sub", "ior", "iand", "isub"])
@settings(max_examples=40, deadline=None)
@given(a=INDICES, b=INDICES)
def test_algebra_agrees(name: str, a: set[int], b: set[int]) -> None:
    (int_a, bitmap_a), (int_b, bitmap_b) = both(a), both(b)
    operation = getattr(operator, name)
    assert same(operation(int_a, int_b), operation(bitmap_a, bitmap_b))
    assert int_a.isdisjoint(int_b) == PageBitmap.of(PAGES, sorted(a)).isdisjoint(bitmap_b)


@settings(max_examples=40, deadline=None)
@given(a=INDICES, limit=st.integers(0, PAGES + 1), start=st.integers(0, PAGES))
def test_questions_agree(a: set[int], limit: int, start: int) -> None:
    mine, theirs = both(a)
    assert same(mine.copy(), theirs.copy())
    assert same(mine.lowest(limit, start), theirs.lowest(limit, start))
    assert (mine.count(), mine.stop(), bool(mine)) == (theirs.count(), theirs.stop(), bool(theirs))
    assert all((page in mine) == (page in theirs) for page in range(-2, PAGES + 2))


def test_the_two_sets_an_attempt_begins_with_agree() -> None:
    assert same(IntPages.full(PAGES), PageBitmap.full(PAGES))
    assert same(IntPages(PAGES), PageBitmap(PAGES))


@settings(max_examples=40, deadline=None)
@given(a=INDICES, b=INDICES)
def test_a_value_never_changes_and_equal_values_hash_alike(a: set[int], b: set[int]) -> None:
    left, right = IntPages.of(PAGES, a), IntPages.of(PAGES, b)
    kept = left
    left |= right
    left -= IntPages.of(PAGES, {0})
    assert set(kept) == a
    assert hash(left) == hash(IntPages.of(PAGES, (a | b) - {0}))
    assert (IntPages.of(PAGES, a) == right) == (a == b)
