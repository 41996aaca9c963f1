"""The other host: whether a destination answers there, and whether it fits what would be sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from migd.config import MigrationConfig
from migd.control.commands import GuestStatus
from migd.doctor.finding import Finding, fail, ok, warn
from migd.errors import Refused
from migd.transport.probe import Answer
from migd.transport.tcp import is_loopback
from migd.wire.handshake import Side
from migd.wire.messages import About
from migd.wire.protocol import SOFTWARE, Feature

_SMALL_OFFSET_S = 0.005
"""Against pauses of tens of milliseconds."""


def unreachable(address: str, reason: str) -> Finding:
    return fail(
        f"destination {address}",
        reason,
        "no guest can be sent there",
        "start `migd destination` there, and look at its destination.listen and at firewalls in between",
    )


def examine(
    address: str, answer: Answer, config: MigrationConfig, guests: Sequence[GuestStatus]
) -> Iterator[Finding]:
    """All about a destination that answered; ``guests`` are those that could be sent there."""
    about = answer.about
    yield ok(
        f"destination {address}",
        f"{about.software} answers, {answer.round_trip_s * 1e3:.2g} ms there and back",
    )
    yield _versions(about)
    yield _features(about)
    yield _streams(about, config.streams)
    yield clocks(answer)
    yield _memory(about, guests)
    yield _plaintext(address, config)


def _versions(about: About) -> Finding:
    theirs = Side("destination", about.software, about.min_version, about.max_version)
    try:
        version = Side.ours("source").common_version(theirs)
    except Refused as error:
        return fail(
            "protocol version", str(error), "no guest can be sent there", "have one version on both hosts"
        )
    if about.software != SOFTWARE:
        return ok("protocol version", f"{version}, spoken by {SOFTWARE} here and {about.software} there")
    return ok("protocol version", str(version))


def _features(about: About) -> Finding:
    missing = sorted(set(Feature) - set(about.features))
    if missing:
        return warn(
            "features",
            f"the destination lacks {', '.join(missing)}",
            "migrations do without; more bytes may be sent",
            "update migd at the destination",
        )
    return ok("features", ", ".join(Feature))


def _streams(about: About, streams: int) -> Finding:
    if streams <= about.max_streams:
        return ok("streams", f"{streams} of at most {about.max_streams}")
    return fail(
        "streams",
        f"{streams} configured here, at most {about.max_streams} allowed there",
        "the destination refuses every migration",
        "set migration.streams lower here, or destination.max_streams higher there",
    )


def clocks(answer: Answer) -> Finding:
    """The offset, with how much of it is not known: downtime is read off both clocks."""
    offset_s, unknown_s = answer.clock_offset_s, answer.round_trip_s / 2
    found = f"{offset_s * 1e3:+.1f} ms off ours, give or take {unknown_s * 1e3:.2g} ms"
    if abs(offset_s) - unknown_s <= _SMALL_OFFSET_S:
        return ok("clock there", found)
    much = "more" if offset_s > 0 else "less"
    return warn(
        "clock there",
        found,
        f"downtime of migrations there is reported as about {abs(offset_s) * 1e3:.0f} ms {much} than it is",
        "synchronise the clocks of both hosts with the same time service",
    )


def _memory(about: About, guests: Sequence[GuestStatus]) -> Finding:
    found = f"{about.free_bytes >> 20} MiB can be given to a guest"
    large = [guest for guest in guests if guest.ram_bytes > about.free_bytes]
    if not large:
        return ok("memory there", found)
    named = ", ".join(f"{guest.name} ({guest.ram_bytes >> 20} MiB)" for guest in large)
    return warn(
        "memory there", found, f"too little for {named}", "free memory there, or choose another destination"
    )


def _plaintext(address: str, config: MigrationConfig) -> Finding:
    if is_loopback(address):
        return ok("way there", "loopback")
    if config.insecure_plaintext:
        return warn(
            "way there",
            "plaintext over the network, as migration.insecure_plaintext = true",
            "guest memory can be read and changed on its way",
            "leave it so in a private network only",
        )
    return fail(
        "way there",
        "over the network, where there is plaintext only",
        "every migration there is refused",
        "set migration.insecure_plaintext = true for a private network, or go through a tunnel",
    )
