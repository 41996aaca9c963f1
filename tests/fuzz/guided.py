"""The same targets under atheris, which prefers inputs that reach code no other has reached.

libFuzzer never returns to whoever started it, so each target has a process of its own, whose files its parent
removes. It saves an input that broke something under the name of the target; `--replay` runs it, too.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import click

_MISSING = "atheris is not installed here: .venv/bin/python -m pip install --editable '.[fuzz]'"
_USAGE = 2
_MOST_BYTES = 1 << 16
_HANG_S = 20
"""Of the wall clock; instrumented code is several times slower."""
_MEMORY_MB = 2048


def guided(names: list[str], inputs: int, seed: int, findings: Path) -> int:
    """So many inputs for each target: 0, or 1 if any found something; 2 if there is no atheris."""
    if importlib.util.find_spec("atheris") is None:
        click.echo(f"scripts/fuzz: {_MISSING}", err=True)
        return _USAGE
    findings.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        words = [sys.executable, "-m", "tests.fuzz.guided", name, str(inputs), str(seed), str(findings)]
        click.echo(f"== {name}")
        with tempfile.TemporaryDirectory(prefix="migd-fuzz-") as scratch:
            if subprocess.run(words, check=False, env={**os.environ, "TMPDIR": scratch}).returncode:
                failed.append(name)
    click.echo(
        f"atheris: {len(names)} targets, {inputs} inputs each, found something: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


def main(name: str, inputs: int, seed: int, findings: Path) -> None:
    """One target, in a process that libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["migd"]):
        from tests.fuzz.targets import TARGETS
    logging.disable(logging.CRITICAL)
    target = TARGETS[name]()
    corpus = tempfile.mkdtemp(prefix="corpus-")
    for number, data in enumerate(target.seeds):
        (Path(corpus) / str(number)).write_bytes(data)
    options = [
        "scripts/fuzz", corpus, f"-runs={inputs}", f"-seed={seed or 1}", f"-max_len={_MOST_BYTES}",
        f"-timeout={_HANG_S}", f"-rss_limit_mb={_MEMORY_MB}", f"-artifact_prefix={findings}/{name}-",
        "-verbosity=0", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup(
        options,
        target.run,
        custom_mutator=lambda data, most, number: target.mutate(data, Random(number))[:most],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
