"""Every fault that migd is to survive has tests, and those exist."""

from __future__ import annotations

import ast

import pytest

from tests.kills.faults import COVERED, MISSING, markdown
from tests.support.pair import ROOT


@pytest.mark.parametrize("test", sorted({test for tests in COVERED.values() for test in tests}))
def test_a_test_that_is_named_exists(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    functions = [found for found in tree.body if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert name in [found.name for found in functions]


def test_no_fault_is_both_covered_and_missing() -> None:
    assert all(COVERED.values())
    assert not COVERED.keys() & MISSING.keys()
    assert len(markdown().splitlines()) == 2 + len(COVERED) + len(MISSING)
