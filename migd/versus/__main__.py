"""`scripts/bench-qemu-guest`, or `python -m migd.versus`: measure, print, and exit with 1 if a run failed."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import msgspec

from migd.bench.options import count, size
from migd.bench.progress import RunNarrator
from migd.errors import MigdError
from migd.versus.bench import run_versus
from migd.versus.cases import Case, Contender
from migd.versus.table import report_text

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_DESCRIPTION = "Move the same real Linux guest by QEMU's own migration and by migd, and compare."
_EPILOG = """\
Two cases, those of the proposal of 2016: a guest that has just booted and idles, and one in which a memory
hog has ended. Every run boots a guest of its own, touches and frees as much memory as it will need, and moves
the guest over loopback to a QEMU that waits for it; nothing is capped; both use two connections. The runs of
all contenders take turns. What arrives checks itself. migd's total includes its late verification.

Needs Debian, for the guest and QEMU 10; half an hour for five runs on two cores. Nothing else should run.
Exit codes: 0 done; 1 a run failed, and the report says which; 2 usage; 3 no guest can be had here; 130
interrupted, and everything it had started was ended.
"""


def main(words: list[str]) -> int:
    """The exit code."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    found = _parser().parse_args(words)
    try:
        return _bench(found)
    except MigdError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; everything it had started was ended")
        return _INTERRUPTED


def _bench(options: argparse.Namespace) -> int:
    cases = [Case[name] for name in options.case or Case.__members__]
    contenders = [Contender[name] for name in options.contender or Contender.__members__]
    with RunNarrator(len(cases) * len(contenders) * options.runs) as narrator:
        told = (narrator.begins, narrator.ended, narrator.noted)
        found = run_versus(cases, contenders, options.ram, options.runs, *told)
    sys.stdout.write(f"{report_text(found)}\n")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    for failure in found.failures:
        _complain(f"FAILED: {failure}")
    return 1 if found.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench-qemu-guest",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("--ram", type=size, default="1Gi", metavar="SIZE", help="RAM of the guest; default: 1Gi")
    add("--runs", type=count, default=5, metavar="N", help="runs of each; default: 5")
    add("--case", nargs="+", choices=list(Case.__members__), help="only these; default: all")
    add("--contender", nargs="+", choices=list(Contender.__members__), help="only these; default: all")
    add("--json", type=Path, metavar="FILE", help="write everything there, too")
    # fmt: on
    return parser


def _complain(text: str) -> None:
    sys.stderr.write(f"scripts/bench-qemu-guest: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
