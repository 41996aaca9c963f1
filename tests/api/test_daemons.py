"""Daemons and guests that the public Python API starts, finds and ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from migd import api
from migd.errors import (
    ConfigError,
    GuestError,
    MigdError,
    OutcomeUnknown,
    ResourceError,
    TimedOut,
)
from tests.support.script import left_behind


def test_daemons_of_one_role_are_private_and_leave_nothing(private: Path) -> None:
    with api.start_daemon("source", {"migration": {"streams": 5}}) as source:
        with api.start_daemon("destination") as destination:
            assert source.status().role == "source"
            with pytest.raises(ConfigError, match="takes no guests in: it is a source"):
                _ = source.address
            assert destination.address.startswith("127.0.0.1:")
            assert destination.pid == destination.status().pid
            guest = source.start_guest("vm1", ram="8Mi", workload="idle").ready()
            assert source.migrate("vm1", destination).wait().check().streams == 5
            arrived = destination.guest("vm1")
            assert left_behind(private)
        assert not arrived.alive
        assert "ready in" in destination.log
        assert arrived.log == ""
        assert guest.wait() == 0
    assert left_behind(private) == []
    source.close()


def test_an_arrived_guest_outlives_its_daemon_but_not_its_owner(private: Path) -> None:
    with api.start_pair() as pair:
        pair.guest("vm1", ram="8Mi")
        pair.migrate("vm1").check()
        arrived = pair.destination.guest("vm1")
        os.kill(pair.destination.pid, signal.SIGKILL)
        pair.destination.process.wait()
        assert not pair.alive
        assert arrived.alive
        with pytest.raises(ConfigError, match="no migd daemon answers"):
            pair.destination.status()
    assert not arrived.alive
    assert left_behind(private) == []


def test_a_daemon_that_dies_loses_its_migration(silent: str) -> None:
    with api.start_daemon("source") as source:
        source.start_guest("vm1", ram="8Mi", workload="idle").ready()
        migration = source.migrate("vm1", silent)
        os.kill(source.pid, signal.SIGKILL)
        with pytest.raises(OutcomeUnknown, match=rf"the daemon ended before migration {migration.id} did"):
            migration.wait()
        with pytest.raises(OutcomeUnknown):
            list(migration.follow())


def test_a_named_directory_is_kept_and_can_be_used_again(private: Path) -> None:
    directory = private / "mine"
    for _ in range(2):
        with api.start_daemon("source", runtime_dir=directory) as daemon:
            assert api.connect(directory).pid == daemon.pid
            assert daemon.stop() == 0
        assert (directory / "journal").is_dir()
        assert left_behind(private) == [str(directory)]


def test_a_body_that_raises_leaves_nothing(private: Path) -> None:
    with pytest.raises(ZeroDivisionError), api.start_daemon("source") as daemon:  # noqa: PT012
        daemon.start_guest("vm1", ram="8Mi")
        _ = 1 // 0
    assert left_behind(private) == []


@pytest.mark.parametrize(
    ("role", "config", "kind", "complaint"),
    [
        ("both", {}, ConfigError, "'both' is no role of a daemon: serve, source, destination"),
        ("source", {"migration": {"stream": 4}}, ConfigError, "config: unknown key migration.stream"),
        ("source", {"migration": {"streams": 0}}, ConfigError, "config: migration.streams: Expected"),
        ("destination", {"destination": {"listen": "0.0.0.0:0"}}, ConfigError, "insecure_plaintext"),
    ],
)  # fmt: skip
def test_daemons_that_cannot_start(
    private: Path, role: str, config: dict[str, dict[str, int]], kind: type[MigdError], complaint: str
) -> None:
    with pytest.raises(kind) as caught:
        api.start_daemon(role, config)
    assert complaint in str(caught.value)
    assert left_behind(private) == []


def test_what_the_host_refuses_a_daemon(pair: api.DaemonPair) -> None:
    with pytest.raises(ResourceError, match=r"ended with 3: cannot listen on .* Address already in use"):
        api.start_daemon("destination", {"destination": {"listen": pair.destination.address}})
    with pytest.raises(ResourceError, match=r"ended with 3: another migd daemon uses "):
        api.start_daemon("source", runtime_dir=pair.source.runtime_dir)
    assert pair.alive


def test_connecting(pair: api.DaemonPair, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = api.connect(pair.source.runtime_dir)
    assert found.pid == pair.source.pid
    assert not isinstance(found, api.OwnedDaemon)
    with pytest.raises(ConfigError, match="no migd daemon answers at"):
        api.connect(private)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(private))
    with pytest.raises(ConfigError, match="no migd daemon answers at"):
        api.connect()
    (private / "migd").mkdir(mode=0o700)
    with api.start_daemon("destination", runtime_dir=private / "migd" / "destination") as daemon:
        assert api.connect().pid == daemon.pid


def test_a_guest_says_what_is_wrong_with_it(pair: api.DaemonPair) -> None:
    for options, complaint in (
        ({"workload": "gaming"}, "'gaming' is not one of"),
        ({"speed": 3}, "No such option"),
        ({"live": 2.0}, "--live"),
    ):
        guest = pair.source.start_guest("wrong", ram="8Mi", **options)
        with pytest.raises(GuestError, match="guest wrong ended with 2: ") as caught:
            guest.ready()
        assert complaint in str(caught.value)
        assert guest.exit_code == 2


def test_waiting_for_a_guest_is_bounded(pair: api.DaemonPair) -> None:
    guest = pair.source.start_guest("slow", ram="8Mi", workload="idle", fill=["/etc/passwd", "/etc/group"])
    with pytest.raises(TimedOut, match=r"guest slow was not ready after 0 s"):
        guest.ready(0)
    with pytest.raises(TimedOut, match=r"guest slow had not ended after 0 s"):
        guest.wait(0)
    assert guest.exit_code is None
    assert guest.ready().filled
    guest.end()
    assert guest.exit_code == 0
    guest.end()
