"""The table of mutants for docs/proof.md, each with the shortest way to what it loses: a page, or a guest."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from tests.proof.mutant import Mutant
from tests.support import markdown

HEAD = ("", "bug", "wrong version", "test that it fails", "steps", "shortest trace")


def table(mutants: Iterable[Mutant]) -> str:
    """Markdown, a row for each mutant. RuntimeError if one survives."""
    return markdown.table(HEAD, map(_row, mutants))


@cache  # a search each
def _row(mutant: Mutant) -> tuple[str, ...]:
    death = mutant.kill()
    if not death.trace:
        raise RuntimeError(f"{mutant.number} {mutant.name} survives")
    test = mutant.test.rpartition("::")[2].partition("[")[0]
    trace = "; ".join(death.trace)
    cells = (
        mutant.number,
        mutant.bug,
        f"`{mutant.name}`",
        f"`{test}`",
        str(len(death.trace)),
        f"{trace}: {death.reason}",
    )
    return tuple(map(markdown.cell, cells))
