"""The device state of a stub guest: everything but its RAM, as bytes that travel at switchover.

::

    offset  size  field
         0     8  magic "migdGDS" and version
         8    16  XXH3-128 of everything behind
        24     4  length of the header, little-endian
        28     -  header: JSON of ``_Header``
         -    16  per run: u64 first page, u64 pages; the live runs, oldest first, then the hog's
         -    16  per page of those runs, in that order: its row of the journal

Nothing is kept for a free page: the runs of the workload are all pages the guest owns, so the free list
follows from them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from mmap import mmap

import msgspec

from migd.errors import GuestError
from migd.guest.allocator import MAX_RUN_PAGES, PageRun
from migd.guest.content import FileContent
from migd.guest.machine import DIGEST_BYTES, Machine, page_digest
from migd.guest.workload import (
    Counter,
    Phase,
    Workload,
    WorkloadKind,
    WorkloadPlan,
    WorkloadProgress,
)

MAGIC = b"migdGDS\x01"

_PREFIX = struct.Struct("<8s16sI")
_DIGEST_FROM = 24
_RUN = struct.Struct("<QQ")


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pages: Counter
    sequence: Counter
    written_pages: Counter
    stopped_at_ns: Counter
    live_runs: Counter
    hog_runs: Counter
    plan: WorkloadPlan
    progress: WorkloadProgress


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Header)


@dataclass(frozen=True)
class DeviceState:
    """A checked device state, not yet in any machine. ``rows`` is the journal of all runs, joined."""

    header: _Header
    live: list[PageRun]
    hog: list[PageRun]
    rows: memoryview

    @property
    def plan(self) -> WorkloadPlan:
        return self.header.plan

    @property
    def stopped_at_ns(self) -> int:
        return self.header.stopped_at_ns

    def restore(self, ram: mmap, content: FileContent) -> tuple[Machine, Workload]:
        """The guest as it was, on RAM that holds what its RAM held. GuestError if the RAM cannot be its."""
        machine = Machine(ram, self.plan.contract)
        if machine.pages != self.header.pages:
            raise GuestError(
                f"the device state is of {self.header.pages} pages, this RAM has {machine.pages}"
            )
        works = self.plan.kind is not WorkloadKind.IDLE and self.header.progress.phase is Phase.STEADY
        if works and not self.live:
            raise GuestError("the device state is of a running workload that owns no page")
        machine.sequence = self.header.sequence
        machine.written_pages = self.header.written_pages
        at = 0
        for start, stop in chain(self.live, self.hog):
            try:
                if stop - start > MAX_RUN_PAGES:
                    raise ValueError(f"a run has at most {MAX_RUN_PAGES} pages, not {stop - start}")
                machine.allocator.claim(start, stop)
            except ValueError as error:
                raise GuestError(f"the device state owns impossible pages: {error}") from error
            length = (stop - start) * DIGEST_BYTES
            machine.journal[start * DIGEST_BYTES : stop * DIGEST_BYTES] = self.rows[at : at + length]
            at += length
        workload = Workload(machine, content, self.plan)
        workload.resume(self.header.progress, self.live, self.hog)
        return machine, workload


def save(machine: Machine, workload: Workload, stopped_at_ns: int) -> bytes:
    """The device state of a guest at a safe point; ``stopped_at_ns`` on the realtime clock."""
    runs = [*workload.live, *workload.hog]
    header = _encoder.encode(
        _Header(
            pages=machine.pages,
            sequence=machine.sequence,
            written_pages=machine.written_pages,
            stopped_at_ns=stopped_at_ns,
            live_runs=len(workload.live),
            hog_runs=len(workload.hog),
            plan=workload.plan,
            progress=workload.snapshot(),
        )
    )
    packed = [_RUN.pack(start, stop - start) for start, stop in runs]
    rows = [machine.journal[start * DIGEST_BYTES : stop * DIGEST_BYTES] for start, stop in runs]
    body = b"".join((struct.pack("<I", len(header)), header, *packed, *rows))
    return MAGIC + page_digest(body) + body


def parse(blob: bytes) -> DeviceState:
    """A device state from bytes that came over the network. GuestError naming what is wrong with them."""
    view = memoryview(blob)
    if len(view) < _PREFIX.size:
        raise GuestError(f"the device state is cut short: {len(view)} bytes")
    magic, digest, header_bytes = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise GuestError(f"no device state of this version: it begins with {magic!r}")
    if page_digest(view[_DIGEST_FROM:]) != digest:
        raise GuestError("the device state is damaged: its digest does not match")
    header = _parse_header(view[_PREFIX.size : _PREFIX.size + header_bytes])
    return _parse_body(header, view[_PREFIX.size + header_bytes :])


def _parse_header(view: memoryview) -> _Header:
    try:
        return _decoder.decode(view)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise GuestError(f"the header of the device state is wrong: {error}") from error


def _parse_body(header: _Header, view: memoryview) -> DeviceState:
    split = (header.live_runs + header.hog_runs) * _RUN.size
    if split > len(view):
        raise GuestError(f"the device state is cut short: no room for {split} bytes of runs")
    runs = [(start, start + length) for start, length in _RUN.iter_unpack(view[:split])]
    rows = view[split:]
    owned = _owned_pages(runs)
    if len(rows) != owned * DIGEST_BYTES:
        raise GuestError(f"the device state has {len(rows)} bytes of journal for {owned} pages")
    return DeviceState(header, runs[: header.live_runs], runs[header.live_runs :], rows)


def _owned_pages(runs: Iterable[PageRun]) -> int:
    return sum(stop - start for start, stop in runs)
