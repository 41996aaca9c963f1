"""What the system allows one process: descriptors, and bytes under way on a TCP connection."""

from __future__ import annotations

import resource

from migd.config import Config
from migd.doctor.finding import Finding, fail, ok, warn
from migd.doctor.system import System
from migd.wire.protocol import MAX_STREAMS

_OWN_DESCRIPTORS = 32
"""Of a daemon without guests: event loop, sockets, standard streams, lock and log, rounded up."""
_DESCRIPTORS_OF_A_GUEST = 6
"""RAM, control, hints, pagemap, process, and one to spare."""
_FEW_GUESTS = 16

_LINK_BYTES_S = 1.25e9
"""10 Gbit/s: what one migration should be able to fill."""
_NEAR_S = 1e-3
"""A round trip within one site, where nobody measured it."""


def descriptors(soft: int, hard: int) -> Finding:
    """For the streams of one largest migration and as many guests as fit beside them."""
    check = "open files"
    guests = (soft - _OWN_DESCRIPTORS - MAX_STREAMS) // _DESCRIPTORS_OF_A_GUEST
    found = f"{soft}, enough for {max(0, guests)} guests and {MAX_STREAMS} streams"
    remedy = f"raise the limit before the daemon starts: ulimit -n {min(hard, 4096)} or LimitNOFILE=4096"
    if guests < 1:
        return fail(check, found, "migrations with many streams fail half-way", remedy)
    if guests < _FEW_GUESTS:
        return warn(check, found, "more guests than that are refused", remedy)
    return ok(check, found)


def own_descriptors() -> Finding:
    """By the limits of this very process: a daemon started from here gets the same."""
    soft, hard = (
        1 << 20 if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return descriptors(soft, hard)


def tcp_buffers(system: System, config: Config, round_trip_s: float | None) -> Finding:
    """A stream carries no more than a buffer full each round trip, whatever the link could."""
    check = "TCP buffers"
    sizes = [system.numbers(f"proc/sys/net/ipv4/tcp_{name}") for name in ("rmem", "wmem")]
    if not all(sizes):
        return ok(check, "the kernel does not tell")
    # The kernel counts its own bookkeeping in: about half is left for the bytes themselves.
    buffer_bytes = min(size[-1] for size in sizes) // 2
    trip_s = max(round_trip_s if round_trip_s is not None else _NEAR_S, 1e-6)
    streams = config.migration.streams
    possible_bytes_s = streams * buffer_bytes / trip_s
    found = (
        f"up to {buffer_bytes / 1e6:.1f} MB under way on a stream: {streams} streams carry "
        f"{possible_bytes_s / 1e9:.2f} GB/s {'at most over' if round_trip_s is not None else 'over, say,'} "
        f"{trip_s * 1e3:.3g} ms there and back"
    )
    if possible_bytes_s < _LINK_BYTES_S:
        return warn(
            check,
            found,
            "a fast link is not filled",
            "more migration.streams, or larger net.ipv4.tcp_wmem here and net.ipv4.tcp_rmem there",
        )
    return ok(check, found)
