"""Journeys of real guests: Linux under a stock QEMU, moved between two daemons on this host.

In every migration the guest is held where it is whole twice: paused at its source, loaded but not started at
its destination. There both RAM images are compared byte by byte, and only then it goes on and has to show
that it is right. So "0 wrong pages" never rests on what migd says of itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from migd.control import commands
from migd.lab.workbench import MIB, LabError, Recipe, Workload
from migd.migration.state import DestinationState, SourceState
from migd.migration.stats import Result
from migd.qemu.inventory import MEMO_PREFIX
from tests.support import remains
from tests.support.pair import eventually
from tests.support.ram_comparison import Comparison, compare
from tests.support.vm_site import WAIT_S, Site

LITTER_BYTES = 64 * MIB
FAILURES = ("clock_failures", "fork_failures", "file_failures", "kernel_complaints")
"""Counts in the status of a guest that are 0."""

_HINTABLE_PAGE = (1 << 20) // 4096
"""Below it nothing may be left behind, whatever the guest says."""


class Route:
    """Two hosts, and the guests that go from one to the other and back."""

    def __init__(self, here: Site, there: Site) -> None:
        self.here, self.there = here, there
        self._journeys: list[Journey] = []

    def journey(self, name: str, recipe: Recipe, other: Recipe | None = None) -> Journey:
        """A guest that is to be started at the first site, see ``Journey``."""
        found = Journey(name, recipe, self.here, self.there, other)
        self._journeys.append(found)
        return found

    def hang_up(self) -> None:
        for journey in self._journeys:
            journey.hang_up()


@contextlib.contextmanager
def route(*, memfd: bool = False, **limits: float) -> Iterator[Route]:
    """See ``Site``. At the end nothing is left of it, and neither daemon has met a bug of its own."""
    with contextlib.ExitStack() as stack:
        both = []
        for _ in range(2):
            site = Site(memfd=memfd, **limits)
            stack.callback(site.close)
            site.daemon.start()
            both.append(site)
        for site in both:
            site.daemon.ready()
        road = Route(*both)
        stack.callback(road.hang_up)
        yield road
        assert [bug for site in both for bug in remains.bugs(site.daemon)] == []


class Journey:
    """One guest, and where it is."""

    def __init__(
        self, name: str, recipe: Recipe, here: Site, there: Site, other: Recipe | None = None
    ) -> None:
        """``other``: how it is run at the second site, if not by the same recipe."""
        self.name = name
        self.recipe = recipe
        self.here, self.there = here, there
        self._last: dict[str, Any] = {}
        self._workload: Workload | None = None
        here.prepare(name, recipe)
        there.prepare(name, other or recipe)

    # -- the guest ----------------------------------------------------------------------------------

    def boot(self) -> Journey:
        """Started through a companion, and ready."""
        command = self.here.command(self.name, self.recipe)
        self.here.stand_beside(self.name, "--ram", str(self.recipe.ram_bytes), "--", *command)
        return self.await_ready()

    def found_by_companion(self, *, tracked: bool = True) -> Journey:
        """Started by somebody else, found by a companion, and ready."""
        monitor = self.here.start_qemu(self.name, self.recipe, tracked=tracked)
        self.here.stand_beside(self.name, "--qmp", str(monitor))
        return self.await_ready()

    def await_ready(self) -> Journey:
        self.attached(self.here)
        try:
            self.workload.await_ready(WAIT_S)
        except LabError as error:
            raise AssertionError(f"{error}\n{self.here.said(self.name)}") from error
        self.check()
        return self

    def attached(self, site: Site) -> commands.GuestStatus:
        """As the daemon there knows it, once it does."""
        return eventually(
            lambda: site.daemon.guest(self.name),
            f"{self.name} to attach",
            WAIT_S,
            why=lambda: site.said(self.name),
        )

    @property
    def workload(self) -> Workload:
        """Of the guest where it is now."""
        if self._workload is None:
            self._workload = Workload(self.here.directory(self.name) / "lab")
        return self._workload

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        try:
            return self.workload.ask(do, WAIT_S, **arguments)
        except LabError as error:
            raise AssertionError(f"{error}\n{self.here.said(self.name)}") from error

    def litter(self, size_bytes: int = LITTER_BYTES) -> None:
        """So much of what is free is full of old data afterwards: at the destination free pages are zero."""
        self.ask("hog", bytes=size_bytes)

    def signal_agent(self, number: int) -> None:
        """To the agent in the guest, once there is one."""
        eventually(lambda: self.ask("agent", signal=int(number))["agents"], "an agent", WAIT_S)

    def check(self) -> dict[str, Any]:
        """The guest is right by its own account, and went on since the last time. Its status."""
        checked = self.ask("check")
        assert (checked["pages"], checked["wrong"]) == (2048, 0), checked
        status = self.ask("status")
        assert {name: status[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0), status
        for name in ("counter", "uptime_s"):
            assert status[name] > self._last.get(name, 0), f"{name} stands still, or was set back: {status}"
        if status["rate_bytes_s"]:
            done = self._last.get("forks", 0)
            eventually(lambda: self.ask("status")["forks"] > done, "another fork", WAIT_S)
        self._last = self.ask("status")
        return self._last

    def settings(self) -> dict[str, Any]:
        """Of migrations, as its QEMU has them, once migd keeps no note there of what they were before."""
        ask = partial(self.here.ask_qemu, self.name)
        eventually(lambda: not _notes(ask("qom-list", path="/objects")), "migd to tidy up in QEMU", WAIT_S)
        capabilities = {each["capability"]: each["state"] for each in ask("query-migrate-capabilities")}
        return {"capabilities": capabilities, "parameters": ask("query-migrate-parameters")}

    # -- migrations ---------------------------------------------------------------------------------

    def begin(self, *stops: SourceState, **options: object) -> Leg:
        """A migration from here to there on its way. ``stops``: where its source is held as well."""
        return Leg(self, stops, options)

    def move(self, *, hints: str | None = "used", **options: object) -> Result:
        """There, compared, checked. ``hints``: what became of them, None for whatever."""
        return self.begin(**options).arrive(hints=hints)

    def turn(self) -> None:
        """It has arrived."""
        self.here, self.there = self.there, self.here
        self.hang_up()

    def hang_up(self) -> None:
        """The lab port is another one from now on."""
        if self._workload is not None:
            self._workload.close()
        self._workload = None


class Leg:
    """One migration of a journey. Its destination is held before GO, once the guest is loaded."""

    def __init__(self, journey: Journey, stops: Sequence[SourceState], options: dict[str, object]) -> None:
        self._journey = journey
        self.source, self.destination = journey.here, journey.there
        self.compared: Comparison | None = None
        for stop in stops:
            self.source.daemon.hold(stop, self._tag(stop))
        self.destination.daemon.hold(DestinationState.READY, self._tag(DestinationState.READY))
        request = commands.Migrate(guest=journey.name, to=self.destination.address, detach=True)
        reply = self.source.daemon.client.ask_once(msgspec.structs.replace(request, **options))
        assert isinstance(reply, commands.Accepted), reply
        self.migration = reply.migration

    def _tag(self, state: str) -> str:
        return f"{self._journey.name}-{state}"

    @contextlib.contextmanager
    def held(self, state: SourceState) -> Iterator[None]:
        """While its source stands there: the state was named when it began."""
        self.wait_held(state)
        yield
        self.source.daemon.release(self._tag(state))

    def wait_held(self, state: SourceState) -> None:
        """Until its source stands there, and it stays so."""
        self._wait_held(self.source, state)

    def _wait_held(self, site: Site, state: str) -> None:
        def look() -> bool:
            if site.daemon.is_held(self._tag(state)):
                return True
            assert not self.over, f"it ended before {state}: {self.result()}\n{self.said()}"
            return False

        eventually(look, f"{self._journey.name} to be held in {state}", WAIT_S, why=self.said)

    @property
    def over(self) -> bool:
        found = [each for each in self.source.daemon.status().migrations if each.migration == self.migration]
        return bool(found) and found[0].over

    def result(self) -> Result:
        """Once it is over."""
        reply = self.source.daemon.client.ask_once(commands.Attach(target=self.migration))
        assert isinstance(reply, commands.Finished), reply
        return reply.result

    def limit(self, bytes_s: int) -> None:
        """Its bandwidth from now on; 0 is unlimited."""
        request = commands.SetBandwidth(bytes_s=bytes_s, target=self.migration)
        reply = self.source.daemon.client.ask_once(request)
        assert isinstance(reply, commands.Done), reply

    def compare(self) -> Comparison:
        """Both images, once the guest is loaded and runs nowhere (G2). AssertionError for wrong pages."""
        self._wait_held(self.destination, DestinationState.READY)
        name, ram_bytes = self._journey.name, self._journey.recipe.ram_bytes
        assert not self.source.runs(name)
        assert not self.destination.runs(name)
        fds = [site.open_ram(name, ram_bytes) for site in (self.source, self.destination)]
        try:
            found = compare(*fds)
        finally:
            for fd in fds:
                os.close(fd)
        assert found.wrong == [], f"{len(found.wrong)} wrong pages: {found.wrong[:20]}\n{self.said()}"
        low = [page for page in found.left_behind if page < _HINTABLE_PAGE]
        assert low == [], f"pages of the first MiB were left behind: {low}"
        self.compared = found
        return found

    def release(self) -> None:
        """GO may come."""
        self.destination.daemon.release(self._tag(DestinationState.READY))

    def arrive(self, *, hints: str | None = "used") -> Result:
        """Compare, let it go, and see that it arrived and is right there; nothing of it stays here."""
        compared = self.compare()
        self.release()
        result = self.result()
        assert (result.outcome, result.error) == ("completed", ""), f"{result}\n{self.said()}"
        name = self._journey.name
        eventually(lambda: self.source.qemu(name) is None, "the end of QEMU at the source", WAIT_S)
        self._journey.turn()
        self._journey.check()
        assert compared.left <= result.skipped_free_pages, f"{compared}: {compared.left_behind[:20]}"
        assert result.rescued_pages == result.reclaimed_pages == 0
        assert hints is None or result.hints == hints, f"{result}\n{self.said()}"
        return result

    def fail(self) -> Result:
        """It has ended without moving anything: the guest runs on at its source, and is right."""
        result = self.result()
        assert result.outcome in ("failed", "cancelled"), f"{result}\n{self.said()}"
        for site in (self.source, self.destination):
            with contextlib.suppress(FileNotFoundError):
                site.daemon.release_all()
        name = self._journey.name
        assert self.source.runs(name), self.said()
        self._journey.check()
        eventually(lambda: self.destination.qemu(name) is None, "the end of QEMU at the destination", WAIT_S)
        return result

    def said(self) -> str:
        name = self._journey.name
        return f"== source\n{self.source.said(name)}\n== destination\n{self.destination.said(name)}"


def _notes(listed: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in listed if each["name"].startswith(MEMO_PREFIX)]
