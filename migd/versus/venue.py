"""Venue: two QEMUs on this host, one with a guest in the state of a case, and one that waits for it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from migd.lab.workbench import LabError, Recipe, Workload
from migd.qemu import preload
from migd.versus.cases import HOG_SHARE, Case

_SHARED_MEMORY = Path("/dev/shm")
_END_S = 10.0
_HOG_S = 120.0
_SETTLE_S = 1.0
"""After booting, or the hog: the kernel gives pages back in batches, and per-CPU lists drain."""


class Side:
    """A QEMU's paths; ``name`` is short, since sockets live there."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory / name
        self.directory.mkdir()
        self.ram, self.qmp, self.hints, self.lab, self.console = (
            self.directory / each for each in ("ram", "qmp", "hints", "lab", "console")
        )

    def argv(self, recipe: Recipe, *more: str) -> list[str]:
        paths = (self.ram, self.qmp, self.hints, self.lab, self.console)
        return [*recipe.argv(*map(str, paths)), *more]


class Venue:
    """Both QEMUs, ended for certain with the context; RAM is in shared memory and goes with them."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._directory = tempfile.TemporaryDirectory(prefix="migd-vs-", dir=_SHARED_MEMORY)
        self.source, self.destination = (Side(Path(self._directory.name), name) for name in ("s", "d"))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Venue:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(_END_S)
        self._directory.cleanup()

    def boot(self, case: Case) -> None:
        """The source's guest, in the state of this case, and idle."""
        self._start(self.source.argv(self._recipe))
        with Workload(self.source.lab) as workload:
            workload.await_ready()
            workload.ask("rate", bytes_s=0)
            if case is Case.HOG:
                free = workload.ask("status")["mem_free_bytes"]
                workload.ask("hog", _HOG_S, bytes=int(free * HOG_SHARE))
        time.sleep(_SETTLE_S)

    def await_guest(self) -> None:
        """The destination's QEMU, waiting for a guest."""
        self._start(self.destination.argv(self._recipe, "-incoming", "defer", "-S"))

    def check(self) -> None:
        """The guest that has arrived finds its memory right. LabError if not."""
        with Workload(self.destination.lab) as workload:
            checked = workload.ask("check", _HOG_S)
            if checked["wrong"]:
                raise LabError(f"{checked['wrong']} of {checked['pages']} pages are wrong: {checked}")
            status = workload.ask("status")
            failures = {name: status[name] for name in _FAILURES if status[name]}
            if failures:
                raise LabError(f"the guest complains: {failures}, {status['first_complaint']}")

    def _start(self, argv: Sequence[str]) -> None:
        environment = {**os.environ, **self._recipe.emulator.environment}
        with suppress(preload.PreloadUnavailable):  # migd says so where it matters
            environment = preload.environment(environment, [self.source.ram, self.destination.ram])
        log = Path(self._directory.name) / f"log-{len(self._processes)}"
        with log.open("wb") as output:
            # No orphan: setpriv has the kernel end QEMU with us.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        self._processes.append(process)


_FAILURES = ("clock_failures", "fork_failures", "file_failures", "kernel_complaints")
