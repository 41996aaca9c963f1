"""`migd demo --qemu`: a real Linux guest, aged, moved live between two stock QEMUs; and by QEMU itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import click
import msgspec

from migd.bench.progress import RunNarrator
from migd.versus.bench import run_versus
from migd.versus.cases import Case, Contender
from migd.versus.figures import Report
from migd.versus.table import report_text

_CONTENDERS = (Contender.MULTIFD, Contender.MIGD_UNHINTED, Contender.MIGD)
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130


def run_qemu_demo(ram_bytes: int, *, as_json: bool) -> int:
    """Run it and print the table: the exit code, 1 with a line for each condition that did not hold.

    LabUnavailable where there is no guest to be had: it takes Debian, for its packages.
    """
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        with RunNarrator(len(_CONTENDERS)) as narrator:
            found = run_versus(
                [Case.HOG], _CONTENDERS, ram_bytes, 1, narrator.begins, narrator.ended, narrator.noted
            )
    except KeyboardInterrupt:
        click.echo("migd demo: interrupted; everything it had started was ended", err=True)
        return _INTERRUPTED
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else report_text(found))
    failures = [*found.failures, *_idle(found)]
    for failure in failures:
        click.echo(f"migd demo: FAILED: {failure}", err=True)
    return 1 if failures else 0


def _idle(found: Report) -> Iterator[str]:
    """What the migration with hints left undone, so that it shows nothing."""
    for row in found.rows:
        for measured in row.measured:
            if row.contender is Contender.MIGD and not measured.skipped_pages:
                yield f"{row.contender}: no page was skipped as free ({measured.detail})"
            if row.contender.ours and not measured.live:
                yield f"{row.contender}: nothing was sent while the guest ran"
