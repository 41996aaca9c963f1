"""What the doctor says of a destination, by what that answered."""

from __future__ import annotations

import msgspec
import pytest

from migd.config import MigrationConfig
from migd.control.commands import GuestStatus
from migd.doctor import peer
from migd.doctor.finding import Finding, Level
from migd.transport.probe import Answer
from migd.wire import handshake, messages
from tests.doctor.reading import FAIL, OK, WARN

GIB = 1 << 30
ABOUT = handshake.about(handshake.probe("0" * 32), realtime_ns=0, free_bytes=GIB, max_streams=16)


def guest_status(name: str, ram_bytes: int) -> GuestStatus:
    return GuestStatus(name=name, state="running", ram_bytes=ram_bytes, pid=1, migration="")


def findings(
    about: messages.About = ABOUT,
    *,
    address: str = "127.0.0.1:7440",
    config: MigrationConfig = MigrationConfig(),  # noqa: B008  # frozen
    guests: tuple[GuestStatus, ...] = (),
) -> dict[str, Finding]:
    answer = Answer(about, round_trip_s=0.001, clock_offset_s=0.0)
    return {finding.check: finding for finding in peer.examine(address, answer, config, guests)}


def changed(**fields: object) -> messages.About:
    return msgspec.structs.replace(ABOUT, **fields)


def test_a_destination_like_ours() -> None:
    assert {finding.level for finding in findings().values()} == {OK}


@pytest.mark.parametrize(
    ("about", "check", "level", "text"),
    [
        (changed(min_version=2, max_version=3, software="migd 9"), "protocol version", FAIL,
         "the destination (migd 9) speaks 2 to 3: update migd at the source"),
        (changed(min_version=0, max_version=0), "protocol version", FAIL, "update migd at the destination"),
        (changed(software="migd 9"), "protocol version", OK, "and migd 9 there"),
        (changed(features=()), "features", WARN, "the destination lacks lz4"),
        (changed(features=("lz4", "resolve", "time-travel")), "features", OK, "lz4, resolve"),
        (changed(max_streams=1), "streams", FAIL, "2 configured here, at most 1 allowed there"),
    ],
)  # fmt: skip
def test_a_destination_that_is_different(about: messages.About, check: str, level: Level, text: str) -> None:
    found = findings(about)[check]
    assert found.level is level
    assert text in found.found


def test_guests_that_would_not_fit_are_named() -> None:
    small, large = guest_status("small", GIB), guest_status("large", GIB + 4096)
    assert findings(guests=(small,))["memory there"].level is OK
    found = findings(guests=(small, large))["memory there"]
    assert (found.level, found.meaning) == (WARN, "too little for large (1024 MiB)")


@pytest.mark.parametrize(("consent", "level"), [(False, FAIL), (True, WARN)])
def test_a_destination_on_another_host(consent: bool, level: Level) -> None:
    config = MigrationConfig(insecure_plaintext=consent)
    assert findings(address="192.0.2.1:7440", config=config)["way there"].level is level


@pytest.mark.parametrize(
    ("offset_s", "round_trip_s", "level", "text"),
    [
        (0.0, 0.001, OK, "+0.0 ms off ours, give or take 0.5 ms"),
        (-0.0049, 0.0, OK, "-4.9 ms off ours"),
        (0.02, 0.04, OK, "+20.0 ms off ours, give or take 20 ms"),
        (0.02, 0.01, WARN, "+20.0 ms off ours, give or take 5 ms"),
        (-3.5, 0.001, WARN, "-3500.0 ms off ours"),
    ],
)
def test_clocks_of_two_hosts(offset_s: float, round_trip_s: float, level: Level, text: str) -> None:
    found = peer.clocks(Answer(ABOUT, round_trip_s, offset_s))
    assert found.level is level
    assert text in found.found
    if level is WARN:
        assert (
            f"about {abs(offset_s) * 1e3:.0f} ms {'more' if offset_s > 0 else 'less'} than" in found.meaning
        )
