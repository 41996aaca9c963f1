"""``scripts/fuzz``, which is ``python -m tests.fuzz``: mutated recordings into every parser of migd."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from tests.fuzz.campaign import Chunk, Finding, Tally, replayed
from tests.fuzz.crew import run_all
from tests.fuzz.guided import guided
from tests.fuzz.report import Report
from tests.fuzz.targets import TARGETS
from tests.support import program

FINDINGS = Path("build/fuzz")
_MOST_ROUNDS = 100
_ROUND_INPUTS = 5000

_EPILOG = """\b
Each input is made from a recording of a real migration (tests/fuzz/seeds, renewed by
python -m tests.fuzz.record): bits, bytes, lengths, order, splices; and whole frames with other content under
a digest that is right again. For every input it is looked at
  - that only the errors are raised that the parser documents,
  - that it takes less than a second of processor time, and allocates in proportion to the input,
  - that what was accepted is what the bytes say, by a second reader written from the specification,
  - that a parser that has refused something stays shut.

\b
An input that breaks one of these is saved in build/fuzz, and run again by: --replay FILE --target NAME.
Exit codes: 0 nothing found; 1 something was found; 2 usage; 130 interrupted.
"""


@click.command(epilog=_EPILOG, context_settings=program.CONTEXT)
@click.option(
    "--inputs",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    metavar="N",
    help="All targets together.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="The same inputs again, for the same N.",
)
@click.option(
    "--target", "names", multiple=True, type=click.Choice(list(TARGETS)), help="Only these; repeatable."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one a core",
    metavar="N",
    help="How many fuzz at the same time.",
)
@program.json_option
@click.option(
    "--replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Run one input, of one --target, and say what is wrong with it.",
)
@click.option(
    "--atheris",
    is_flag=True,
    help="Let atheris choose the inputs by the code they reach; needs the extra `fuzz`.",
)
def main(
    inputs: int,
    seed: int,
    names: tuple[str, ...],
    processes: int,
    json_path: Path | None,
    replay: Path | None,
    atheris: bool,
) -> None:
    """Feed mutated recordings to every parser of migd, and look whether each is refused or understood."""
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise click.UsageError(f"--json: {json_path.parent} is no directory")
    chosen = list(names or TARGETS)
    if replay is not None:
        if len(names) != 1:
            raise click.UsageError("--replay needs the one --target that the input is for")
        sys.exit(_replay(names[0], replay))
    if atheris and json_path is not None:
        raise click.UsageError("--json is for runs without --atheris, which counts in its own words")
    if atheris:
        sys.exit(guided(chosen, inputs, seed, FINDINGS))
    report = fuzz(chosen, inputs, seed, processes)
    Console(soft_wrap=True).print(report.table())
    click.echo(f"\nrefused\n{report.refusals()}\n\n{report.summary()}")
    program.write_figures(json_path, report.figures())
    for finding in report.total.findings:
        click.echo(saved(finding), err=True)
    for line in report.wrong:
        click.echo(f"scripts/fuzz: {line}", err=True)
    sys.exit(program.FOUND if report.total.findings or report.wrong else 0)


def fuzz(names: list[str], inputs: int, seed: int, processes: int) -> Report:
    """Run them, with a bar on a terminal."""
    report = Report(seed, processes, tallies={name: Tally() for name in names})
    chunks = planned(names, inputs, seed)
    began_s = time.monotonic()
    with program.bar() as bar:
        task = bar.add_task("fuzzing", total=sum(chunk.inputs for chunk in chunks))

        def told(chunk: Chunk, tally: Tally) -> None:
            report.tallies[chunk.target].add(tally)
            bar.update(task, advance=chunk.inputs, description=chunk.target)

        report.rss_bytes = run_all(chunks, processes, told)
    report.seconds = time.monotonic() - began_s
    return report


def planned(names: list[str], inputs: int, seed: int) -> list[Chunk]:
    """Exactly so many inputs, each target's part of them spread over rounds that all targets take part in."""
    shares = {name: TARGETS[name].shared for name in names}
    whole = sum(shares.values())
    rounds = max(1, min(_MOST_ROUNDS, inputs // _ROUND_INPUTS))
    chunks, given, behind = [], 0, 0
    for number in range(rounds):
        for name in names:
            behind += shares[name]
            upto = inputs * behind // (whole * rounds)
            if upto > given:
                chunks.append(Chunk(name, seed, number, upto - given))
            given = upto
    return chunks


def saved(finding: Finding) -> str:
    """Keep its input; what was found, and the command that finds it again."""
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:16]}"
    path.write_bytes(finding.data)
    return f"{finding.target}: {finding.what}\n  scripts/fuzz --replay {path} --target {finding.target}"


def _replay(name: str, path: Path) -> int:
    logging.disable(logging.CRITICAL)
    target = TARGETS[name]()
    try:
        wrong = replayed(target, path.read_bytes())
    finally:
        target.close()
    click.echo(f"{name}: {wrong or 'nothing is wrong with it'}")
    return program.FOUND if wrong else 0


if __name__ == "__main__":
    program.run(main, "fuzz")
