"""The public Python API, synchronous, for scripts and tests: start daemons and guests, migrate, cancel.

::

    from migd import api

    with api.start_daemon("source") as here, api.start_daemon("destination") as there:
        here.start_guest("vm1", ram="64Mi").ready()
        result = here.migrate("vm1", to=there).wait().check()
        print(result.total_s, result.downtime.guest_s)

Daemons are processes of their own, and their callers need no event loop. Errors are those of ``migd.errors``;
every wait is bounded and ends in ``TimedOut``; threads may share every object. See ``docs/api.md``.
"""

from __future__ import annotations

from migd.api.daemon import Daemon, connect
from migd.api.guest import Guest
from migd.api.migration import Migration
from migd.api.owned import OwnedDaemon, Tables, start_daemon
from migd.api.pair import DaemonPair, start_pair

__all__ = [
    "Daemon",
    "DaemonPair",
    "Guest",
    "Migration",
    "OwnedDaemon",
    "Tables",
    "connect",
    "start_daemon",
    "start_pair",
]
