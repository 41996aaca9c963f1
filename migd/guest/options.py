"""GuestOptions: what a stub guest was asked to be, and whether that makes sense."""

from __future__ import annotations

import os
from dataclasses import dataclass

from migd.errors import ConfigError
from migd.guest.content import PAGE_BYTES, PYTHON_INSTALLATION
from migd.guest.control import MAX_BLOCKS, Block
from migd.guest.workload import (
    DEFAULT_RATES_BYTES_S,
    MAX_APART_LIVE,
    MAX_APART_PAGES,
    Rest,
    WorkloadKind,
    WorkloadPlan,
)
from migd.ram.contract import FreeContract

_CONTRACTS = {contract.name.lower(): contract for contract in FreeContract}


@dataclass(frozen=True)
class GuestOptions:
    """What ``migd guest`` was asked for; checked by ``plan``."""

    daemon: str
    """Path of the daemon's guest socket."""
    name: str
    ram_bytes: tuple[int, ...] = ()
    """Of each RAM block, a multiple of 4096; an incoming guest learns it from its daemon."""
    image: str = ""
    """A file that is the RAM, served where it lies and never written; then there is no ``ram_bytes``."""
    free: str = ""
    """A file with the free pages of ``image``, see ``RamImage``."""
    workload: str = ""
    """idle, churn, hog or write-heavy; if empty, idle for an image, else churn."""
    rate_bytes_s: int | None = None
    """0: as fast as it goes; None: DEFAULT_RATES_BYTES_S."""
    live_fraction: float = 0.05
    fill: tuple[str, ...] = (PYTHON_INSTALLATION,)
    seed: int = 1
    rest: str = "untouched"
    """What the pages beside the live set hold: untouched, zeroed or freed (old data)."""
    run_pages: int = 0
    """Live runs of 1 to this many pages, none next to another; 0: of up to 64, wherever they fit."""
    contract: str = "anything"
    """What free pages hold when they are allocated again: anything, zero or none (nothing declared)."""
    incoming: str = ""
    """The migration this guest is spawned for, whose device state brings all but name and daemon."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The RAM to ask for: one block "ram", or ram0, ram1 and so on."""
        sizes = [size // PAGE_BYTES for size in self.ram_bytes]
        if len(sizes) == 1:
            return (Block("ram", sizes[0]),)
        return tuple(Block(f"ram{number}", pages) for number, pages in enumerate(sizes))

    def plan(self) -> WorkloadPlan:
        """The workload that the options describe. ConfigError naming the first wrong one."""
        if not self.name:
            raise ConfigError("--name: a guest needs a name")
        if not self.incoming:
            self._check_ram()
        kind = self._kind()
        self._check_memory()
        if self.contract not in _CONTRACTS:
            raise ConfigError(f"--contract: {self.contract!r} is none of {', '.join(_CONTRACTS)}")
        if self.rate_bytes_s is not None and self.rate_bytes_s < 0:
            raise ConfigError(f"--rate: {self.rate_bytes_s} bytes per second is negative")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"--seed: {self.seed} is not between 0 and 2^64 - 1")
        rate = DEFAULT_RATES_BYTES_S[kind] if self.rate_bytes_s is None else self.rate_bytes_s
        return WorkloadPlan(
            kind=kind,
            rate_bytes_s=rate,
            live_fraction=self.live_fraction,
            seed=self.seed,
            contract=_CONTRACTS[self.contract],
            fill=tuple(os.path.abspath(path) for path in self.fill),
            rest=Rest(self.rest),
            run_pages=self.run_pages,
        )

    def _check_ram(self) -> None:
        if self.image:
            if self.ram_bytes:
                raise ConfigError("--ram: the RAM of an image is as large as its file")
            return
        if self.free:
            raise ConfigError("--free: it says what is free in an --image, and there is none")
        if not 0 < len(self.ram_bytes) <= MAX_BLOCKS:
            raise ConfigError(f"--ram: a guest has 1 to {MAX_BLOCKS} RAM blocks, not {len(self.ram_bytes)}")
        for size in self.ram_bytes:
            if size <= 0 or size % PAGE_BYTES:
                raise ConfigError(f"--ram: {size} bytes is not a positive multiple of {PAGE_BYTES}")

    def _kind(self) -> WorkloadKind:
        chosen = self.workload or (WorkloadKind.IDLE if self.image else WorkloadKind.CHURN)
        if chosen not in tuple(WorkloadKind):
            raise ConfigError(f"--workload: {chosen!r} is none of {', '.join(WorkloadKind)}")
        kind = WorkloadKind(chosen)
        if self.image and kind is not WorkloadKind.IDLE:
            raise ConfigError(
                f"--workload: a guest whose RAM is an image does not write it: idle, not {kind}"
            )
        return kind

    def _check_memory(self) -> None:
        if not 0 < self.live_fraction <= 1:
            raise ConfigError(f"--live: {self.live_fraction} is not above 0 and at most 1")
        if self.rest not in tuple(Rest):
            raise ConfigError(f"--rest: {self.rest!r} is none of {', '.join(Rest)}")
        if not 0 <= self.run_pages <= MAX_APART_PAGES:
            raise ConfigError(f"--run-pages: {self.run_pages} is not between 0 and {MAX_APART_PAGES}")
        if self.run_pages and self.live_fraction > MAX_APART_LIVE:
            raise ConfigError(
                f"--run-pages: with --live above {MAX_APART_LIVE} runs find no room to be apart"
            )
