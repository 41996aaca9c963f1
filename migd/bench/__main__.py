"""`scripts/bench`, which is `python -m migd.bench`: measure, print, and exit with 1 if a run failed."""

from __future__ import annotations

import signal
import sys

import msgspec

from migd.bench.bench import run_bench
from migd.bench.options import BenchOptions, parse
from migd.bench.progress import RunNarrator
from migd.bench.table import report_text
from migd.errors import MigdError

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130


def main(words: list[str]) -> int:
    """The exit code: 0, 1 for failed runs, that of a MigdError, 130 if interrupted."""
    for number in _INTERRUPTS:
        signal.signal(number, signal.default_int_handler)
    try:
        return _bench(parse(words))
    except MigdError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; everything it had started was ended")
        return _INTERRUPTED


def _bench(options: BenchOptions) -> int:
    with RunNarrator(len(options.contenders) * options.runs) as narrator:
        found = run_bench(options.contenders, options.ram_bytes, options.runs, options.migration, narrator)
    sys.stdout.write(f"{report_text(found)}\n")
    if options.json_path is not None:
        options.json_path.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    for failure in found.failures:
        _complain(f"FAILED: {failure}")
    return 1 if found.failures else 0


def _complain(text: str) -> None:
    sys.stderr.write(f"scripts/bench: {text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
