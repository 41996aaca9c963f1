"""What a migration did, in figures: one line per iteration, one result per migration."""

from __future__ import annotations

import msgspec

from migd.errors import VerificationError, of_exit_code
from migd.ledger.ledger import Balance, Tally
from migd.ram.page import PAGE_BYTES

SCHEMA = 1
"""Of ``Result`` as JSON; grows when a field changes its meaning or goes."""


class Iteration(msgspec.Struct, kw_only=True):
    """One pass over the pages to send; ``str()`` is its log line."""

    number: int
    """0 is the bulk stage."""
    live: bool
    """The guest ran meanwhile."""
    to_send_pages: int
    """At its beginning."""
    sent_pages: int = 0
    resent_pages: int = 0
    zero_pages: int = 0
    free_records: int = 0
    skipped_pages: int = 0
    """Spared by hints since the iteration before it."""
    dirty_pages: int = 0
    """Found by the harvest that ended it."""
    wire_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        name = "bulk stage" if self.number == 0 else f"iteration {self.number}"
        if not self.live:
            name += " (paused)"
        rate = self.sent_pages * PAGE_BYTES / self.seconds / 1e9 if self.seconds else 0.0
        return (
            f"{name}: {self.to_send_pages} to send, {self.sent_pages} sent ({self.resent_pages} again), "
            f"{self.zero_pages} zero, {self.skipped_pages} skipped, {self.free_records} FREE, "
            f"{self.dirty_pages} dirty since, {self.wire_bytes / 1e6:.1f} MB in {self.seconds * 1e3:.0f} ms, "
            f"{rate:.2f} GB/s"
        )


class Downtime(msgspec.Struct, kw_only=True):
    """Where the pause went, in seconds. The parts are the source daemon's; ``guest_s`` is the guest's own.

    ``guest_s`` runs from the guest's last instruction at the source to its first at the destination, on its
    realtime clock; across two hosts it is as true as their clocks agree.
    """

    guest_s: float = 0.0
    """All of it, by the guest's own clock."""
    pause_s: float = 0.0
    """Until the guest had acknowledged the pause and handed over its device state."""
    send_s: float = 0.0
    """Final harvest, remaining pages, device state."""
    verify_s: float = 0.0
    """Strict tracking verification, while the destination drains and loads; 0 when late or off."""
    ready_s: float = 0.0
    """What the destination took longer: to drain, verify, load and journal."""
    go_s: float = 0.0
    """Journal, GO, journal, start, STARTED."""

    def parts(self) -> list[tuple[str, float]]:
        """Name and seconds of each part, in order."""
        return [
            ("pause", self.pause_s),
            ("final send", self.send_s),
            ("verify", self.verify_s),
            ("ready", self.ready_s),
            ("go", self.go_s),
        ]


class Result(msgspec.Struct, kw_only=True, tag_field="direction", tag="out"):
    """The outcome of one migration at its source. Pages are of 4096 bytes; ``error`` is empty on success."""

    schema: int = SCHEMA
    migration: str
    guest: str
    peer: str
    """The destination's address."""
    outcome: str = ""
    """completed, cancelled, failed or unknown."""
    error: str = ""
    exit_code: int = 0
    live: bool = True
    hints: str = ""
    """What became of hints: used, or why not."""
    dirty_log: str = ""
    """How writes were found: userfaultfd or compare; empty if the guest was paused all the time."""
    streams: int = 0
    """TCP connections."""
    total_s: float = 0.0
    """From the request accepted to STARTED received."""
    downtime: Downtime = msgspec.field(default_factory=Downtime)
    """How long the guest did not run, and why."""
    iterations: list[Iteration] = msgspec.field(default_factory=list)
    """The bulk stage first; the last one with the guest paused."""
    ram_pages: int = 0
    sent_pages: int = 0
    resent_pages: int = 0
    zero_pages: int = 0
    skipped_free_pages: int = 0
    """Not at the destination because the guest had declared them free (final)."""
    hole_pages: int = 0
    """Never touched by the guest, so that nothing had to be sent of them."""
    free_records: int = 0
    rescued_pages: int = 0
    """Skipped, but not free at the pause, and yet not in the kernel's log: 0 for every right guest (R14)."""
    reclaimed_pages: int = 0
    """Skipped, and sent after all as the guest had taken them into use: the compare log's way (R19)."""
    hints_applied: int = 0
    """Pages hinted as free that were then skipped."""
    hints_late: int = 0
    """Refused: the guest had written the page since the request (R4)."""
    hints_stale: int = 0
    """Refused: of an earlier request, or of none."""
    hints_rejected: int = 0
    """Records refused for what is in them (R7)."""
    late_dirty_pages: int = 0
    """Dirty after device state was saved (R13)."""
    wire_bytes: int = 0
    page_bytes: int = 0
    """Content of the pages sent, before packing."""
    payload_bytes: int = 0
    """The same after packing."""
    verification: str = ""
    """strict, late or off, and the verdict."""
    checked_pages: int | None = None
    """Pages the guest itself checked at the destination; None if it does not, or did not in time."""
    wrong_pages: int | None = None
    """Of these, pages that were not what the guest had written; None as before."""
    states: list[str] = msgspec.field(default_factory=list)

    def count(self, balance: Balance, tally: Tally) -> None:
        """The ledger's figures, as they are at the end."""
        self.sent_pages, self.resent_pages = tally.sent, tally.resent
        self.zero_pages, self.hole_pages = balance.zero, balance.hole
        self.skipped_free_pages, self.free_records = balance.skipped_free, tally.free_records
        self.rescued_pages, self.reclaimed_pages = tally.rescued, tally.reclaimed
        self.hints_applied, self.hints_late = tally.hints_applied, tally.hints_late
        self.hints_stale = tally.hints_stale

    def check(self) -> Result:
        """Itself if the migration completed; else the error of its exit code, with its words.

        VerificationError, too, where the guest's own check found pages wrong.
        """
        if self.exit_code or self.outcome != "completed":
            raise of_exit_code(self.exit_code, f"{self.guest} -> {self.peer}: {self.outcome}: {self.error}")
        if self.wrong_pages:
            raise VerificationError(
                f"{self.guest} -> {self.peer}: its own check found {self.wrong_pages} of "
                f"{self.checked_pages} pages wrong"
            )
        return self

    @property
    def compression_ratio(self) -> float:
        """Bytes of content for each byte of payload; 1 where nothing was sent."""
        return self.page_bytes / self.payload_bytes if self.payload_bytes else 1.0


class Arrival(msgspec.Struct, kw_only=True, tag_field="direction", tag="in"):
    """The outcome of one migration at its destination; ``error`` is empty on success."""

    schema: int = SCHEMA
    migration: str
    guest: str
    peer: str
    """The software that the source says it is."""
    outcome: str
    """completed: the guest runs here; aborted: it never did; failed: it was started and is paused or gone."""
    error: str = ""
    exit_code: int = 0
    """0 completed, 1 aborted or lost, 5 paused by a bad verdict."""
    total_s: float = 0.0
    """From HELLO until the guest was started, or the attempt was over."""
    ram_pages: int = 0
    placed_bytes: int = 0
    """Of RAM, by records of any kind; a page that came twice counts twice."""
    states: list[str] = msgspec.field(default_factory=list)
