"""`scripts/proof`, which is `python -m tests.proof`: make the runs that docs/proof.md publishes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec

from tests import test_docs
from tests.proof.campaign import CAMPAIGN, RECORD, Claim, Figures, Kept, keep, kept
from tests.support import program

_SCRIPTS = RECORD.parents[1] / "scripts"


@click.command(context_settings=program.CONTEXT)
@click.option(
    "--only", "scripts", multiple=True, type=click.Choice(sorted({claim.script for claim in CAMPAIGN})),
    help="Only the runs of this script; may be given several times.",
)  # fmt: skip
def main(scripts: tuple[str, ...]) -> None:
    """Search, simulate, soak, kill and fuzz as far as docs/proof.md says, and write down what was found.

    Takes most of an hour on two cores. Each run's figures are kept in docs/proof.json when it has ended, and
    the document is made from those: look at the difference before it is committed.

    Exit codes: 0 everything was done and nothing found; 1 not so, and the runs concerned are named; 2 usage;
    130 interrupted.
    """
    unmet: list[str] = []
    for claim in CAMPAIGN:
        if scripts and claim.script not in scripts:
            continue
        click.echo(f"== {claim.command}")
        figures = _run(claim)
        if figures is None:
            unmet.append(f"{claim.name}: {claim.command} failed")
            continue
        keep({**kept(), claim.name: Kept(claim.command, figures)})
        unmet += [f"{claim.name}: {reason}" for reason in claim.unmet(figures)]
    test_docs.regenerate()
    for reason in unmet:
        click.echo(f"scripts/proof: {reason}", err=True)
    sys.exit(program.FOUND if unmet else 0)


def _run(claim: Claim) -> Figures | None:
    """What the script has written; None if it failed."""
    with tempfile.TemporaryDirectory(prefix="migd-proof-") as directory:
        path = Path(directory) / "figures.json"
        command = [_SCRIPTS / claim.script, *claim.arguments, "--json", path]
        if subprocess.run(command, check=False).returncode:
            return None
        return msgspec.json.decode(path.read_bytes(), type=Figures)


if __name__ == "__main__":
    program.run(main, "proof")
