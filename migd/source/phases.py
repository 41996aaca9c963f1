"""Phases: a migration at its source up to READY, one method a phase, in the order of ``run``."""

from __future__ import annotations

import logging

from migd.errors import GuestError, MigdError, VerificationError
from migd.migration.convergence import Decision, Standing, decide, out_of_reach
from migd.migration.state import SourceState
from migd.migration.stats import Iteration
from migd.ram.bitmap import PageBitmap
from migd.ram.block import PAGE_BYTES
from migd.ram.contract import FreeContract
from migd.source.attempt import Attempt, Compression, Verify
from migd.source.batcher import BATCH_PAGES
from migd.source.hinting import Hinting
from migd.source.precopy import Precopy
from migd.source.tracking import Tracking
from migd.tasks import together
from migd.wire import handshake, messages
from migd.wire.codec import CodecChoice
from migd.wire.protocol import Codec, Feature

log = logging.getLogger(__name__)

_STRICT_S_PER_BYTE = 0.35 / (1 << 30)
"""Strict verification costs 0.15 to 0.35 s for each GiB that it reads (docs/safety.md): the worst of it."""

_HOLES_WORTH = 4
"""Holes are looked for if at least one page in so many is to send."""

_PROMPT_S = 0.005
"""Whoever answers sooner may leave no page to look at for holes; an agent takes ten times that."""

_FIXED = {Compression.LZ4: Codec.LZ4, Compression.NONE: Codec.NONE}


class Phases:
    """Runs the phases; afterwards, or when one raised, its attributes say how far it got."""

    def __init__(self, attempt: Attempt, hinting: Hinting) -> None:
        self._attempt = attempt
        self._hinting = hinting
        self._guest = attempt.guest
        self._ledger = attempt.ledger
        self._peer = attempt.peer
        self._options = attempt.options
        self._result = attempt.result
        self._precopy: Precopy | None = None
        self._pause_began_s = 0.0
        self._paused_s = 0.0
        self.tracking = Tracking(attempt)
        self.device_state = b""
        self._saved: bytes | None = None
        self._finish: messages.Finish | None = None
        """What will announce the device state that was sent."""
        self.paused = False
        """The guest was asked to pause, whether it has answered or not."""
        self._strict = False
        self.verified_strictly = False

    async def run(self) -> None:
        """Everything up to READY. Raises what ends the attempt; the caller watches peer and guest."""
        accept = await self._connect()
        if self._options.live:
            await self._arm()
        self._precopy = self._new_precopy(accept)
        if self._options.live:
            await self._bulk()
            await self._iterate()
        await self._await_prepared()
        await self._pause()
        await self._switch_over()
        await self._await_ready()

    @property
    def precopy(self) -> Precopy:
        """What moves pages, from the first connection on."""
        assert self._precopy is not None
        return self._precopy

    @property
    def iterations(self) -> list[Iteration]:
        """The iterations so far, the present one last."""
        return self._precopy.iterations if self._precopy is not None else []

    @property
    def wire_bytes(self) -> int:
        """Sent on data streams so far."""
        return self._precopy.wire_bytes if self._precopy is not None else 0

    def account(self) -> None:
        """What went over the wire, into the result."""
        if self._precopy is not None:
            self._result.iterations = self._precopy.iterations
            self._result.wire_bytes = self._precopy.wire_bytes + len(self.device_state)
            self._result.page_bytes = self._precopy.page_bytes
            self._result.payload_bytes = self._precopy.payload_bytes

    def forget(self) -> None:
        """Let go of the buffers and of 16 bytes for each page: the session may be remembered for long."""
        self._precopy = None
        self.tracking.forget()
        self.device_state, self._saved = b"", None

    async def _connect(self) -> messages.Accept:
        shapes = self._guest.ram.shapes
        return await self._peer.open(
            handshake.hello(self._attempt.migration, self._guest.name, shapes, self._options.streams)
        )

    def _new_precopy(self, accept: messages.Accept) -> Precopy:
        """Once it is known which log there is: what is sent is remembered in its way."""
        lz4 = Feature.LZ4 in accept.features
        fixed = _FIXED.get(self._options.compression) if lz4 else Codec.NONE
        return Precopy(
            self._attempt.migration,
            self._guest.ram,
            self._ledger,
            self._peer.links,
            self._attempt.worker,
            self._attempt.clock,
            self._peer.bandwidth,
            self._attempt.room,
            self.tracking.image.digests,
            CodecChoice(fixed),
            min(BATCH_PAGES, accept.max_frame_pages),
        )

    async def _arm(self) -> None:
        """R1: the log first, then the ledger; holes and hints come after both (R20)."""
        await self._attempt.enter(SourceState.ARMING)
        await self.tracking.arm()
        sees_writes = self.tracking.sees_writes
        contract = await self._hinting.contract(sees_writes=sees_writes, missing=self.tracking.missing)
        self._ledger.arm(contract, sees_writes=sees_writes)

    async def _bulk(self) -> None:
        await self._attempt.enter(SourceState.BULK)
        await self._hinting.request()
        await self._hinting.ahead(_PROMPT_S)
        holes, _ = await together(self._find_holes(), self._hinting.ahead())
        assert holes is not None
        self._ledger.mark_holes(holes)
        await self._pass(live=True)

    async def _find_holes(self) -> PageBitmap:
        """Among the pages that are to send by now, unless hints have spared most of RAM already.

        What a guest owns it has touched, and finding out costs 10 ms for each GiB that was.
        """
        to_send = self._ledger.to_send.copy()
        if to_send.count() * _HOLES_WORTH < self._ledger.pages:
            return PageBitmap(self._ledger.pages)
        return to_send - await self._attempt.worker.run(self._guest.ram.touched, to_send)

    async def _iterate(self) -> None:
        """Until what is left fits the downtime limit, or a budget is used up."""
        while (decision := self._decide()) is not Decision.SWITCHOVER:
            if decision is Decision.CANCEL:
                raise MigdError(
                    f"{self._obstacle()}; raise the downtime limit, or let it be forced "
                    f'(on_exhausted = "force")'
                )
            if decision is Decision.FORCE:
                log.warning("%s: pausing all the same: %s", self._attempt.migration, self._obstacle())
                return
            if self._attempt.state is not SourceState.ITERATING:
                await self._attempt.enter(SourceState.ITERATING)
            if self._hinting.pay(self._standing()):
                await self._hinting.request()
                await self._hinting.ahead()
            await self._pass(live=True)

    def _obstacle(self) -> str:
        """Why the guest cannot be paused within the limit."""
        if out_of_reach(self._attempt.policy, self._standing()):
            doing = "comparing the paused guest's memory" if self.tracking.cost_s else "saving and loading it"
            return (
                f"{doing} takes {self._fixed_s:.2g} s by itself, and the downtime limit is "
                f"{self._attempt.policy.downtime_limit_s:g} s"
            )
        return (
            f"the guest writes faster than memory moves: {self._ledger.to_send.count()} pages left "
            f"after {len(self.precopy.iterations)} iterations"
        )

    async def _await_prepared(self) -> None:
        """The destination's guest process takes 0.1 s to start; waiting for it must not be downtime."""
        began = self._attempt.clock.now()
        await self._peer.expect(messages.Prepared, self._attempt.limits.begin_s)
        waited_s = self._attempt.clock.now() - began
        if self.tracking.armed and waited_s >= self.tracking.cost_s:  # else looking again takes longer
            await self.tracking.harvest()
            await self._iterate()

    async def _pause(self) -> None:
        """R13: acknowledged at a safe point, with the device state; then the final harvest."""
        await self._attempt.enter(SourceState.PAUSING)
        self._pause_began_s = self._attempt.clock.now()
        self.paused = True
        report = await self._guest.pause(self._attempt.migration)
        self._paused_s = self._attempt.clock.now()
        self._result.downtime.pause_s = self._paused_s - self._pause_began_s
        self._saved = report.device_state
        if not self.tracking.sees_writes:
            # Comparing is the last look at RAM, and saving the state may have changed it.
            await self._save()
        if not self.tracking.armed:
            # Paused from the first byte on: nothing writes, so there is nothing to track.
            self._ledger.arm(FreeContract.NONE if report.free is None else await self._hinting.contract())
            self._result.dirty_log = "none (paused)"
        else:
            await self.tracking.harvest()
        self._settle(report.free)
        if not self.tracking.armed:
            self._ledger.mark_holes(await self._find_holes())

    def _settle(self, free: PageBitmap | None) -> None:
        """R14; GuestError if the bitmap is missing that the compare log was promised (R19)."""
        self.tracking.paused(free)
        if free is not None:
            self._ledger.settle(free, trim=self._options.hints)
        elif self._ledger.skipped and not self.tracking.sees_writes:
            raise GuestError("the guest did not say which pages are free at the pause, as it was to")
        else:
            self._ledger.close_epoch()

    async def _switch_over(self) -> None:
        """The rest of RAM, device state, one more harvest (R13), END and FINISH."""
        await self._attempt.enter(SourceState.SWITCHOVER)
        await together(self._save(), self._send_rest())
        await together(self._send_state(), self._send_late())
        await self._verify_compared()
        self._result.downtime.send_s = self._attempt.clock.now() - self._paused_s
        self._decide_verification()
        if self._verification_cost_s > self._attempt.limits.go_s / 4:
            # The destination waits for GO no longer than go_s after READY: it must not be ready before us.
            await self._verify_strictly()
        await self.precopy.end()
        assert self._finish is not None
        await self._peer.control.send(self._finish)

    async def _send_state(self) -> None:
        self._finish = await self._peer.send_state(self.device_state)

    async def _save(self) -> None:
        """The device state, unless the pause brought it: asked for while the rest of RAM is sent.

        It is in the same order to the guest as R13 has it: whatever saving does to RAM is harvested behind.
        """
        if self._saved is None:
            self._saved = await self._guest.save()
        self.device_state = self._saved

    async def _send_late(self) -> None:
        """R13: what was written although the guest is paused, once; a second time ends the attempt.

        Not with the compare log: it looked at all of RAM after the device state was saved, and a second look
        would double the pause. A writer that begins after that goes unnoticed.
        """
        if not self.tracking.armed or not self.tracking.sees_writes:
            return
        if late_pages := await self.tracking.harvest():
            self._result.late_dirty_pages = late_pages
            log.warning("%s: %d pages dirty after the pause", self._attempt.migration, late_pages)
            await self._send_rest()
            if await self.tracking.harvest():
                raise GuestError("something writes to the RAM of the paused guest")

    async def _send_rest(self) -> None:
        while self._ledger.to_send or self._ledger.free_pending:
            self._attempt.iterated(await self.precopy.iterate(live=False))

    @property
    def _verification_cost_s(self) -> float:
        compared_pages = self._ledger.sent.count() + self._ledger.zero.count()
        return compared_pages * PAGE_BYTES * _STRICT_S_PER_BYTE

    def _decide_verification(self) -> None:
        """AUTO is strict while that fits what is left of the downtime limit; a paused guest has none."""
        verify = self._options.verify
        spent_s = self._attempt.clock.now() - self._pause_began_s
        limit_s = self._attempt.policy.downtime_limit_s
        fits = not self._options.live or self._verification_cost_s + spent_s <= limit_s
        self._strict = verify is Verify.STRICT or (verify is Verify.AUTO and fits)

    async def _verify_strictly(self) -> None:
        """Once, if it was decided: VerificationError if a page is not what was last sent of it."""
        if not self._strict or self.verified_strictly:
            return
        began = self._attempt.clock.now()
        untracked = await self.tracking.untracked()
        self._result.downtime.verify_s = self._attempt.clock.now() - began
        self._verified("strict: ok", untracked.count())

    async def _verify_compared(self) -> None:
        """With the compare log, the rest of a strict verification, whatever was asked for.

        Its final harvest was the most of it, and what differed has been sent. That, and what it did not look
        at, is compared now: it costs 1 s for each GiB sent in the pause.
        """
        if not self.tracking.sees_writes:
            self._verified("strict: ok (compare log)", (await self.tracking.untracked()).count())

    def _verified(self, verdict: str, untracked: int) -> None:
        """VerificationError, and not the verdict, if there is an untracked page."""
        if untracked:
            self._result.verification = f"strict: {untracked} pages differ"
            raise VerificationError(
                f"{untracked} pages changed untracked: nothing was started, the attempt is void"
            )
        self._result.verification = verdict
        self.verified_strictly = True

    async def _await_ready(self) -> None:
        """Strict verification here, while the destination drains, verifies and loads."""
        await self._attempt.enter(SourceState.AWAITING_READY)
        await self._verify_strictly()
        began = self._attempt.clock.now()
        await self._peer.expect(messages.Ready, self._attempt.limits.ready_s)
        self._result.downtime.ready_s = self._attempt.clock.now() - began

    # -- one iteration -------------------------------------------------------------------------------

    async def _pass(self, *, live: bool) -> None:
        """One iteration and the harvest behind its barrier.

        In between the destination catches up: what it has not placed by the pause it places in the pause.
        """
        iteration = await self.precopy.iterate(live=live, pace=self._hinting.follow)
        self._hinting.check()
        await self._peer.drained()
        iteration.dirty_pages = await self.tracking.harvest()
        self._ledger.check()
        self._attempt.iterated(iteration)

    @property
    def _fixed_s(self) -> float:
        return self.tracking.cost_s + self._guest.handover_s

    def _standing(self) -> Standing:
        return Standing(
            iterations=len(self.precopy.iterations),
            elapsed_s=self._attempt.elapsed_s,
            left_bytes=self._ledger.to_send.count() * PAGE_BYTES,
            rate_bytes_s=self.precopy.rate_bytes_s,
            fixed_s=self._fixed_s,
        )

    def _decide(self) -> Decision:
        return decide(self._attempt.policy, self._standing())
