"""IntPages: a PageSet over one small Python int, for the model check of the ledger.

A value never changes: ``|=`` and its kin return a new set and Python rebinds the name. So a copy of the
ledger's attributes is a snapshot of the ledger, and ``bits`` is its hash. What this hides - two attributes
of a ledger sharing one *mutable* bitmap - is looked for in tests/ledger/test_ledger.py, where two ledgers,
one over each kind of set, take the same random steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class IntPages:
    """A set of page indices below ``pages``: bit p of ``bits`` is page p."""

    __slots__ = ("bits", "pages")

    def __init__(self, pages: int, bits: int = 0) -> None:
        self.pages = pages
        self.bits = bits

    @classmethod
    def full(cls, pages: int) -> IntPages:
        return cls(pages, (1 << pages) - 1)

    @classmethod
    def of(cls, pages: int, indices: Iterable[int]) -> IntPages:
        bits = 0
        for index in indices:
            if not 0 <= index < pages:
                raise IndexError(index)
            bits |= 1 << index
        return cls(pages, bits)

    def copy(self) -> IntPages:
        return self

    def count(self) -> int:
        return self.bits.bit_count()

    def __bool__(self) -> bool:
        return self.bits != 0

    def __iter__(self) -> Iterator[int]:
        return (page for page in range(self.pages) if self.bits >> page & 1)

    def __contains__(self, page: int) -> bool:
        return page >= 0 and bool(self.bits >> page & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntPages):
            return NotImplemented
        return (self.pages, self.bits) == (other.pages, other.bits)

    def __hash__(self) -> int:
        return hash((self.pages, self.bits))

    def __repr__(self) -> str:
        return f"{{{', '.join(map(str, self))}}}"

    def __or__(self, other: IntPages) -> IntPages:
        return IntPages(self.pages, self.bits | other.bits)

    def __and__(self, other: IntPages) -> IntPages:
        return IntPages(self.pages, self.bits & other.bits)

    def __sub__(self, other: IntPages) -> IntPages:
        return IntPages(self.pages, self.bits & ~other.bits)

    __ior__ = __or__
    __iand__ = __and__
    __isub__ = __sub__

    def isdisjoint(self, other: IntPages) -> bool:
        return not self.bits & other.bits

    def lowest(self, limit: int, start: int = 0) -> IntPages:
        left, picked = self.bits >> start << start, 0
        while left and limit > 0:
            picked |= left & -left
            left &= left - 1
            limit -= 1
        return IntPages(self.pages, picked)

    def stop(self) -> int:
        return self.bits.bit_length()
