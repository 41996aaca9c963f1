"""The comparison of two RAM images: what it takes for the same, for left behind, and for wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.ram_comparison import PAGE_BYTES, Comparison, compare

_PAGES = 3000
"""More than a chunk, and no whole number of them."""


@contextmanager
def _images(*contents: dict[int, bytes], pages: int = _PAGES) -> Iterator[list[int]]:
    """A sparse file for each, with this content in these pages."""
    fds = [os.memfd_create("image") for _ in contents]
    try:
        for fd, content in zip(fds, contents, strict=True):
            os.truncate(fd, pages * PAGE_BYTES)
            for page, data in content.items():
                os.pwrite(fd, data, page * PAGE_BYTES)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _compared(source: dict[int, bytes], destination: dict[int, bytes]) -> Comparison:
    with _images(source, destination) as fds:
        return compare(*fds)


_A, _B, _ZERO = b"A" * PAGE_BYTES, b"B" * PAGE_BYTES, bytes(PAGE_BYTES)


def test_equal_pages_are_neither_left_behind_nor_wrong() -> None:
    some = {0: _A, 1: _B, 1500: _A, _PAGES - 1: _B}
    found = _compared(some, some)
    assert (found.pages, found.left_behind, found.wrong) == (_PAGES, [], [])
    assert found.looked_at == _PAGES


def test_a_hole_is_a_zero_page_on_either_side() -> None:
    found = _compared({5: _ZERO}, {2500: _ZERO})
    assert (found.left_behind, found.wrong) == ([], [])


def test_what_is_zero_at_the_destination_only_was_left_behind() -> None:
    found = _compared({7: _A, 8: _A, _PAGES - 1: _B}, {8: _ZERO})
    assert (found.left_behind, found.wrong) == ([7, 8, _PAGES - 1], [])


@pytest.mark.parametrize(("here", "there"), [(_A, _B), (_ZERO, _B), (b"", _B), (_A, _A[:-1] + b"B")])
def test_whatever_else_differs_is_wrong(here: bytes, there: bytes) -> None:
    found = _compared({2000: here} if here else {}, {2000: there})
    assert (found.left_behind, found.wrong) == ([], [2000])


def test_images_of_two_sizes_are_no_images_of_one_guest() -> None:
    with _images({}) as (here,), _images({}, pages=_PAGES + 1) as (there,), pytest.raises(AssertionError):
        compare(here, there)
