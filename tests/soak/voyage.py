"""Voyage: one life of a soak: two daemons, a guest that goes there and back between them, and its witness."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from migd.control import commands
from migd.errors import MigdError
from migd.migration.stats import Result
from migd.ram.contract import FreeContract
from tests.soak.network import Proxy, Weather
from tests.soak.oracle import Comparison
from tests.soak.plan import Life, Moment, Run, Trouble, untroubled
from tests.soak.witness import Witness
from tests.support.pair import ROOT, DaemonPair, DaemonProcess, eventually

_TRIES = 3
"""The first with its trouble; then the network is good."""
_NAME = "soaked"

_LIMITS = """
[limits]
connect_s = 5
hello_s = 5
begin_s = 10
ping_s = 0.5
dead_s = 4
progress_s = 4
hint_window_s = 0.5
guest_s = 20
go_s = 5
verdict_s = 3
check_s = 5
"""
"""Peers that say nothing are given up sooner than by default; a guest gets time to be compared."""


@dataclass(frozen=True)
class Attempt:
    """One migration: what migd says of it, and what really happened."""

    result: Result
    troubled: bool
    """What was planned to go wrong did."""
    resolved: bool
    """Its outcome was unknown to the source, and had to be asked for."""


@dataclass(frozen=True)
class _Attempting:
    """A migration that goes on, and whom its trouble is to hit."""

    run: Run
    source: DaemonProcess
    weather: Weather
    migration: str


class Voyage:
    """Everything of one life; ``close`` leaves nothing behind."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self._directory = Path(tempfile.mkdtemp(prefix="migd-soak-"))
        self._held = contextlib.ExitStack()
        self._held.callback(shutil.rmtree, self._directory)
        self._files = Path(tempfile.mkdtemp(prefix="migd-soak-", dir="/dev/shm"))
        """RAM of daemons that make files of it."""
        self._held.callback(shutil.rmtree, self._files)
        self._now: _Attempting | None = None
        self._timers: list[threading.Timer] = []
        self._lock = threading.Lock()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        making = self.life.making
        self.witness = Witness(
            self._directory / "witness.sock",
            making.guest,
            zeroed=making.contract == FreeContract.ZERO,
            stopped=self._stopped,
            starting=self._starting,
        )
        self._held.callback(self.witness.close)
        self._start_cradle()
        self._pair = DaemonPair(
            source=self._config(self.life.source_ram),
            destination=self._config(self.life.destination_ram),
            serve=True,
        )
        self._held.callback(self._pair.close)
        self.here, self.there = self._pair.source, self._pair.destination
        self._proxies = {daemon.address: Proxy(daemon.address) for daemon in (self.here, self.there)}
        for proxy in self._proxies.values():
            self._held.callback(proxy.close)
        self._bear()

    def _start_cradle(self) -> None:
        self._cradle = self._directory / "cradle.sock"
        self._log = (self._directory / "guests.log").open("ab")
        self._held.callback(self._log.close)
        cradle = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.cradle", self._cradle, self._directory / "witness.sock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
        )
        self._held.callback(cradle.communicate)
        assert cradle.stdout is not None
        assert cradle.stdout.readline() == b"ready\n", self.guests_log

    def _config(self, ram: str) -> str:
        script = str(ROOT / "tests" / "soak" / "incoming.py")
        words = ["{socket}", "{name}", "{migration}"]
        command = json.dumps([sys.executable, "-IS", script, str(self._cradle), *words])
        place = self._files if ram == "file" else ram
        return f'guest_command = {command}\n[daemon]\nram = "{place}"\nworkers = 2\n{_LIMITS}'

    def _bear(self) -> None:
        """A new guest, running."""
        line = socket.socket(socket.AF_UNIX)
        self._held.callback(line.close)
        line.connect(str(self._cradle))
        assignment = {
            "daemon": str(self.here.directory / "guest.sock"),
            "name": _NAME,
            "making": msgspec.to_builtins(self.life.making),
        }
        line.sendall(json.dumps(assignment).encode() + b"\n")
        eventually(self._is_born, "the guest to fill its RAM", why=lambda: self.guests_log)

    def _is_born(self) -> bool:
        _require_running(self.here)
        return self.witness.appeared()

    @property
    def guests_log(self) -> str:
        return (self._directory / "guests.log").read_text()

    @property
    def daemon_logs(self) -> dict[str, str]:
        """By side: what the daemons said."""
        return {"here": self.here.log, "there": self.there.log}

    # -- one run ------------------------------------------------------------------------------------

    def travel(self, run: Run) -> list[Attempt]:
        """Move the guest, through whatever trouble: every attempt, the last one completed.

        AssertionError if it does not arrive in ``_TRIES``.
        """
        self.witness.behave(run.behaviour)
        attempts: list[Attempt] = []
        for planned in [run] + [untroubled(run)] * (_TRIES - 1):
            attempts.append(self._attempt(planned))
            if attempts[-1].result.outcome == "completed":
                self.here, self.there = self.there, self.here
                return attempts
        raise AssertionError(f"the guest did not arrive: {[attempt.result.error for attempt in attempts]}")

    def _attempt(self, run: Run) -> Attempt:
        proxy = self._proxies[self.there.address]
        to = self.there.address if run.road is None else proxy.address
        proxy.weather.clear(run.blow, run.road)
        request = msgspec.structs.replace(run.request, guest=_NAME, to=to)
        reply: commands.Reply | None = None
        for reply in self.here.client.ask(request):
            if isinstance(reply, commands.Accepted):
                self._expect_trouble(_Attempting(run, self.here, proxy.weather, reply.migration))
        result = _result(reply)
        self._expect_trouble(None)
        troubled = proxy.weather.struck or result.outcome == "cancelled"
        proxy.weather.clear()
        unknown = result.outcome == "unknown"
        if unknown:
            result = eventually(self._resolved, "the outcome to be known", why=lambda: self.here.log)
        self._settle(result)
        return Attempt(result, troubled, unknown)

    def _resolved(self) -> Result | None:
        """Once the destination has answered."""
        result = _result(self.here.client.ask_once(commands.Resolve(target=_NAME)))
        return result if result.outcome != "unknown" else None

    def _settle(self, result: Result) -> None:
        """The guest runs on one side, and the other has forgotten it."""
        runs, empty = (self.there, self.here) if result.outcome == "completed" else (self.here, self.there)
        eventually(lambda: _runs(runs), f"the guest to run after {result.outcome}", why=lambda: runs.log)
        eventually(lambda: _is_empty(empty), f"no guest after {result.outcome}", why=lambda: empty.log)

    # -- trouble ------------------------------------------------------------------------------------

    def _expect_trouble(self, attempting: _Attempting | None) -> None:
        """Of that attempt, and of none before it."""
        with self._lock:
            self._now = attempting
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        if attempting is not None and attempting.run.moment is Moment.TIME:
            self._trouble_after(attempting)

    def _stopped(self) -> None:
        with self._lock:
            now = self._now
        if now is not None and now.run.moment is Moment.PAUSE:
            self._trouble_after(now)

    def _starting(self) -> None:
        with self._lock:
            now = self._now
        if now is not None and now.run.moment is Moment.START:
            _trouble(now)

    def _trouble_after(self, now: _Attempting) -> None:
        timer = threading.Timer(now.run.delay_s, _trouble, (now,))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    # -- the end ------------------------------------------------------------------------------------

    def halt(self) -> Comparison:
        """Stop the guest where it is, and look at what it owns: its last stores are seen by no other run.

        AssertionError if memory is left over from any attempt.
        """
        found = self.witness.halt()
        blocks = len(self.life.making.block_pages)
        eventually(lambda: len(list(self._files.iterdir())) <= blocks, "RAM files of old copies to go")
        return found

    def close(self) -> None:
        self._held.close()


def _result(reply: commands.Reply | None) -> Result:
    """AssertionError if that was not the last reply."""
    assert isinstance(reply, commands.Finished), reply
    return reply.result


def _trouble(now: _Attempting) -> None:
    """What was planned; nothing, if the attempt is over."""
    if now.run.trouble is Trouble.CANCEL:
        with contextlib.suppress(MigdError):  # whoever ends the soak may have ended the daemon
            now.source.client.ask_once(commands.Cancel(target=now.migration))
    elif now.run.trouble is not Trouble.NONE:
        now.weather.strike()


def _runs(daemon: DaemonProcess) -> bool:
    _require_running(daemon)
    guest = daemon.guest(_NAME)
    return guest is not None and guest.state == "running"


def _is_empty(daemon: DaemonProcess) -> bool:
    return not any(guest.name == _NAME for guest in daemon.status().guests)


def _require_running(daemon: DaemonProcess) -> None:
    """AssertionError if there is no daemon any more: nothing that is waited for will come."""
    assert daemon.process is not None
    assert daemon.process.poll() is None, f"the daemon has ended: {daemon.log}"
