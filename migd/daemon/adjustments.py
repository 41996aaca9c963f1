"""Adjustments: what an operator may change while migrations run. It lasts as long as daemon or migration."""

from __future__ import annotations

import logging
from dataclasses import replace

from migd.control import commands
from migd.daemon.departures import Departures
from migd.errors import MigdError, Refused
from migd.migration.convergence import Exhausted, Policy
from migd.sizes import bandwidth_text
from migd.transport.bandwidth import SharedBandwidth

log = logging.getLogger(__name__)


class Adjustments:
    """Bandwidth of the daemon and of single migrations, and when a migration pauses its guest."""

    def __init__(
        self, departures: Departures, incoming: SharedBandwidth, *, sends: bool, listens: bool
    ) -> None:
        self._departures = departures
        self._incoming = incoming
        self._sends = sends
        self._listens = listens

    def bandwidth(self, request: commands.SetBandwidth) -> str:
        """What is in force now, in words. MigdError if there is nothing that it could limit."""
        text = f"max_bandwidth {bandwidth_text(request.bytes_s)}"
        if request.target:
            return self._said(f"migration {self._departures.limit(request.target, request.bytes_s)}: {text}")
        if request.incoming:
            self._incoming_daemon().change(request.bytes_s)
            return self._said(f"all arrivals together: {text}")
        self._outgoing_daemon().change(request.bytes_s)
        return self._said(f"all departures together: {text}")

    def policy(self, request: commands.SetPolicy) -> str:
        """What is in force now, in words. MigdError if the guest is paused already, or in no migration."""
        session = self._departures.session_of(request.target)
        policy = _changed(session.policy, request)
        if not session.change_policy(policy):
            raise MigdError(f"{request.target}: too late, the migration is {session.state}")
        return self._said(
            f"migration {session.migration}: downtime limit {policy.downtime_limit_s * 1e3:g} ms, at most "
            f"{policy.max_iterations} iterations and {policy.max_total_s:g} s, then {policy.on_exhausted}"
        )

    def _outgoing_daemon(self) -> SharedBandwidth:
        if not self._sends:
            raise Refused("this daemon only takes guests in: set its limit with --incoming")
        return self._departures.bandwidth

    def _incoming_daemon(self) -> SharedBandwidth:
        if not self._listens:
            raise Refused("this daemon takes no guests in: leave out --incoming")
        return self._incoming

    def _said(self, text: str) -> str:
        log.info("set: %s", text)
        return text


def _changed(policy: Policy, request: commands.SetPolicy) -> Policy:
    if request.downtime_limit_ms is not None:
        policy = replace(policy, downtime_limit_s=request.downtime_limit_ms / 1e3)
    if request.max_iterations is not None:
        policy = replace(policy, max_iterations=request.max_iterations)
    if request.max_total_s is not None:
        policy = replace(policy, max_total_s=request.max_total_s)
    if request.on_exhausted is not None:
        policy = replace(policy, on_exhausted=Exhausted(request.on_exhausted))
    return policy
