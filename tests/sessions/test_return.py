"""Guests that attach again, in every state that they may be in, with every last record of either journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from migd.config import Config
from migd.daemon.departures import Departures
from migd.daemon.resolving import Resolving
from migd.daemon.returns import Returns
from migd.destination.reception import Reception
from migd.errors import GuestError, MigdError, OutcomeUnknown, Refused, ResourceError, VerificationError
from migd.guest.control import GuestState
from migd.guest.registry import GuestRegistry
from migd.host import MonotonicClock, SystemEntropy, ThreadWorker
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import Bandwidth, PauseReport, Resumption, SelfCheck
from migd.migration.state import SourceState
from migd.source.attempt import SourceServices
from migd.transport.in_flight import SharedRoom
from migd.transport.tcp import TcpConnector
from migd.wire.messages import Aborted, Started
from migd.wire.protocol import Keeper
from tests.support.scripted_guest import Observed

MIGRATION = "ab" * 16
NOWHERE = "127.0.0.1:1"
"""Nothing listens there: the destination does not answer, and nothing is decided."""
LIMITS = Limits(go_s=0.2, connect_s=0.2)


@dataclass(eq=False)
class Returned:
    """A guest as the registry has it once its process has attached again; it remembers what it was told."""

    state: GuestState
    migration: str = MIGRATION
    name: str = "vm1"
    gone: bool = False
    calls: list[str] = field(default_factory=list)

    async def start(self) -> Resumption:
        if self.state is GuestState.PAUSED:
            raise GuestError("a paused guest is resumed, not started")
        self.calls.append("start")
        self.state, self.migration = GuestState.RUNNING, ""
        return Resumption(1, 2)

    async def pause(self, migration: str) -> PauseReport:
        self.calls.append("pause")
        self.state, self.migration = GuestState.PAUSED, migration
        return PauseReport(b"", None)

    async def resume(self) -> None:
        self.calls.append("resume")
        self.state, self.migration = GuestState.RUNNING, ""

    async def release(self) -> None:
        self.calls.append("release")

    async def discard(self) -> None:
        self.calls.append("discard")
        self.gone = True

    async def self_check(self) -> SelfCheck:
        return SelfCheck(1, 0, -1)

    def judged(self) -> None:
        self.calls.append("judged")

    def await_verdict(self) -> None:
        self.calls.append("await_verdict")


class _Registry:
    """The guests that are here."""

    def __init__(self) -> None:
        self.guests: dict[str, Returned] = {}

    def get(self, name: str) -> Returned:
        if name not in self.guests:
            raise MigdError(f"no guest {name!r}")
        return self.guests[name]


class Restarted:
    """What a daemon that was started again has: two journals, and guests as they attach."""

    def __init__(self, directory: Path) -> None:
        self.departed = Journal(directory / "source")
        self.arrived = Journal(directory / "destination")
        self.worker = ThreadWorker(1)
        self.registry = _Registry()
        clock, guests = MonotonicClock(), cast(GuestRegistry, self.registry)
        services = SourceServices(
            clock, self.worker, self.departed, LIMITS, Observed(), SystemEntropy(), SharedRoom(1).open
        )

        def connector(address: str, bandwidth: Bandwidth | None) -> TcpConnector:
            return TcpConnector(address, clock, LIMITS, bandwidth=bandwidth)

        self.departures = Departures(Config(limits=LIMITS), guests, services, connector)
        self.returns = Returns(
            guests, self.departures, self.departed, self.arrived, self.worker, LIMITS, Observed()
        )
        unused: Any = None
        self.reception = Reception(_Services(self.arrived, self.worker), unused, self.returns.revive, unused)
        self.resolving = Resolving(self.departures, self.returns, self.reception, self.arrived)

    async def receive(self, guest: Returned) -> list[str]:
        """What the guest was told."""
        self.registry.guests[guest.name] = guest
        await self.returns.receive(cast(Any, guest))
        return guest.calls

    async def go(self) -> Started | Aborted:
        """The answer to GO, by whichever way it comes to be."""
        handover = await self.reception.handover(MIGRATION)
        return await handover.go() if handover else await self.reception._never_heard_of(MIGRATION)

    async def resolve(self, target: str, keeper: Keeper | None = None) -> str:
        (reply,) = [reply async for reply in self.resolving.resolve(target, keeper)]
        return str(getattr(reply, "text", reply))

    def last(self, journal: Journal) -> Mark | None:
        found = journal.last(MIGRATION)
        return found.mark if found is not None else None


class _Services:
    """As much of ``DestinationServices`` as a reception without a session needs."""

    def __init__(self, journal: Journal, worker: ThreadWorker) -> None:
        self.journal, self.worker = journal, worker


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Restarted]:
    daemon = Restarted(tmp_path)
    yield daemon
    daemon.worker.close()


def record(mark: Mark, *, guest: str = "vm1", migration: str = MIGRATION) -> Record:
    return Record(migration=migration, mark=mark, guest=guest, peer=NOWHERE, detail="why")


# -- where it was to leave from -----------------------------------------------------------------------------


@pytest.mark.parametrize("went", [True, False], ids=["GO follows", "no GO follows"])
async def test_the_journal_is_asked_only_when_the_session_is_over(daemon: Restarted, went: bool) -> None:
    """G2: on a slow disk GO is being written; the guest may not be resumed because it is not there yet."""
    guest = Returned(GuestState.PAUSED)

    async def write_go() -> Any:
        await asyncio.sleep(0.2)
        assert not guest.calls
        if went:
            daemon.departed.append(record(Mark.GO))

    daemon.departures._running[MIGRATION] = asyncio.ensure_future(write_go())
    assert await daemon.receive(guest) == ([] if went else ["resume"])
    assert daemon.last(daemon.departed) is (Mark.GO if went else None)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (None, ["resume"]),
        (Mark.GO, []),
        (Mark.STARTED, []),
        (Mark.ABORTED, ["resume"]),
        (Mark.RELEASED, ["release"]),
        (Mark.CONDEMNED, []),
    ],
)
async def test_a_paused_guest_whose_destination_does_not_answer(
    daemon: Restarted, last: Mark | None, told: list[str]
) -> None:
    """G1, G3, G4: it is resumed only if it is certainly ours."""
    if last is not None:
        daemon.departed.append(record(last))
    assert await daemon.receive(Returned(GuestState.PAUSED)) == told
    assert daemon.last(daemon.departed) is last


@pytest.mark.parametrize(
    ("last", "keeper", "told"),
    [(None, Keeper.SOURCE, ["resume"]), (Mark.ABORTED, None, ["resume"]), (Mark.RELEASED, None, ["release"])],
)
async def test_resolve_does_what_was_decided_and_not_done(
    daemon: Restarted, last: Mark | None, keeper: Keeper | None, told: list[str]
) -> None:
    """The guest did not answer then, and is paused still."""
    if last is not None:
        daemon.departed.append(record(last))
    guest = daemon.registry.guests["vm1"] = Returned(GuestState.PAUSED)
    other = Keeper.SOURCE if last is Mark.RELEASED else Keeper.DESTINATION
    with pytest.raises(Refused, match=f"{other.option} is refused"):
        await daemon.resolve("vm1", other)
    assert guest.calls == []
    await daemon.resolve("vm1", keeper)
    assert guest.calls == told


async def test_resolve_waits_for_whoever_asks_already_and_finds_what_that_has_done(daemon: Restarted) -> None:
    """Two who decide at once might decide differently."""
    daemon.departed.append(record(Mark.GO))
    guest = Returned(GuestState.PAUSED)
    asking = asyncio.ensure_future(daemon.receive(guest))
    while not daemon.returns._lock(MIGRATION).locked():  # noqa: ASYNC110  # it sets no event
        await asyncio.sleep(0)
    said = await daemon.resolve("vm1", Keeper.SOURCE)
    assert asking.done(), "one after the other"
    assert "vm1 runs on here. Make sure that it does not run at 127.0.0.1:1" in said
    with pytest.raises(MigdError, match="nothing to resolve, the guest is running"):
        await daemon.resolve("vm1", Keeper.DESTINATION)
    assert guest.calls == ["resume"]


async def test_resolve_leaves_a_session_alone_that_still_acts(daemon: Restarted) -> None:
    daemon.departed.append(record(Mark.GO))
    daemon.registry.guests["vm1"] = Returned(GuestState.PAUSED)
    acting: Any = asyncio.ensure_future(asyncio.sleep(60))
    daemon.departures._running[MIGRATION] = acting
    with pytest.raises(MigdError, match="its migration still goes on"):
        await daemon.resolve("vm1", Keeper.SOURCE)
    acting.cancel()


@dataclass
class Doubtful:
    """A session that does not know, as ``Departures`` has it."""

    migration: str = MIGRATION
    state: SourceState = SourceState.UNKNOWN
    ended: bool = False
    told: list[tuple[Keeper, str]] = field(default_factory=list)

    async def overtaken(self, keeper: Keeper, said: str) -> None:
        self.told.append((keeper, said))


@pytest.mark.parametrize("keeper", [Keeper.SOURCE, Keeper.DESTINATION])
async def test_a_session_that_does_not_know_leaves_its_guest_to_whoever_finds_it_back(
    daemon: Restarted, keeper: Keeper
) -> None:
    """Its guest had lost its connection and has another: what the session holds is not the guest any more."""
    daemon.departed.append(record(Mark.GO))
    session: Any = Doubtful()
    before: Any = Returned(GuestState.PAUSED, gone=True)
    daemon.departures.sessions[MIGRATION] = session
    daemon.departures._leaving[MIGRATION] = before
    guest = Returned(GuestState.PAUSED)
    async with asyncio.TaskGroup() as tasks:
        daemon.departures.own(tasks)
        assert await daemon.receive(guest) == []
        assert session.told == []
        assert "forced by the operator" in await daemon.resolve("vm1", keeper)
    assert guest.calls == ["resume" if keeper is Keeper.SOURCE else "release"]
    ((told, said),) = session.told
    assert told is keeper
    assert "forced by the operator" in said


# -- where it was to arrive ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "told", "then"),
    [
        (None, ["discard"], Mark.ABORTED),
        (Mark.READY, ["discard"], Mark.ABORTED),
        (Mark.STARTED, ["start"], Mark.STARTED),
        (Mark.ABORTED, ["discard"], Mark.ABORTED),
        (Mark.VERIFIED, ["start"], Mark.VERIFIED),
        (Mark.CONDEMNED, [], Mark.CONDEMNED),
    ],
)
async def test_an_incoming_guest(daemon: Restarted, last: Mark | None, told: list[str], then: Mark) -> None:
    if last is not None:
        daemon.arrived.append(record(last))
    assert await daemon.receive(Returned(GuestState.INCOMING)) == told
    assert daemon.last(daemon.arrived) is then


async def test_an_incoming_guest_goes_even_if_the_journal_has_no_room(
    daemon: Restarted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would keep its name, and its memory, for as long as this daemon runs."""
    daemon.arrived.append(record(Mark.READY))

    def full(_record: Record) -> None:
        raise ResourceError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.arrived, "append", full)
        assert await daemon.receive(Returned(GuestState.INCOMING)) == ["discard"]
    assert isinstance(await daemon.go(), Aborted)
    assert daemon.last(daemon.arrived) is Mark.ABORTED


@pytest.mark.parametrize(
    ("last", "told", "then"),
    [
        (Mark.STARTED, [], Mark.CONDEMNED),
        (Mark.CONDEMNED, [], Mark.CONDEMNED),
        (Mark.VERIFIED, ["resume"], Mark.VERIFIED),
        (Mark.ABORTED, ["discard"], Mark.ABORTED),
    ],
)
async def test_a_guest_paused_where_it_has_run(
    daemon: Restarted, last: Mark, told: list[str], then: Mark
) -> None:
    """The daemon died between its pause and CONDEMNED, or between the operator's word and what follows it."""
    daemon.arrived.append(record(last))
    assert await daemon.receive(Returned(GuestState.PAUSED)) == told
    assert daemon.last(daemon.arrived) is then


@pytest.mark.parametrize("last", [None, *Mark])
async def test_a_running_guest_waits_for_its_verdict_if_none_is_in_the_journal(
    daemon: Restarted, last: Mark | None
) -> None:
    daemon.arrived.append(record(Mark.STARTED, guest="another", migration="c" * 32))
    if last is not None:
        daemon.arrived.append(record(last))
    told = await daemon.receive(Returned(GuestState.RUNNING, migration=""))
    assert told == ["await_verdict", *(() if last is Mark.STARTED else ("judged",))]


# -- GO after a restart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [Mark.STARTED, Mark.VERIFIED, Mark.CONDEMNED])
@pytest.mark.parametrize("state", [GuestState.RUNNING, GuestState.PAUSED])
async def test_go_for_a_guest_that_was_started(daemon: Restarted, last: Mark, state: GuestState) -> None:
    """STARTED, and only where it is in the journal by itself is the guest told anything."""
    daemon.arrived.append(record(last))
    guest = Returned(state, migration="" if state is GuestState.RUNNING else MIGRATION)
    if state is GuestState.PAUSED:
        await daemon.receive(guest)
    else:
        daemon.registry.guests["vm1"] = guest
    before = list(guest.calls)
    for _ in range(2):
        assert isinstance(await daemon.go(), Started)
    runs = last is Mark.STARTED and state is GuestState.RUNNING
    assert guest.calls == [*before, *(["start"] if runs else [])]


@pytest.mark.parametrize("last", [None, Mark.READY, Mark.ABORTED])
async def test_go_for_a_guest_that_was_not(daemon: Restarted, last: Mark | None) -> None:
    if last is not None:
        daemon.arrived.append(record(last))
    assert isinstance(await daemon.go(), Aborted)
    assert daemon.last(daemon.arrived) is Mark.ABORTED


async def test_go_for_a_guest_that_has_not_come_back_is_not_answered_until_it_has(daemon: Restarted) -> None:
    daemon.arrived.append(record(Mark.STARTED))
    with pytest.raises(GuestError, match="its guest has not come back"):
        await daemon.go()
    daemon.registry.guests["vm1"] = Returned(GuestState.INCOMING)
    assert isinstance(await daemon.go(), Started)


async def test_a_guest_of_the_same_name_is_not_the_one_that_was_condemned(daemon: Restarted) -> None:
    daemon.arrived.append(record(Mark.CONDEMNED))
    other = Returned(GuestState.RUNNING, migration="")
    daemon.registry.guests["vm1"] = other
    handover = await daemon.reception.handover(MIGRATION)
    assert handover is not None
    assert isinstance(await handover.resolve(Keeper.SOURCE, "the operator"), Aborted)
    assert other.calls == []


# -- the operator at the destination -------------------------------------------------------------------------


async def test_what_the_operator_is_told_of_a_condemned_guest(daemon: Restarted) -> None:
    daemon.arrived.append(record(Mark.CONDEMNED))
    await daemon.receive(Returned(GuestState.PAUSED))
    for target in ("vm1", MIGRATION[:8]):
        with pytest.raises(VerificationError, match=r"paused here.*\(why\).*--force-dest.*--force-source"):
            await daemon.resolve(target)
    assert daemon.last(daemon.arrived) is Mark.CONDEMNED


@pytest.mark.parametrize(
    ("keeper", "mark", "told", "said"),
    [
        (Keeper.SOURCE, Mark.ABORTED, ["discard"], "given up here; `migd resolve vm1` at its source"),
        (
            Keeper.DESTINATION,
            Mark.VERIFIED,
            ["resume", "judged"],
            "runs on here, with pages that may be wrong",
        ),
    ],
)
async def test_the_operators_word_about_a_condemned_guest(
    daemon: Restarted, keeper: Keeper, mark: Mark, told: list[str], said: str
) -> None:
    daemon.arrived.append(record(Mark.CONDEMNED))
    guest = Returned(GuestState.PAUSED)
    await daemon.receive(guest)
    assert said in await daemon.resolve("vm1", keeper)
    assert daemon.last(daemon.arrived) is mark
    assert guest.calls == told
    answer = await daemon.go()
    assert isinstance(answer, Aborted if keeper is Keeper.SOURCE else Started)


async def test_a_started_guest_whose_process_is_gone_is_given_up(daemon: Restarted) -> None:
    """Nothing brings it back; until the operator says so it might still come."""
    daemon.arrived.append(record(Mark.STARTED))
    with pytest.raises(OutcomeUnknown, match=r"its process is gone.*--force-source"):
        await daemon.resolve("vm1")
    with pytest.raises(Refused, match="only the source can run it"):
        await daemon.resolve(MIGRATION, Keeper.DESTINATION)
    assert "given up here" in await daemon.resolve(MIGRATION[:6], Keeper.SOURCE)
    assert isinstance(await daemon.go(), Aborted)


async def test_a_started_guest_that_only_lost_its_connection_is_not_given_up(daemon: Restarted) -> None:
    """G2: it attaches again 0.2 s later, and runs; its source would run it, too."""
    daemon.arrived.append(record(Mark.STARTED))
    giving_up = asyncio.ensure_future(daemon.resolve(MIGRATION, Keeper.SOURCE))
    await asyncio.sleep(0.1)
    await daemon.receive(Returned(GuestState.RUNNING))
    with pytest.raises(Refused, match="has come back, and runs here"):
        await giving_up
    assert isinstance(await daemon.go(), Started)


async def test_a_guest_that_comes_back_is_not_given_up_as_lost(daemon: Restarted) -> None:
    daemon.arrived.append(record(Mark.STARTED))
    await daemon.receive(Returned(GuestState.INCOMING))
    with pytest.raises(MigdError, match="nothing to resolve, the guest is running"):
        await daemon.resolve("vm1", Keeper.SOURCE)
    assert isinstance(await daemon.go(), Started)
