"""DaemonPair: two daemons of ours on loopback, so that a guest can be moved there and back."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Unpack

from migd.api.daemon import MigrateOptions
from migd.api.guest import Guest
from migd.api.owned import START_S, OwnedDaemon, Tables, Value
from migd.migration.stats import Result


class DaemonPair:
    """Two daemons that send and receive, called after a guest's first way.

    Use it in a ``with`` statement, or ``close`` it.
    """

    source: OwnedDaemon
    """Where ``guest`` starts guests."""
    destination: OwnedDaemon
    """The other one."""

    def __init__(self, config: Tables | None = None) -> None:
        """Returns once both processes are on their way. ConfigError for a bad configuration."""
        with ExitStack() as owned:
            self.source = owned.enter_context(OwnedDaemon("serve", config))
            self.destination = owned.enter_context(OwnedDaemon("serve", config))
            self._owned = owned.pop_all()

    def __enter__(self) -> DaemonPair:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def daemons(self) -> tuple[OwnedDaemon, OwnedDaemon]:
        """Source and destination."""
        return self.source, self.destination

    @property
    def alive(self) -> bool:
        """Whether neither process has ended."""
        return all(daemon.process.poll() is None for daemon in self.daemons)

    def ready(self, timeout_s: float = START_S) -> DaemonPair:
        """Itself, once both answer; errors as of ``OwnedDaemon.ready``."""
        for daemon in self.daemons:
            daemon.ready(timeout_s)
        return self

    def guest(self, name: str = "vm1", ram: str | int = "64Mi", **options: Value) -> Guest:
        """A stub guest at the source, ready; options as of ``OwnedDaemon.start_guest``."""
        return self.source.start_guest(name, ram, **options).ready()

    def migrate(self, guest: str = "vm1", **options: Unpack[MigrateOptions]) -> Result:
        """Move it to the destination: the result, whatever the outcome."""
        return self.source.migrate(guest, self.destination, **options).wait()

    def back(self, guest: str = "vm1", **options: Unpack[MigrateOptions]) -> Result:
        """Move it to the source: the result, whatever the outcome."""
        return self.destination.migrate(guest, self.source, **options).wait()

    def end_guests(self) -> None:
        """All that are at either daemon, so that their names and memory are free again."""
        for daemon in self.daemons:
            daemon.end_guests()

    def logs(self) -> list[tuple[str, str]]:
        """Name and text of every log: of both daemons, and of the guests at them."""
        return [
            (f"{place} {name}", text)
            for place, daemon in (("source", self.source), ("destination", self.destination))
            for name, text in daemon.logs()
        ]

    def close(self) -> None:
        """End both daemons with all their guests. ResourceError if something cannot be ended."""
        self._owned.close()


def start_pair(config: Tables | None = None, timeout_s: float = START_S) -> DaemonPair:
    """A new pair that answers, for a ``with`` statement; ``config`` of both as of ``start_daemon``."""
    pair = DaemonPair(config)
    try:
        return pair.ready(timeout_s)
    except BaseException:
        pair.close()
        raise
