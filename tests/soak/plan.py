"""Plans: what a soak does, all of it from a seed. Processes differ from run to run, their plan does not.

A *life* is a pair of daemons and a guest that is moved ``RUNS_A_LIFE`` times; a *run* is one of these moves,
with everything that goes wrong in it. Kinds are dealt from shuffled decks, so that each comes up for certain
in as many runs as its deck has cards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from migd.control.commands import Migrate
from migd.ram.contract import FreeContract
from tests.soak.hinting import MANNERS, Manner
from tests.soak.network import Blow, Road, Stroke
from tests.soak.page import PAGE_BYTES
from tests.soak.words import Behaviour, Making

RUNS_A_LIFE = 15

_MIB_PAGES = (1 << 20) // PAGE_BYTES
_RAM_MIB = (8, 8, 8, 12, 16, 16, 24, 32, 48, 64)
_ODD_PAGES = 64
"""RAM is up to so many pages smaller, so that it ends within bytes and words of bitmaps."""
_CONTRACTS = (
    FreeContract.ANYTHING,
    FreeContract.ZERO,
    FreeContract.ANYTHING,
    FreeContract.ZERO,
    FreeContract.NONE,
)
_BRINGS = ("nothing", "memfd", "file")
_RATES_BYTES_S = (0, 2_000_000, 10_000_000, 10_000_000, 50_000_000, 100_000_000)
_RAMS_A_SECOND = (0, 0, 0, 5, 10, 20)
"""The limits of bandwidth, in times that all of RAM could be sent; 0 is none."""

_SMUGGLER_BYTES_S = 10_000_000

T = TypeVar("T")


class Trouble(StrEnum):
    """What goes wrong in a run."""

    NONE = "none"
    RST = "rst"
    FIN = "fin"
    BLACKHOLE = "blackhole"
    FLIP = "flip"
    CANCEL = "cancel"


_TROUBLES = (
    *[Trouble.NONE] * 15,
    *[Trouble.RST] * 3,
    *[Trouble.FIN] * 3,
    *[Trouble.FLIP] * 3,
    *[Trouble.CANCEL] * 3,
    Trouble.BLACKHOLE,
)


class Plant(StrEnum):
    """A fault in the guest itself, which the oracle has to find in every run."""

    SMUGGLE = "smuggle"
    """It stores behind the dirty log's back (W13), and nobody verifies."""
    LIE = "lie"
    """It calls all of its memory free, in its hints and at the pause."""


class Moment(StrEnum):
    """When it goes wrong."""

    BYTE = "byte"
    """Of what passed by then, in one direction."""
    TIME = "time"
    """Since the request."""
    PAUSE = "pause"
    """A while after the guest has stopped."""
    START = "start"
    """Before the first instruction at the destination: GO has come, STARTED has not gone."""


@dataclass(frozen=True)
class Life:
    """A pair of daemons and a guest."""

    number: int
    making: Making
    source_ram: str
    """Of the daemon where the guest is born: ``memfd`` or ``file``."""
    destination_ram: str


@dataclass(frozen=True)
class Run:
    """One move, planned."""

    number: int
    behaviour: Behaviour
    request: Migrate
    """But for guest and destination."""
    trouble: Trouble
    moment: Moment
    delay_s: float
    blow: Blow | None
    road: Road | None
    """None: no proxy between the daemons."""


def life_of(seed: int, number: int, plant: Plant | None = None) -> Life:
    """The ``number``-th life under this seed; a guest that is to lie declares a contract."""
    rng = random.Random(f"{seed} life {number}")
    mib = rng.choice(_RAM_MIB)
    pages = mib * _MIB_PAGES - rng.randrange(_ODD_PAGES)
    contract = dealt(seed, "contract", number, _CONTRACTS)
    making = Making(
        guest=rng.getrandbits(48) + 1,
        block_pages=_split(rng, pages),
        contract=FreeContract.ANYTHING if plant is Plant.LIE else contract,
        live_fraction=rng.uniform(0.1, 0.8),
        hog=rng.random() < 0.5,
        brings=dealt(seed, "brings", number, _BRINGS),
        seed=rng.getrandbits(32),
    )
    kinds = ("memfd", "file")
    return Life(number, making, rng.choice(kinds), rng.choice(kinds))


def run_of(seed: int, number: int) -> Run:
    """The ``number``-th run under this seed, in the life ``number // RUNS_A_LIFE``."""
    rng = random.Random(f"{seed} run {number}")
    pages = sum(life_of(seed, number // RUNS_A_LIFE).making.block_pages)
    trouble = dealt(seed, "trouble", number, _TROUBLES)
    moment = _moment(rng, trouble)
    blow = _blow(rng, trouble, moment, pages * PAGE_BYTES)
    return Run(
        number=number,
        behaviour=_behaviour(rng, dealt(seed, "manner", number, MANNERS)),
        request=_request(rng, seed, number, pages),
        trouble=trouble,
        moment=moment,
        delay_s=rng.uniform(0.0, 0.3 if moment is Moment.TIME else 0.03),
        blow=blow,
        road=_road(rng) if blow is not None or rng.random() < 0.3 else None,
    )


def untroubled(run: Run) -> Run:
    """The same over a good network: what has to succeed after the trouble."""
    return replace(run, trouble=Trouble.NONE, blow=None, road=None)


def planted(run: Run, plant: Plant) -> Run:
    """The same without trouble, with that fault in the guest."""
    run = untroubled(run)
    if plant is Plant.LIE:
        behaviour = Behaviour(manner=Manner.LIE, lies_at_pause=True)
        return replace(run, behaviour=behaviour, request=changed(run.request, hints=True))
    request = changed(run.request, dirty_log="userfaultfd", verify="off")
    return replace(run, behaviour=Behaviour(rate_bytes_s=_SMUGGLER_BYTES_S, smuggles=True), request=request)


def changed(request: Migrate, **wishes: object) -> Migrate:
    return msgspec.structs.replace(request, **wishes)


def dealt(seed: int, what: str, number: int, deck: Sequence[T]) -> T:
    """The ``number``-th card of decks that are shuffled one after the other."""
    round_number, place = divmod(number, len(deck))
    shuffled = list(deck)
    random.Random(f"{seed} {what} {round_number}").shuffle(shuffled)
    return shuffled[place]


def _split(rng: random.Random, pages: int) -> tuple[int, ...]:
    """One block, or several of any size."""
    blocks = rng.choice((1, 1, 2, 3))
    cuts = sorted(rng.sample(range(1, pages), blocks - 1))
    return tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, pages], strict=True))


def _behaviour(rng: random.Random, manner: Manner) -> Behaviour:
    return Behaviour(
        manner=manner,
        rate_bytes_s=rng.choice(_RATES_BYTES_S) or 1,
        reuse_share=rng.choice((0.0, 0.2, 0.6)),
        seize_share=rng.choice((0.0, 0.0, 0.01, 0.1)),
    )


def _request(rng: random.Random, seed: int, number: int, pages: int) -> Migrate:
    wishes: dict[str, Any] = {
        "streams": rng.randrange(1, 5),
        "verify": dealt(seed, "verify", number, ("strict", "late", "off")),
        "dirty_log": dealt(seed, "dirty log", number, ("userfaultfd", "userfaultfd", "compare")),
        "hints": rng.random() < 0.9,
        "compression": rng.choice(("auto", "lz4", "none")),
        "downtime_limit_ms": rng.choice((1.0, 30.0, 300.0)),
        "max_iterations": rng.choice((1, 3, 8)),
        "max_bandwidth_bytes_s": rng.choice(_RAMS_A_SECOND) * pages * PAGE_BYTES,
    }
    return Migrate(guest="", to="", **wishes)


def _moment(rng: random.Random, trouble: Trouble) -> Moment:
    if trouble is Trouble.FLIP:
        return Moment.BYTE
    if trouble is Trouble.CANCEL:
        return rng.choice((Moment.TIME, Moment.TIME, Moment.PAUSE))
    return rng.choice((Moment.BYTE, Moment.BYTE, Moment.BYTE, Moment.PAUSE, Moment.PAUSE, Moment.START))


def _blow(rng: random.Random, trouble: Trouble, moment: Moment, ram_bytes: int) -> Blow | None:
    if trouble in (Trouble.NONE, Trouble.CANCEL):
        return None
    backwards = rng.random() < 0.2
    most = 2000 if backwards else ram_bytes
    # Half of them among the first words, as likely in each order of magnitude, half anywhere in the bulk.
    at = int(math.exp(rng.uniform(0, math.log(most)))) if rng.random() < 0.5 else rng.randrange(most)
    return Blow(
        Stroke(trouble),
        at_byte=at if moment is Moment.BYTE else None,
        backwards=backwards,
        everywhere=rng.random() < 0.6,
    )


def _road(rng: random.Random) -> Road:
    return rng.choice((Road(), Road(chunk_bytes=1 << 14), Road(delay_s=0.0005), Road(chunk_bytes=1448)))
