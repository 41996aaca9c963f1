"""Evidence: what is kept of a run that went wrong, in a directory of its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import msgspec

from tests.soak.oracle import Comparison
from tests.soak.plan import Run
from tests.soak.voyage import Voyage


def keep(
    directory: Path, seed: int, run: Run, voyage: Voyage, comparisons: list[Comparison], problems: list[str]
) -> Path:
    """``run.json`` with plan and findings, wrong pages as they lay, and the logs: the directory of it."""
    place = directory / f"run-{seed}-{run.number}"
    place.mkdir(parents=True, exist_ok=True)
    findings = [finding for found in comparisons for finding in found.findings]
    for finding in findings:
        (place / f"page-{finding.page}-{finding.side}.bin").write_bytes(finding.content)
    story = {
        "seed": seed,
        "run": run.number,
        "problems": problems,
        "wrong_pages": sum(found.wrong_pages for found in comparisons),
        "findings": [{**asdict(finding), "content": "see the .bin file"} for finding in findings],
        "plan": asdict(run),
        "life": asdict(voyage.life),
    }
    (place / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(story)) + b"\n")
    for name, text in {**voyage.daemon_logs, "guests": voyage.guests_log}.items():
        (place / f"{name}.log").write_text(text)
    return place
