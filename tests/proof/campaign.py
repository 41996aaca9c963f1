"""Campaign: the runs whose figures docs/proof.md publishes, what they must have found, and how it is said.

``scripts/proof`` makes the runs and keeps what they wrote in docs/proof.json; the document is made from that,
and a test holds the kept figures against the demands below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.support import markdown

RECORD = Path(__file__).parents[2] / "docs" / "proof.json"

Figures = dict[str, Any]
"""What a script wrote with ``--json``."""


@dataclass(frozen=True)
class Claim:
    """One line of the document."""

    name: str
    script: str
    arguments: tuple[str, ...]
    least: dict[str, int]
    """Figures that must be at least this."""
    zero: tuple[str, ...]
    """Figures that must be 0, or empty."""
    says: str
    """With the names of figures."""

    @property
    def command(self) -> str:
        return " ".join((f"scripts/{self.script}", *self.arguments))

    def unmet(self, figures: Figures) -> list[str]:
        """What a run has not done or should not have found."""
        too_few = [
            f"{name}: {figures[name]}, not {least}"
            for name, least in self.least.items()
            if figures[name] < least
        ]
        return too_few + [f"{name}: {figures[name]}" for name in self.zero if figures[name]]


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What docs/proof.json has of one run."""

    command: str
    figures: Figures


_LEDGER = (
    "{states:,} states and {transitions:,} steps in {searches} worlds, {complete} of them completely; "
    "{mutants_killed} of {mutants} wrong versions lose a page, the right one none"
)
_HAND_OVER = (
    "{states:,} states and {transitions:,} steps, up to {depth} deep, all there are: never two guests, never "
    "none"
)
_SIMULATION = (
    "{migrations:,} migrations of {seeds:,} seeds from {first_seed} on; {starts:,} guests were started, "
    "{compared_pages:,} pages compared: {wrong_pages} wrong, {two_guests} times two guests"
)
_SOAK = (
    "{completed:,} live migrations in {attempts:,} attempts, seed {seed}; {owned_pages:,} pages in use and "
    "{free_pages:,} free ones compared: {wrong_pages} wrong, {rescued_pages} rescued. With 95 % confidence "
    "at most {failure_bound_95:.2%} of migrations go wrong"
)
_KILLS = (
    "{kills:,} guests hit by kills and {interruptions:,} by interruptions, in every phase; "
    "{random_migrations:,} by {random_kills:,} kills at random moments, seed {seed}: {survived:,} survived, "
    "{split_brains} split brains, {unknown} unknown, as documented; {pages_checked:,} pages checked, "
    "{wrong_pages} wrong"
)
_FUZZ = (
    "{inputs:,} inputs, seed {seed}; {behind_first_check:,} came behind the first check, {refused:,} were "
    "refused, {findings} findings. The slowest took {slowest_input_s:.2f} s, the most that one allocated was "
    "{peak_allocation_bytes:,} bytes"
)

CAMPAIGN = (
    Claim(
        "the ledger, every order of events",
        "model",
        ("--deeper",),
        {"states": 1_000_000},
        ("wrong",),
        _LEDGER,
    ),
    Claim(
        "the hand-over: two crashes a side, two cuts",
        "handover",
        (),
        {"crashes": 2, "cuts": 2, "complete": 1},
        ("wrong",),
        _HAND_OVER + "; {mutants_killed} of {mutants} wrong versions fail",
    ),
    Claim(
        "the same with a killed guest and an operator",
        "handover",
        ("--crashes", "1", "--kills", "1", "--words", "1", "--no-mutants"),
        {"kills": 1, "words": 1, "complete": 1},
        ("wrong",),
        _HAND_OVER,
    ),
    Claim(
        "both daemons, simulated",
        "simulate",
        ("--from", "1", "--seeds", "10000"),
        {"migrations": 20_000},
        ("wrong_pages", "two_guests", "failed_seeds"),
        _SIMULATION,
    ),
    Claim(
        "both daemons, real guests",
        "soak",
        ("--runs", "1050", "--seed", "2026"),
        {"completed": 1_000},
        ("wrong_pages", "rescued_pages", "late_dirty_pages", "problems", "failed_runs"),
        _SOAK,
    ),
    Claim(
        "kill -9",
        "kills",
        ("--rounds", "1", "--random", "120", "--seed", "2026"),
        {"kills": 100, "random_migrations": 100},
        ("split_brains", "wrong_pages", "faults"),
        _KILLS,
    ),
    Claim(
        "every parser, mutated recordings",
        "fuzz",
        ("--inputs", "1000000", "--seed", "2026"),
        {"inputs": 1_000_000},
        ("findings",),
        _FUZZ,
    ),
)


def kept() -> dict[str, Kept]:
    """By the names of claims; empty before the first ``scripts/proof``."""
    return msgspec.json.decode(RECORD.read_bytes(), type=dict[str, Kept]) if RECORD.exists() else {}


def keep(runs: dict[str, Kept]) -> None:
    """In the order of the campaign."""
    order = {claim.name: runs[claim.name] for claim in CAMPAIGN if claim.name in runs}
    RECORD.write_bytes(msgspec.json.format(msgspec.json.encode(order)) + b"\n")


def table() -> str:
    """Markdown of what was run and found."""
    runs = kept()
    rows = [
        (claim.name, f"`{claim.command}`", claim.says.format_map(runs[claim.name].figures))
        for claim in CAMPAIGN
        if claim.name in runs
    ]
    return markdown.table(("what", "run by", "found"), rows)
