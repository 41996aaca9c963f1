"""When to iterate once more, when to pause the guest, when to give up: a pure policy.

After each iteration ``decide`` looks at what is left and returns one of four answers. Criteria, in order:

1. nothing is left, or the estimated pause fits the downtime limit: SWITCHOVER;
2. iterations or time are used up: FORCE or CANCEL, as the operator chose;
3. else ITERATE.

The estimated pause is the time to send what is left at the rate seen so far, plus the time that the rest
of the switchover needs (hand-over), plus what this guest's pause takes whatever is left: the last harvest of
a log that compares content, the device state of a machine under QEMU. That may be more than the limit by
itself. Then no number of iterations can meet it, and once what is left takes less time than that, another one
gains nothing: that counts as used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SWITCHOVER_OVERHEAD_S = 0.005
"""Pause acknowledgement, two fsyncs and four messages on a fast link: 3 to 6 ms measured on loopback."""

HINT_MIN_SHARE = 0.02
"""Ask for hints again only while the last answer spared this share of what was then to send."""

HINT_WORTH = 8
"""And only while at least so many times as many pages are to send as the guest writes in order to answer: an
agent in a Linux guest dirties some 200, so asking before every iteration keeps it from converging."""


class Exhausted(StrEnum):
    """What to do when a budget is used up and the rest still does not fit."""

    FORCE = "force"
    CANCEL = "cancel"


class Decision(StrEnum):
    ITERATE = "iterate"
    SWITCHOVER = "switchover"
    FORCE = "force"
    CANCEL = "cancel"


@dataclass(frozen=True)
class Policy:
    """What the operator allows. Times in seconds."""

    downtime_limit_s: float = 0.3
    max_iterations: int = 30
    """Iterations while the guest runs, the bulk stage included."""
    max_total_s: float = 300.0
    on_exhausted: Exhausted = Exhausted.FORCE


RATE_MEMORY_BYTES = 64 << 20
"""How much traffic the estimate of the rate looks back on. Less, and an iteration of a few pages, which
socket buffers swallow at memory speed, would decide; more, and a limit that was raised would not be noticed
in time."""


class RecentRate:
    """Bytes per second over the last RATE_MEMORY_BYTES or so."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    @property
    def bytes_s(self) -> float:
        """0 before anything was sent."""
        return self._bytes / self._seconds if self._seconds else 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        """An iteration sent so much in this time."""
        keep = max(0.0, 1 - size_bytes / RATE_MEMORY_BYTES)
        self._bytes = self._bytes * keep + size_bytes
        self._seconds = self._seconds * keep + seconds


@dataclass(frozen=True)
class Standing:
    """What an iteration left behind."""

    iterations: int
    elapsed_s: float
    left_bytes: int
    rate_bytes_s: float
    """Bytes of guest RAM per second through the pipe so far; 0 before anything was sent."""
    fixed_s: float = 0.0
    """What the pause takes whatever is left; 0 with the kernel's log and the stub."""


def estimated_pause_s(standing: Standing) -> float:
    """How long the guest would stand still if it were paused now; infinite while no rate is known."""
    return _sending_s(standing) + standing.fixed_s + SWITCHOVER_OVERHEAD_S


def _sending_s(standing: Standing) -> float:
    if standing.left_bytes == 0:
        return 0.0
    if standing.rate_bytes_s <= 0:
        return float("inf")
    return standing.left_bytes / standing.rate_bytes_s


def out_of_reach(policy: Policy, standing: Standing) -> bool:
    """What the pause takes in any case is longer than the guest may be paused."""
    return standing.fixed_s > policy.downtime_limit_s


def decide(policy: Policy, standing: Standing) -> Decision:
    """See the module's docstring."""
    reachable = not out_of_reach(policy, standing)
    if reachable and (standing.left_bytes == 0 or estimated_pause_s(standing) <= policy.downtime_limit_s):
        return Decision.SWITCHOVER
    futile = not reachable and _sending_s(standing) <= standing.fixed_s
    if futile or standing.iterations >= policy.max_iterations or standing.elapsed_s >= policy.max_total_s:
        return Decision.FORCE if policy.on_exhausted is Exhausted.FORCE else Decision.CANCEL
    return Decision.ITERATE


def hints_pay(
    applied_pages: int,
    asked_pages: int,
    left_bytes: int,
    policy: Policy,
    rate_bytes_s: float,
    answer_bytes: int = 0,
    answer_s: float = 0.0,
) -> bool:
    """Whether to ask for hints before the next iteration.

    ``answer_bytes``: what the guest writes to answer; ``answer_s``: how long the last answer held memory up.

    Only while the last answer spared a fair share of the pages that were to send when it was asked for, and
    what is left is worth asking about: more than a tenth of the downtime limit at the present rate, and than
    asking costs. Sparing that share once more must take less time than waiting for it.
    """
    if applied_pages < asked_pages * HINT_MIN_SHARE or left_bytes < HINT_WORTH * answer_bytes:
        return False
    if left_bytes * applied_pages < answer_s * rate_bytes_s * asked_pages:
        return False
    return left_bytes > policy.downtime_limit_s / 10 * rate_bytes_s
