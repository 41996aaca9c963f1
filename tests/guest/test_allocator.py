"""The page allocator against plain sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migd.guest.allocator import MAX_RUN_PAGES, PageAllocator, count_runs, runs_in

steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, MAX_RUN_PAGES), st.integers(0, 400)),
        st.tuples(st.just("next"), st.integers(1, MAX_RUN_PAGES), st.integers(0, 400)),
        st.tuples(st.just("free"), st.integers(0, 50), st.integers(0, 50)),
    ),
    max_size=60,
)


def agrees(allocator: PageAllocator, owned: set[int]) -> None:
    pages = allocator.pages
    assert allocator.owned_pages == len(owned)
    assert allocator.free_pages == pages - len(owned)
    assert [page for run in allocator.owned_runs() for page in range(*run)] == sorted(owned)
    free = [page for run in runs_in(allocator.free_bits()) for page in range(*run)]
    assert free == sorted(set(range(pages)) - owned)
    bits = allocator.free_bits()
    assert len(bits) == -(-pages // 8)
    assert [page for page in range(len(bits) * 8) if bits[page // 8] >> page % 8 & 1] == free
    assert count_runs(bits) == len(list(runs_in(bits)))


@settings(deadline=None, max_examples=60)
@given(pages=st.integers(1, 300), steps=steps)
def test_it_is_a_set_of_free_pages(pages: int, steps: list[tuple[str, int, int]]) -> None:
    allocator, owned, runs = PageAllocator(pages), set[int](), list[tuple[int, int]]()
    for step, first, second in steps:
        if step == "allocate":
            start = allocator.allocate(first, second)
            fits = [at for at in range(pages - first + 1) if owned.isdisjoint(range(at, at + first))]
            behind = [at for at in fits if at >= second % pages]
            assert start == (behind[0] if behind else fits[0] if fits else None)
            if start is not None:
                owned |= set(range(start, start + first))
                runs.append((start, start + first))
        elif step == "next":
            run = allocator.allocate_next(first, second)
            free = [page for page in range(second, pages) if page not in owned]
            assert (run[0] if run else None) == (free[0] if free else None)
            if run is not None:
                start, stop = run
                assert owned.isdisjoint(range(start, stop))
                assert stop - start == first or stop == pages or stop in owned
                owned |= set(range(start, stop))
                runs.append(run)
        elif runs:
            start, stop = runs.pop(first % len(runs))
            allocator.free(start, stop)
            owned -= set(range(start, stop))
        agrees(allocator, owned)


def test_a_run_across_the_windows_of_the_search_is_found() -> None:
    allocator = PageAllocator(3 * 4096)
    for at in range(0, allocator.pages, 4):
        allocator.claim(at, at + 4)
    allocator.free(4096 - 32, 4096)
    allocator.free(4096, 4096 + 32)
    assert allocator.allocate(65 - 1, 0) == 4096 - 32
    assert allocator.allocate(1, 5) is None


@pytest.mark.parametrize("run", [(0, 0), (5, 4), (-1, 3), (96, 101), (10, 12)])
def test_an_impossible_claim_or_free_changes_nothing(run: tuple[int, int]) -> None:
    allocator = PageAllocator(100)
    allocator.claim(11, 20)
    before = allocator.free_bits()
    with pytest.raises(ValueError, match="pages"):
        allocator.claim(*run)
    with pytest.raises(ValueError, match="pages"):
        allocator.free(*run)
    assert allocator.free_bits() == before
    assert allocator.owned_pages == 9


@pytest.mark.parametrize("length", [0, 65, -1])
def test_a_run_has_1_to_64_pages(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        PageAllocator(100).allocate(length, 0)


def test_runs_join_across_the_parts_of_a_scan() -> None:
    bits = bytes(8190) + b"\xff" * 4 + bytes(100) + b"\x01"
    assert list(runs_in(bits)) == [(8190 * 8, 8194 * 8), (8294 * 8, 8294 * 8 + 1)]
