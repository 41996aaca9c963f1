"""A ledger as a value: what a call makes of it is worked out once, and remembered."""

from __future__ import annotations

from typing import Any, TypeAlias

from migd.errors import LedgerError
from migd.ledger.ledger import Ledger, Tally
from tests.support.int_pages import IntPages

Frozen: TypeAlias = tuple[Any, ...]
"""All attributes of a ledger but its counts: the sets packed into one int, then the rest."""
Call: TypeAlias = tuple[Any, ...]
"""A method of the ledger and its arguments, sets of pages as ints."""

_TAKES_NO_PAGES = frozenset({"arm", "pick", "pick_free"})


class LedgerValues:
    """Every ledger of one class and size that calls of its methods lead to."""

    sees_writes = True
    liar = False

    def __init__(self, ledger: type[Ledger[IntPages]], pages: int) -> None:
        self.ledger_class, self.pages = ledger, pages
        first = ledger(pages, IntPages)
        self._sets = [name for name, value in vars(first).items() if isinstance(value, IntPages)]
        fixed = {"pages", "_sets", "tally"}
        self._scalars = [name for name in vars(first) if name not in {*self._sets, *fixed}]
        self._epoch_at = 1 + self._scalars.index("_next_epoch")
        self._tables = {count: [IntPages(count, bits) for bits in range(1 << count)] for count in (1, pages)}
        self.calls: dict[tuple[Frozen, Call], tuple[Frozen, Any] | None] = {}
        """Every call so far, and what came of it: the ledger after it and a result, or None: it refused."""

    def thaw(self, frozen: Frozen, page: int | None = None) -> Ledger[IntPages]:
        """The ledger; with ``page`` as it would be if it had that one only."""
        pages, table = (self.pages, self._tables[self.pages]) if page is None else (1, self._tables[1])
        ledger = object.__new__(self.ledger_class)
        attributes, mask = vars(ledger), (1 << pages) - 1
        attributes.update(pages=pages, _sets=IntPages, tally=Tally())
        packed = frozen[0] >> (page or 0)
        for name in self._sets:
            attributes[name] = table[packed & mask]
            packed >>= self.pages
        attributes.update(zip(self._scalars, frozen[1:], strict=True))
        return ledger

    def freeze(self, ledger: Ledger[IntPages]) -> Frozen:
        attributes, packed = vars(ledger), 0
        for name in reversed(self._sets):
            packed = packed << self.pages | attributes[name].bits
        return (packed, *[attributes[name] for name in self._scalars])

    def call(self, frozen: Frozen, method: str, *arguments: Any) -> tuple[Frozen, Any] | None:
        """The ledger after a call and what the call returned, a set as an int; None if it refused."""
        key = (frozen, (method, *arguments))
        if key not in self.calls:
            self.calls[key] = self._call(*key)
        return self.calls[key]

    def _call(self, frozen: Frozen, call: Call) -> tuple[Frozen, Any] | None:
        ledger = self.thaw(frozen)
        try:
            result = self.apply(ledger, call)
        except LedgerError:
            return None
        return self.freeze(ledger), result

    def apply(self, ledger: Ledger[IntPages], call: Call, page: int | None = None) -> Any:
        """Call a ledger; with ``page``, one that has that page only. A set it returns is given as an int."""
        method, *arguments = call
        if arguments and method not in _TAKES_NO_PAGES:
            bits = arguments.pop()
            arguments.append(IntPages(self.pages, bits) if page is None else IntPages(1, bits >> page & 1))
        options = {"arm": {"sees_writes": self.sees_writes}, "settle": {"trim": not self.liar}}
        result = getattr(ledger, method)(*arguments, **options.get(method, {}))
        return result.bits if isinstance(result, IntPages) else result
