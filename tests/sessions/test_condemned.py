"""A bad late verdict: durable on both sides, told until it is acted on; only the operator ends it (G4)."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migd.errors import GuestError, OutcomeUnknown, Refused, VerificationError
from migd.limits import Limits
from migd.migration.journal import Journal, Mark, Record
from migd.migration.ports import PauseReport
from migd.migration.state import DestinationState, SourceState
from migd.source.attempt import SourceOptions, Verify
from migd.source.peer import DestinationPeer
from migd.source.resolution import Resolution
from migd.transport.link import Dialogue
from migd.transport.tcp import TcpConnector
from migd.wire.messages import Aborted, Message, Started, Verdict
from migd.wire.protocol import Keeper
from tests.support.scripted_guest import MIGRATION, ArrivedGuest, Joined, ScriptedGuest, joined

S, D = SourceState, DestinationState
LATE = SourceOptions(verify=Verify.LATE)
NOWHERE = "127.0.0.1:1"
"""Nothing listens there."""
LIMITS = Limits(go_s=1.0, begin_s=2.0, check_s=2.0, verdict_s=2.0, connect_s=0.5)


@dataclass
class Play:
    """Two sides, and what a restarted source daemon would do."""

    sides: Joined

    @property
    def guest(self) -> ScriptedGuest:
        return self.sides.guest

    @property
    def arrived(self) -> ArrivedGuest:
        return self.sides.arrived

    def at_source(self) -> list[Mark]:
        return [record.mark for record in Journal(self.sides.source_journal).records(MIGRATION)]

    def at_destination(self) -> list[Mark]:
        return [record.mark for record in Journal(self.sides.destination_journal).records(MIGRATION)]

    def last(self) -> Record:
        found = Journal(self.sides.source_journal).last(MIGRATION)
        assert found is not None
        return found

    async def condemn(self) -> None:
        """Move the guest, with a write behind the log's back, found when it runs there."""
        self.sides.at_source.at[S.PAUSING] = lambda: self.guest.smuggle(17)
        result = await self.sides.migrate(LATE)
        assert (result.exit_code, result.states[-1]) == (5, S.FAILED)

    async def resolve(
        self, keeper: Keeper | None = None, *, connector: type[TcpConnector] = TcpConnector
    ) -> str:
        """`migd resolve` at a source whose daemon remembers nothing."""
        sides = self.sides
        there = connector(sides.address, sides.clock, sides.limits)
        peer = DestinationPeer(there, MIGRATION, sides.clock, sides.limits)
        journal = Journal(sides.source_journal)
        return await Resolution(self.last(), self.guest, peer, journal, sides.worker).run(keeper)

    async def decide(self, keeper: Keeper) -> Started | Aborted:
        """`migd resolve` at the destination."""
        handover = await self.sides.reception.handover(MIGRATION)
        assert handover is not None
        return await handover.resolve(keeper, "decided by the operator")

    def cut(self) -> None:
        """Nobody listens at the destination any more."""
        self.sides.address = NOWHERE

    def lose_destination(self) -> None:
        """The same for the session that goes on."""
        assert self.sides.peer is not None
        self.sides.peer.control.close()
        self.sides.peer._connector = TcpConnector(NOWHERE, self.sides.clock, self.sides.limits)

    def moves(self) -> list[str]:
        """What the guest at the source was told, from the pause on."""
        return [call for call in self.guest.calls if call in ("pause", "resume", "release")]


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    async with joined(ScriptedGuest(), tmp_path, LIMITS) as sides:
        yield Play(sides)


# -- durable, and told again ------------------------------------------------------------------------------


async def test_a_bad_verdict_is_in_both_journals_and_the_guest_is_paused_on_both_sides(play: Play) -> None:
    await play.condemn()
    assert play.at_source() == [Mark.GO, Mark.STARTED, Mark.CONDEMNED]
    assert play.at_destination() == [Mark.READY, Mark.STARTED, Mark.CONDEMNED]
    assert play.last().detail == "late: 1 pages differ"
    assert play.moves() == ["pause"]
    assert play.arrived.calls == ["load", "start", "pause"]


async def test_it_is_durable_at_the_source_before_it_is_told(play: Play) -> None:
    seen: list[list[Mark]] = []
    play.sides.at_destination.at[D.FAILED] = lambda: seen.append(play.at_source())
    await play.condemn()
    assert seen == [[Mark.GO, Mark.STARTED, Mark.CONDEMNED]]


async def test_the_destination_has_paused_its_guest_before_that_is_durable(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Mark]] = []
    pause = ArrivedGuest.pause

    async def look(guest: ArrivedGuest, migration: str) -> PauseReport:
        seen.append(play.at_destination())
        return await pause(guest, migration)

    monkeypatch.setattr(ArrivedGuest, "pause", look)
    await play.condemn()
    assert seen == [[Mark.READY, Mark.STARTED]]


async def test_a_verdict_whose_connection_is_lost_is_told_over_another(play: Play) -> None:
    def lose() -> None:
        assert play.sides.peer is not None
        play.sides.peer.control.close()

    play.sides.at_source.at[S.VERIFYING] = lose
    await play.condemn()
    assert play.sides.session is not None
    assert "the destination has paused its guest" in play.sides.session.result.error
    assert play.at_destination()[-1] is Mark.CONDEMNED


async def test_a_guest_that_does_not_pause_at_once_is_told_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its acknowledgement nothing is durable, and nobody is told that it is paused."""
    pause = ArrivedGuest.pause
    refusals = iter(["busy", "busy"])

    async def slow(guest: ArrivedGuest, migration: str) -> PauseReport:
        for refusal in refusals:
            raise GuestError(refusal)
        return await pause(guest, migration)

    monkeypatch.setattr(ArrivedGuest, "pause", slow)
    await play.condemn()
    assert play.at_destination() == [Mark.READY, Mark.STARTED, Mark.CONDEMNED]
    assert not play.arrived.running


async def test_a_destination_that_cannot_write_it_down_does_not_say_that_it_has(play: Play) -> None:
    play.sides.at_destination.at[D.RUNNING] = lambda: shutil.rmtree(play.sides.destination_journal)
    await play.condemn()
    assert play.sides.session is not None
    assert "could NOT be told to pause its guest" in play.sides.session.result.error
    assert not play.arrived.running, "it is paused all the same"
    assert play.sides.arrival.state is D.FAILED


async def test_a_destination_that_cannot_be_reached_is_told_by_resolve(play: Play) -> None:
    """The source knows, keeps its guest, and says so; the other one runs on until it is told."""
    play.sides.at_source.at[S.VERIFYING] = play.lose_destination
    play.sides.limits = Limits(go_s=2.0, begin_s=2.0, check_s=2.0, verdict_s=0.5, connect_s=0.2)
    address = play.sides.address
    await play.condemn()
    assert play.sides.session is not None
    assert "could NOT be told" in play.sides.session.result.error
    assert "`migd resolve` tells it again" in play.sides.session.result.error
    assert (play.at_source()[-1], play.at_destination()[-1]) == (Mark.CONDEMNED, Mark.STARTED)
    assert play.arrived.running
    play.cut()
    with pytest.raises(VerificationError, match="cannot be told to pause it"):
        await play.resolve()
    assert play.arrived.running
    play.sides.address = address
    for _ in range(2):  # idempotent
        with pytest.raises(VerificationError, match=r"paused here and at .*--force-source"):
            await play.resolve()
        assert play.at_destination() == [Mark.READY, Mark.STARTED, Mark.CONDEMNED]
        assert play.arrived.calls == ["load", "start", "pause"]
    assert play.moves() == ["pause"]


async def test_a_late_bad_verdict_counts_although_the_session_there_is_over(play: Play) -> None:
    """``verdict_s`` bounds how long a guest waits, not how long its source may condemn it."""
    play.sides.at_source.at[S.VERIFYING] = play.lose_destination
    play.sides.limits = Limits(go_s=2.0, begin_s=2.0, check_s=2.0, verdict_s=0.1, connect_s=0.2)
    await play.condemn()
    assert play.sides.arrival.state is D.COMPLETED
    with pytest.raises(VerificationError):
        await play.resolve()
    assert play.at_destination()[-1] is Mark.CONDEMNED
    assert "guest paused" in play.sides.arrival.error
    assert not play.arrived.running


async def test_a_source_that_forgot_its_verdict_does_not_overrule_it(play: Play) -> None:
    """Its journal was full: it comes back with STARTED, asks, and may not let go of the right copy."""
    await play.condemn()
    path = play.sides.source_journal / f"{MIGRATION}.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert play.at_source()[-1] is Mark.STARTED
    with pytest.raises(VerificationError, match="paused here by a bad verdict"):
        await play.resolve()
    assert play.at_source()[-1] is Mark.CONDEMNED
    assert play.moves() == ["pause"]
    assert not play.arrived.running


class LosesTheAnswer(TcpConnector):
    """Cuts each connection right behind a verdict."""

    async def converse(self, migration: str) -> Dialogue:
        conversation = await super().converse(migration)
        send = conversation.send

        async def send_and_cut(message: Message) -> None:
            await send(message)
            if isinstance(message, Verdict):
                conversation.close()

        conversation.send = send_and_cut  # type: ignore[method-assign]
        return conversation


async def test_nor_does_it_let_go_before_its_verdict_was_answered(play: Play) -> None:
    """Its bad verdict is in nobody's journal here, and may have been heard there: three faults at once."""
    await play.condemn()
    path = play.sides.source_journal / f"{MIGRATION}.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(OutcomeUnknown, match=r"did not say whether it is condemned.*`migd resolve`"):
        await play.resolve(connector=LosesTheAnswer)
    assert play.at_source()[-1] is Mark.STARTED
    assert play.moves() == ["pause"]
    with pytest.raises(VerificationError, match="paused here by a bad verdict"):
        await play.resolve()


async def test_what_was_verified_before_go_is_let_go_of_without_an_answer(play: Play) -> None:
    await play.sides.migrate(SourceOptions(verify=Verify.STRICT))
    path = play.sides.source_journal / f"{MIGRATION}.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert "released here (strict: ok" in await play.resolve(connector=LosesTheAnswer)


# -- the operator, at the source ----------------------------------------------------------------------------


async def test_force_dest_has_it_run_on_there_and_lets_go_here(play: Play) -> None:
    await play.condemn()
    assert "released here (forced by the operator, although late: 1" in await play.resolve(Keeper.DESTINATION)
    assert (play.at_source()[-1], play.at_destination()[-1]) == (Mark.RELEASED, Mark.VERIFIED)
    assert play.moves() == ["pause", "release"]
    assert play.arrived.calls == ["load", "start", "pause", "resume"]


async def test_force_source_has_the_destination_give_it_up_first(play: Play) -> None:
    seen: list[list[Mark]] = []
    await play.condemn()
    resume = play.guest.resume

    async def look() -> None:
        seen.append(play.at_destination())
        await resume()

    play.guest.resume = look  # type: ignore[method-assign]
    assert "the guest runs on here" in await play.resolve(Keeper.SOURCE)
    assert seen == [[Mark.READY, Mark.STARTED, Mark.CONDEMNED, Mark.ABORTED]]
    assert play.at_source()[-1] is Mark.ABORTED
    assert play.arrived.calls[-1] == "discard"
    assert play.guest.running


@pytest.mark.parametrize(
    ("keeper", "mark", "moves", "warning"),
    [
        (Keeper.SOURCE, Mark.ABORTED, ["pause", "resume"], "does not run at 127.0.0.1:1: there would be two"),
        (
            Keeper.DESTINATION,
            Mark.RELEASED,
            ["pause", "release"],
            "it runs at 127.0.0.1:1: there would be none",
        ),
    ],
)
async def test_force_goes_on_alone_where_nobody_answers_and_says_what_must_be_true(
    play: Play, keeper: Keeper, mark: Mark, moves: list[str], warning: str
) -> None:
    await play.condemn()
    play.cut()
    path = Journal(play.sides.source_journal)
    path.append(Record(migration=MIGRATION, mark=Mark.CONDEMNED, guest="scripted", peer=NOWHERE, detail="d"))
    assert warning in await play.resolve(keeper)
    assert play.at_source()[-1] is mark
    assert play.moves() == moves


# -- the operator, at the destination -----------------------------------------------------------------------


async def test_given_up_at_the_destination_the_source_only_has_to_ask(play: Play) -> None:
    await play.condemn()
    assert isinstance(await play.decide(Keeper.SOURCE), Aborted)
    assert play.at_destination()[-1] is Mark.ABORTED
    assert play.arrived.calls[-1] == "discard"
    assert "decided by the operator" in await play.resolve()
    assert play.guest.running
    assert isinstance(await play.decide(Keeper.SOURCE), Aborted), "again is the same"
    with pytest.raises(Refused, match="never started here"):
        await play.decide(Keeper.DESTINATION)


async def test_run_on_at_the_destination_the_source_does_not_pause_it_again(play: Play) -> None:
    await play.condemn()
    assert isinstance(await play.decide(Keeper.DESTINATION), Started)
    assert play.at_destination()[-1] is Mark.VERIFIED
    with pytest.raises(Refused, match=r"runs on here, as was decided.*--force-dest"):
        await play.resolve()
    with pytest.raises(Refused, match="runs on here, as was decided"):
        await play.resolve(Keeper.SOURCE)
    assert play.moves() == ["pause"]
    assert play.arrived.running
    await play.resolve(Keeper.DESTINATION)
    assert play.moves() == ["pause", "release"]
    assert play.arrived.running
    with pytest.raises(Refused, match="is not paused: the source cannot have it back"):
        await play.decide(Keeper.SOURCE)


async def test_what_the_destination_knows_is_done_and_a_force_that_contradicts_it_refused(
    play: Play,
) -> None:
    """The source was restarted after GO; the guest runs there, as it says."""
    await play.sides.migrate()
    journal = Journal(play.sides.source_journal)
    journal.append(Record(migration=MIGRATION, mark=Mark.GO, guest="scripted", peer=play.sides.address))
    with pytest.raises(Refused, match=r"--force-source is refused: the guest runs at .*: released here"):
        await play.resolve(Keeper.SOURCE)
    assert play.at_source()[-1] is Mark.RELEASED
    assert play.arrived.running
    assert "resume" not in play.moves()


# -- an outcome that a session does not know ----------------------------------------------------------------


async def unknown(play: Play) -> None:
    """The guest dies there between STARTED in the journal and its start."""
    play.sides.at_destination.at[D.STARTING] = lambda: play.arrived.die()
    result = await play.sides.migrate()
    assert (result.outcome, result.exit_code) == ("unknown", 4)
    assert "`migd resolve --force-source`" in result.error


async def test_a_guest_that_was_lost_at_its_start_is_given_up_and_runs_on_here(play: Play) -> None:
    await unknown(play)
    assert play.sides.session is not None
    result = await play.sides.session.force(Keeper.SOURCE)
    assert (result.outcome, result.states[-3:]) == ("failed", ["unknown", "aborting", "failed"])
    assert "the guest runs on here" in result.error
    assert (play.at_source()[-1], play.at_destination()[-1]) == (Mark.ABORTED, Mark.ABORTED)
    assert play.guest.running


async def test_the_last_copy_of_a_guest_is_not_ended_by_force(play: Play) -> None:
    await unknown(play)
    assert play.sides.session is not None
    result = await play.sides.session.force(Keeper.DESTINATION)
    assert (result.outcome, result.exit_code, result.states[-1]) == ("unknown", 3, "unknown")
    assert "--force-dest would lose the guest" in result.error
    assert play.moves() == ["pause"]
    assert (await play.sides.session.force(Keeper.SOURCE)).outcome == "failed"


@pytest.mark.parametrize(
    ("keeper", "mark", "states", "moves"),
    [
        (Keeper.SOURCE, Mark.ABORTED, ["unknown", "aborting", "failed"], ["pause", "resume"]),
        (Keeper.DESTINATION, Mark.RELEASED, ["going", "verifying", "failed"], ["pause", "release"]),
    ],
)
async def test_a_session_whose_destination_is_gone_does_what_the_operator_says(
    play: Play, keeper: Keeper, mark: Mark, states: list[str], moves: list[str]
) -> None:
    play.sides.at_destination.at[D.STARTING] = play.lose_destination
    result = await play.sides.migrate()
    assert result.outcome == "unknown"
    assert play.sides.session is not None
    result = await play.sides.session.force(keeper)
    assert (result.outcome, result.states[-3:]) == ("failed", states)
    assert "forced by the operator" in result.error
    assert play.at_source()[-1] is mark
    assert play.moves() == moves
    assert play.sides.session.ended


# -- what GO's record says ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "said"),
    [(Verify.STRICT, "strict: ok"), (Verify.LATE, "tracking not verified: the source daemon was restarted")],
)
async def test_a_restart_in_the_hand_over_knows_what_was_verified_before(
    play: Play, verify: Verify, said: str
) -> None:
    await play.sides.migrate(SourceOptions(verify=verify))
    path = play.sides.source_journal / f"{MIGRATION}.jsonl"
    go, started, released = path.read_bytes().splitlines(keepends=True)
    for kept in (go, go + started):
        path.write_bytes(kept)
        assert f"released here ({said}" in await play.resolve()
        assert play.last().detail.startswith(said)
    assert released


async def test_an_outcome_that_nobody_knows_stays_so_without_an_answer(play: Play) -> None:
    await play.sides.migrate()
    journal = Journal(play.sides.source_journal)
    journal.append(Record(migration=MIGRATION, mark=Mark.GO, guest="scripted", peer=NOWHERE))
    play.cut()
    with pytest.raises(OutcomeUnknown, match=r"GO was sent to 127\.0\.0\.1:1 and no answer came within 1 s"):
        await play.resolve()
    assert play.at_source()[-1] is Mark.GO
