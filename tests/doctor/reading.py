"""Reading what `migd doctor` says, and systems that are just a few files."""

from __future__ import annotations

from pathlib import Path

import msgspec

from migd.cli.doctor import Diagnosis
from migd.doctor.finding import Finding, Level
from migd.doctor.system import System
from tests.support.pair import Output

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL


def diagnosis(output: Output) -> dict[str, Finding]:
    """By check; a check of which there are several has its last finding here."""
    found = msgspec.json.decode(output.stdout, type=Diagnosis)
    assert found.ok == (output.exit_code == 0)
    return {finding.check: finding for finding in found.findings}


def system(root: Path, files: dict[str, str]) -> System:
    """A system with just these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return System(root)
