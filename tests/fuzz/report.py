"""What a run found: a table for people, one flat JSON object for docs/proof.md."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table

from tests.fuzz.campaign import Tally

_MIB = 1 << 20
GROWTH_BYTES = 48 << 20
"""Memory of a process is flat if it has grown by no more from the first quarter of its chunks to the last."""


@dataclass
class Report:
    """Of all targets."""

    seed: int
    processes: int
    seconds: float = 0.0
    """Of the wall clock."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    rss_bytes: list[list[int]] = field(default_factory=list)
    """What each process occupied after each of its chunks."""

    @property
    def grown_bytes(self) -> int:
        """The most that any process has grown by, once it had seen all targets."""
        grown = [
            max(each[-len(each) // 4 :]) - max(each[: len(each) // 4])
            for each in self.rss_bytes
            if len(each) > 7
        ]
        return max(grown, default=0)

    @property
    def wrong(self) -> list[str]:
        """A line for each thing that is wrong, but for findings, which have lines of their own."""
        if self.grown_bytes > GROWTH_BYTES:
            return [f"a process has grown by {self.grown_bytes >> 20} MiB"]
        return []

    @property
    def total(self) -> Tally:
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        return total

    def figures(self) -> dict[str, int | float]:
        """Flat, in plain numbers; seconds of a target are of processor time."""
        total = self.total
        found: dict[str, int | float] = {
            "seed": self.seed,
            "processes": self.processes,
            "seconds": round(self.seconds, 1),
            "inputs": total.inputs,
            "accepted_unchanged": total.unchanged,
            "accepted_changed": total.changed,
            "refused": total.refused.total(),
            "behind_first_check": total.behind,
            "findings": len(total.findings),
            "slowest_input_s": round(total.slowest_s, 3),
            "peak_allocation_bytes": total.peak_bytes,
            "grown_bytes": self.grown_bytes,
        }
        for name, tally in self.tallies.items():
            key = name.replace("-", "_")
            found[f"{key}_inputs"] = tally.inputs
            found[f"{key}_inputs_per_s"] = round(tally.inputs / tally.seconds) if tally.seconds else 0
            found[f"{key}_accepted_changed"] = tally.changed
            found[f"{key}_behind_first_check"] = tally.behind
            found[f"{key}_findings"] = len(tally.findings)
        return found

    def table(self) -> Table:
        """One row a target."""
        table = Table(box=None, pad_edge=False, header_style="")
        for name in ("target", "inputs", "per s", "unchanged", "changed", "behind", "deepest", "findings"):
            table.add_column(name, justify="left" if name == "target" else "right", no_wrap=True)
        for name, tally in self.tallies.items():
            table.add_row(
                name,
                str(tally.inputs),
                f"{tally.inputs / tally.seconds:.0f}" if tally.seconds else "-",
                str(tally.unchanged),
                str(tally.changed),
                str(tally.behind),
                str(max(tally.depths, default=0)),
                str(len(tally.findings)),
            )
        return table

    def refusals(self) -> str:
        """One line a target: by what its inputs were refused."""
        return "\n".join(
            f"{name}: {', '.join(f'{what} {count}' for what, count in tally.refused.most_common())}"
            for name, tally in self.tallies.items()
        )

    def summary(self) -> str:
        """The last lines of a run."""
        total = self.total
        accepted = f"{total.changed} were accepted as something else, {total.unchanged} as recorded"
        return (
            f"{total.inputs} inputs in {self.seconds:.0f} s, {self.processes} processes, seed {self.seed}: "
            f"{total.behind} came behind the first check, {accepted}, {total.refused.total()} were refused, "
            f"{len(total.findings)} findings\n"
            f"the slowest input took {total.slowest_s:.2f} s, the most that one allocated was "
            f"{total.peak_bytes / _MIB:.1f} MiB, processes grew by {self.grown_bytes / _MIB:.1f} MiB"
        )
