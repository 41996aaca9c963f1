"""Limits end to end: bandwidth holds, is shared, and changes while migrations run, as does when to pause.

A rate is only ever asserted from above, or by a migration that would take minutes at the limit it had.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migd.control.commands import MigrationStatus
from migd.migration.bandwidth import BURST_S, FRAME_S
from migd.migration.state import SourceState
from migd.migration.stats import Result
from tests.support.pair import DaemonPair, Output, daemon_pair, eventually, finish, migd

MB = 10**6
RAW = ("--compression", "none", "--no-hints", "--verify", "off")
SNAIL = 200_000
"""Bytes per second: the guests here have 16 MB to move, and a test ends after 30 s."""


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def held() -> Iterator[DaemonPair]:
    with daemon_pair(held=True) as pair:
        yield pair


def full_guest(pair: DaemonPair, name: str, ram: str = "24Mi") -> None:
    """Some 16 MB in it, and nothing is written any more."""
    pair.guest(name, ram=ram, workload="idle", live="0.7")


def set_(pair: DaemonPair, *arguments: object, arrivals: bool = False) -> Output:
    daemon = pair.destination if arrivals else pair.source
    return migd("set", *arguments, "--runtime-dir", daemon.directory)


def moving(pair: DaemonPair, name: str) -> MigrationStatus:
    return pair.source.migrations(name)[-1]


def begins_to_move(pair: DaemonPair, name: str) -> None:
    """Something has gone, and hardly anything of what there is."""
    eventually(lambda: moving(pair, name).moved_bytes > 0, f"{name} to move", why=lambda: pair.source.log)
    assert not moving(pair, name).over


def assert_within(result: Result, limit_bytes_s: float) -> None:
    assert (result.outcome, result.error, result.wrong_pages) == ("completed", "", 0)
    assert result.wire_bytes > 12 * MB
    ahead_s = BURST_S + 2 * FRAME_S  # what was not used before; and a frame of each stream, just begun
    assert result.wire_bytes <= limit_bytes_s * (result.total_s + ahead_s)


# -- held -----------------------------------------------------------------------------------------------


def test_migrations_keep_to_their_limits(pair: DaemonPair) -> None:
    """Also with many streams, and while the guest is paused."""
    ways = {"narrow": ("--streams", 1), "wide": ("--streams", 8), "paused": ("--paused",)}
    for name in ways:
        full_guest(pair, name)
    limit = ("--max-bandwidth", "12M")
    started = [pair.start_migration(name, *RAW, *limit, *options) for name, options in ways.items()]
    for process in started:
        assert_within(finish(process).result, 12 * MB)


def test_limits_of_a_configuration() -> None:
    """Of each migration, and of the daemon; a request may lift the first, not the second."""
    source = '[daemon]\nmax_bandwidth = "18M"\n[migration]\nmax_bandwidth = "10M"\n'
    with daemon_pair(source=source) as pair:
        status = pair.source.status()
        assert (status.max_outgoing_bytes_s, status.max_incoming_bytes_s) == (18 * MB, 0)
        ways = {"both": (), "lifted": ("--max-bandwidth", "unlimited")}
        for name in ways:
            full_guest(pair, name)
        started = [pair.start_migration(name, *RAW, *options) for name, options in ways.items()]
        both, lifted = (finish(process).result for process in started)
        assert_within(both, 10 * MB)
        assert_within(lifted, 18 * MB)


def test_where_bandwidth_is_what_holds_a_migration_up_memory_is_compressed(pair: DaemonPair) -> None:
    full_guest(pair, "packed")
    limit = ("--max-bandwidth", "12M")
    result = pair.migrate("packed", "--no-hints", "--compression", "auto", *limit).result
    assert result.outcome == "completed"
    assert result.compression_ratio > 1.3


def test_arrivals_are_taken_in_no_faster_than_configured() -> None:
    with daemon_pair(destination='max_bandwidth = "12M"\n') as pair:
        assert pair.destination.status().max_incoming_bytes_s == 12 * MB
        full_guest(pair, "held-back")
        assert_within(pair.migrate("held-back", *RAW, "--streams", 3).result, 12 * MB)


def test_two_migrations_share_evenly_however_many_streams_they_have(held: DaemonPair) -> None:
    """When the first is through, the other nearly is: neither had to wait for the other."""
    streams = {"narrow": 1, "wide": 8}
    try:
        assert set_(held, "max-bandwidth", "16M").exit_code == 0
        for name, count in streams.items():
            full_guest(held, name)
            held.source.hold(SourceState.BULK, name)
            held.launch(name, streams=count, compression="none", hints=False, verify="off")
            held.source.wait_held(name)
        for name in streams:
            held.source.release(name)
        eventually(lambda: any(moving(held, name).over for name in streams), "the first to end")
        moved = {name: moving(held, name).moved_bytes for name in streams}
        assert min(moved.values()) > max(moved.values()) * 0.7, moved
        assert set_(held, "max-bandwidth", "0").exit_code == 0
        assert {held.ended(name).state for name in streams} == {"completed"}
    finally:
        held.source.release_all()


# -- changed while they run -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["GUEST", "MIGRATION", "daemon"])
def test_a_limit_that_is_lifted_while_a_migration_crawls(pair: DaemonPair, target: str) -> None:
    """It would have taken minutes."""
    name = f"crawler-{target.lower()}"
    full_guest(pair, name)
    whole = target == "daemon"
    if whole:
        assert set_(pair, "max-bandwidth", SNAIL).stdout == "all departures together: max_bandwidth 200K\n"
    asked = {} if whole else {"max_bandwidth_bytes_s": SNAIL}
    migration = pair.launch(name, streams=4, compression="none", hints=False, verify="off", **asked)
    begins_to_move(pair, name)
    assert moving(pair, name).max_bandwidth_bytes_s == (0 if whole else SNAIL)
    aim = {"GUEST": [name], "MIGRATION": [migration[:8]], "daemon": []}[target]
    said = set_(pair, "max-bandwidth", "unlimited", *aim)
    who = "all departures together" if whole else f"migration {migration}"
    assert (said.exit_code, said.stdout) == (0, f"{who}: max_bandwidth unlimited\n")
    assert pair.ended(name).state == "completed"


def test_the_limit_of_arrivals_is_lifted_while_one_crawls(pair: DaemonPair) -> None:
    full_guest(pair, "arriver")
    try:
        assert set_(pair, "max-bandwidth", SNAIL, "--incoming", arrivals=True).exit_code == 0
        pair.launch("arriver", streams=4, compression="none", hints=False, verify="off")
        begins_to_move(pair, "arriver")
        assert pair.destination.status().max_incoming_bytes_s == SNAIL
    finally:
        said = set_(pair, "max-bandwidth", "unlimited", "--incoming", arrivals=True)
    assert said.stdout == "all arrivals together: max_bandwidth unlimited\n"
    assert pair.ended("arriver").state == "completed"


def test_a_limit_that_is_set_on_a_migration_that_had_none(held: DaemonPair) -> None:
    full_guest(held, "reined-in")
    held.source.hold(SourceState.BULK, "bulk")
    process = held.start_migration("reined-in", *RAW)
    held.source.wait_held("bulk")
    assert set_(held, "max-bandwidth", "12M", "reined-in").exit_code == 0
    held.source.release("bulk")
    assert_within(finish(process).result, 12 * MB)


def test_a_migration_that_crawls_is_no_stalled_one_and_can_be_cancelled() -> None:
    """Much slower than ``progress_s`` for a frame of the usual size: frames are smaller then."""
    with daemon_pair(source="[limits]\nprogress_s = 1.5\nping_s = 0.2\n") as pair:
        full_guest(pair, "patient")
        pair.launch("patient", streams=4, max_bandwidth_bytes_s=SNAIL, compression="none", hints=False)
        eventually(lambda: moving(pair, "patient").moved_bytes > 3 * SNAIL, "three seconds' worth")
        assert not moving(pair, "patient").over
        assert pair.cancel("patient").exit_code == 0
        assert pair.ended("patient").state == "cancelled"
        here = pair.source.guest("patient")
        assert here is not None
        assert here.state == "running"


# -- when to pause ------------------------------------------------------------------------------------------


RESTLESS = {
    "downtime_limit_ms": 0.01, "max_iterations": 1_000_000, "max_total_s": 80_000.0,
    "max_bandwidth_bytes_s": 20 * MB,
}  # fmt: skip
"""Never done with a guest that writes 50 MB/s."""


def restless(pair: DaemonPair, name: str) -> None:
    """A migration that iterates on and on."""
    pair.guest(name, workload="write-heavy", rate="50M", live="0.3")
    pair.launch(name, **RESTLESS)
    eventually(lambda: moving(pair, name).state == "iterating", f"{name} to iterate")


def test_a_downtime_limit_that_is_raised_lets_it_end(pair: DaemonPair) -> None:
    restless(pair, "impatient")
    said = set_(pair, "downtime-limit", "5000", "impatient")
    assert said.exit_code == 0
    assert "downtime limit 5000 ms, at most 1000000 iterations and 80000 s, then force" in said.stdout
    assert pair.ended("impatient").state == "completed"


@pytest.mark.parametrize(("budget", "value"), [("max-iterations", "1"), ("max-total", "0.01")])
def test_a_budget_that_is_cut_forces_it_or_gives_it_up(pair: DaemonPair, budget: str, value: str) -> None:
    restless(pair, budget)
    assert set_(pair, "on-exhausted", "cancel", budget).exit_code == 0
    assert set_(pair, budget, value, budget).exit_code == 0
    ended = pair.ended(budget)
    assert ended.state == "failed"
    assert "writes faster than memory moves" in ended.error
    pair.launch(budget, **RESTLESS)
    assert set_(pair, budget, value, budget).exit_code == 0
    assert pair.ended(budget).state == "completed"


def test_options_of_one_migration(pair: DaemonPair) -> None:
    pair.guest("optional", workload="write-heavy", rate="50M", live="0.3")
    options = ("--downtime-limit", "0.01", "--max-iterations", "2", "--max-bandwidth", "20M")
    given_up = pair.migrate("optional", *options, "--on-exhausted", "cancel").result
    assert "writes faster than memory moves" in given_up.error
    assert len(given_up.iterations) == 2
    assert pair.migrate("optional", *options, "--on-exhausted", "force").result.outcome == "completed"


# -- what cannot be ---------------------------------------------------------------------------------------


def test_what_cannot_be_set(pair: DaemonPair) -> None:
    wrong = [
        (("max-bandwidth", "1G", "ghost"), False, "'ghost'"),
        (("downtime-limit", "10", "ghost"), False, "'ghost'"),
        (("max-bandwidth", "1G", "--incoming"), False, "takes no guests in: leave out --incoming"),
        (("max-bandwidth", "1G"), True, "only takes guests in: set its limit with --incoming"),
        (
            ("streams", "4", "vm1"),
            False,
            "Cancel it and migrate again with --streams, or set migration.streams",
        ),
        (("dirty_log", "compare"), False, "migrate again with --dirty-log, or set migration.dirty_log"),
        (("workers", "4"), False, "set daemon.workers in its configuration and restart it"),
    ]
    for arguments, arrivals, complaint in wrong:
        said = set_(pair, *arguments, arrivals=arrivals)
        assert said.exit_code in (1, 2, 3), said
        assert complaint in said.stderr.splitlines()[-1]
        assert said.stdout == ""


def test_a_policy_cannot_change_what_has_been_decided(held: DaemonPair) -> None:
    held.guest("decided", workload="idle")
    held.source.hold(SourceState.SWITCHOVER, "decided")
    held.launch("decided")
    held.source.wait_held("decided")
    said = set_(held, "downtime-limit", "1", "decided")
    held.source.release("decided")
    assert (said.exit_code, said.complaint) == (1, "migd: decided: too late, the migration is switchover")
    assert held.ended("decided").state == "completed"


# -- in flight --------------------------------------------------------------------------------------------


def test_daemons_that_send_to_each_other_with_more_streams_than_room_do_not_stop() -> None:
    """Each has room for 16 frames in each direction, and 24 streams."""
    with daemon_pair(serve=True) as pair:
        names = [f"vm{number}" for number in range(4)]
        for name in names:
            pair.start_guest(name, ram="32Mi", workload="hog")
        for name in names:
            pair.guests[name].ready()
        for name in names[:2]:
            assert pair.migrate(name).exit_code == 0
            eventually(lambda name=name: pair.destination.guest(name), f"{name} there")
        options = {"streams": 12, "hints": False, "compression": "none"}
        for name in names[:2]:
            pair.launch(name, back=True, **options)
        for name in names[2:]:
            pair.launch(name, **options)
        for name, daemon in zip(names, [pair.destination] * 2 + [pair.source] * 2, strict=True):
            last = eventually(
                lambda name=name, daemon=daemon: next(
                    (
                        found
                        for found in reversed(daemon.migrations(name))
                        if found.over and found.direction == "out"
                    ),
                    None,
                ),
                f"the end of {name}",
                why=lambda: pair.source.log,
            )
            assert (last.state, last.error) == ("completed", "")
