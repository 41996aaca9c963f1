"""Running seeds: one to its report, or many on all cores."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation.life import Killed, enlist
from tests.simulation.loop import Stuck, VirtualLoop, virtual_loop
from tests.simulation.scenario import Plan, Play, draw_plan
from tests.simulation.world import World

_SHARED_MEMORY = Path("/dev/shm")
_LIMIT_S = 4000.0
"""Of virtual time, for any seed."""


@dataclass
class Report:
    """What became of one seed."""

    seed: int
    plan: str
    digest: str
    virtual_s: float
    wrongs: list[str]
    trace: list[str]
    starts: int
    compared_pages: int
    condemned: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)


class _BugWatch(logging.Handler):
    """A session that met a bug of migd's own logs its traceback."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and "unexpected" in record.getMessage():
            self._world.wrong(f"a bug in migd: {record.getMessage()}: {record.exc_info[1]!r}")


@contextmanager
def _watched_log(world: World) -> Iterator[None]:
    """Warnings are not formatted, bugs are noticed."""
    log = logging.getLogger("migd")
    handler, before, passes = _BugWatch(world), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.ERROR)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        log.propagate = passes


@contextmanager
def quick_collections() -> Iterator[None]:
    """What was imported is no garbage: looking at it behind each seed would take as long as the seed."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def fast_place() -> Path | None:
    """Where fsync costs nothing, if there is such a place here: journals are real files."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def run_seed(seed: int, *, faults: bool = True, place: Path | None = None) -> Report:
    """One seed, whole; the same report each time. Its journals are below ``place`` meanwhile."""
    return run_plan(seed, draw_plan(random.Random(f"plan {seed}"), faults=faults), place)


def run_plan(seed: int, plan: Plan, place: Path | None = None) -> Report:
    """A seed with another plan than its own."""
    directory = Path(tempfile.mkdtemp(prefix="migd-simulation-", dir=place or fast_place()))
    before = _descriptors()
    try:
        report = _played(seed, plan, directory)
        gc.collect()  # what nobody holds any more is no leak, and swallowed errors come to light
        if (left := _descriptors() - before) > 0:
            report.wrongs.append(f"{left} descriptors are left open")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return report


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _played(seed: int, plan: Plan, directory: Path) -> Report:
    with virtual_loop(enlist) as loop:
        world = loop.run_until_complete(_play(loop, seed, plan, directory))
    return Report(
        seed=seed,
        plan=str(plan),
        digest=world.digest,
        virtual_s=loop.time(),
        wrongs=world.wrongs,
        trace=world.trace,
        starts=world.oracle.starts,
        compared_pages=world.oracle.compared_pages,
        condemned=world.oracle.condemned,
        outcomes=world.outcomes,
        faults=world.faults,
        states=world.states,
    )


async def _play(loop: VirtualLoop, seed: int, plan: Plan, directory: Path) -> World:
    world = World(seed, directory)

    def swallowed(_loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error, of = context.get("exception"), context.get("future")
        if not isinstance(error, Killed) and not any(
            life.killed and of in life.tasks for life in world.lives
        ):
            world.wrong(f"asyncio: {context.get('message')}: {error!r}")

    loop.set_exception_handler(swallowed)
    with _watched_log(world):
        play = Play(world, plan)
        try:
            async with asyncio.timeout(_LIMIT_S):
                await play.run()
        except TimeoutError:
            world.wrong(f"this goes on after {_LIMIT_S:g} s")
        except Stuck as error:
            world.wrong(str(error))
    return world
