"""What an operator sees of migrations while they go on and when they are over, by real commands."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migd.control import commands
from migd.control.commands import ENCODER, REPLIES
from migd.control.events import GuestAttached, Missed
from migd.guest import control
from migd.migration.state import SourceState
from tests.support.pair import DaemonPair, DaemonProcess, daemon_pair, eventually, finish, migd, start_migd

_ACCEPTS = 0x10000
"""The kernel's __SO_ACCEPTCON in /proc/net/unix."""


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair(held=True) as pair:
        yield pair


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """$XDG_RUNTIME_DIR/migd, where the default directories are; ``here`` makes one."""
    directory = Path(tempfile.mkdtemp(prefix="migd-"))
    (directory / "migd").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    yield directory / "migd"
    shutil.rmtree(directory)


def here(home: Path, role: str, daemon: DaemonProcess) -> None:
    """As if this daemon had been started without --runtime-dir."""
    (home / role).symlink_to(daemon.directory)


def document(*arguments: object) -> Any:
    output = migd(*arguments, "--json")
    assert output.exit_code == 0, output
    found = json.loads(output.stdout)
    assert found["schema"] == 1
    return found


def at(daemon: DaemonProcess) -> tuple[str, Path]:
    return ("--runtime-dir", daemon.directory)


# -- which daemon ------------------------------------------------------------------------------------------


def test_commands_find_their_daemon(pair: DaemonPair, home: Path) -> None:
    here(home, "source", pair.source)
    here(home, "destination", pair.destination)
    pair.guest("found", ram="4Mi", workload="idle")
    assert [daemon["role"] for daemon in document("status")["daemons"]] == ["source", "destination"]
    assert [(guest["daemon"], guest["name"]) for guest in document("list")["guests"]] == [("source", "found")]
    begun = document("migrate", "found", "--to", pair.address, "--detach")
    assert migd("wait", "found").exit_code == 0
    result = document("wait", begun["migration"][:8])
    assert (result["direction"], result["outcome"]) == ("out", "completed"), "the source has the result"
    eventually(lambda: pair.source.guest("found") is None, "the guest to have left")
    assert [guest["daemon"] for guest in document("list")["guests"]] == ["destination"]
    past = document("history", "found")["migrations"]
    assert [entry["record"]["direction"] for entry in past if entry["record"]["outcome"] == "completed"]
    assert {entry["record"]["migration"] for entry in past} == {begun["migration"]}
    again = migd("migrate", "found", "--to", pair.address)
    assert again.exit_code == 1
    assert "no guest 'found' is attached here" in again.complaint
    pair.discard("found")


def test_a_new_guest_finds_its_daemon(pair: DaemonPair, home: Path) -> None:
    here(home, "source", pair.source)
    guest = start_migd("guest", "--name", "newcomer", "--ram", "4Mi", "--workload", "idle")
    try:
        eventually(lambda: pair.source.guest("newcomer"), "the guest")
    finally:
        guest.terminate()
        finish(guest)


def test_several_daemons_that_could_be_meant(pair: DaemonPair, home: Path) -> None:
    with daemon_pair(serve=True) as other:
        here(home, "source", pair.source)
        here(home, "serve", other.source)
        for owner in (pair, other):
            owner.guest("twin", ram="4Mi", workload="idle")
        other.guest("only", ram="4Mi", workload="idle")
        output = migd("migrate", "twin", "--to", pair.address)
        assert output.exit_code == 2
        assert output.complaint == (
            f"migd: 'twin' is known to several daemons (serve in {home}/serve and source in {home}/source): "
            "name one with --runtime-dir"
        )
        assert migd("migrate", "only", "--to", pair.address).exit_code == 0
        lines = [json.loads(line) for line in migd("events").stdout.splitlines()]
        assert {event["daemon"] for event in lines} == {"serve", "source"}
        for name in ("twin", "only"):
            other.discard(name)
            pair.discard(name)


def test_no_daemon_here_can_do_it(pair: DaemonPair, home: Path) -> None:
    nobody = migd("list")
    assert (nobody.exit_code, nobody.stdout) == (2, "")
    assert nobody.complaint.startswith(
        f"migd: no migd daemon answers in {home} (serve, source, destination);"
    )
    here(home, "destination", pair.destination)
    output = migd("migrate", "vm1", "--to", pair.address)
    assert output.exit_code == 2
    assert output.complaint == (
        f"migd: no daemon here sends guests away (destination in {home}/destination): start one with "
        "`migd serve`"
    )


# -- following one -----------------------------------------------------------------------------------------


def begun(pair: DaemonPair, name: str, state: SourceState) -> str:
    """The id of a migration that is held in this state."""
    pair.guest(name, ram="16Mi", workload="write-heavy", rate="200M")
    pair.source.hold(state, name)
    output = migd(
        "migrate", name, "--to", pair.address, "--detach", "--downtime-limit", "0.001", *at(pair.source)
    )
    assert (output.exit_code, output.stderr) == (0, "")
    pair.source.wait_held(name)
    return output.stdout.strip()


def test_a_detached_migration_is_followed_left_alone_and_waited_for(pair: DaemonPair) -> None:
    migration = begun(pair, "followed", SourceState.ITERATING)
    assert len(migration) == 32
    attached = start_migd("attach", migration[:6], *at(pair.source))
    assert attached.stderr is not None
    assert attached.stderr.readline().startswith("bulk stage: ")
    attached.send_signal(signal.SIGINT)
    output = finish(attached)
    assert (output.exit_code, output.stdout) == (124, "")
    assert output.stderr.splitlines()[-1] == (
        f"migd: detached: the migration goes on, `migd attach {migration[:6]}` follows it again"
    )
    impatient = migd("wait", "followed", "--timeout", "0.2", *at(pair.source))
    assert (impatient.exit_code, impatient.stdout) == (124, "")
    assert impatient.complaint == ("migd: followed: the migration is not over after 0.2 s, it is iterating")
    listed = migd("list", *at(pair.source)).stdout
    assert f"migration  {migration[:8]}" in listed
    assert f"-> {pair.address}" in listed
    watchers = {
        "source": start_migd("wait", migration[:4], *at(pair.source)),
        "destination": start_migd("wait", "followed", *at(pair.destination)),
        "eyes": start_migd("attach", "followed", *at(pair.source)),
        "json": start_migd("attach", "followed", "--json", *at(pair.source)),
    }
    pair.source.release("followed")
    outputs = {name: finish(watcher) for name, watcher in watchers.items()}
    assert [output.exit_code for output in outputs.values()] == [0] * 4
    for name in ("source", "destination"):
        assert (outputs[name].stdout, outputs[name].stderr) == ("", "")
    assert outputs["eyes"].stdout.startswith(f"followed -> {pair.address}: completed\n")
    assert json.loads(outputs["json"].stdout)["migration"] == migration
    eventually(lambda: "no migration" in migd("list", *at(pair.source)).stdout, "nothing to go on")
    pair.discard("followed")


def test_a_result_is_remembered_with_its_exit_code(pair: DaemonPair) -> None:
    migration = begun(pair, "given-up", SourceState.BULK)
    cancelled = document("cancel", migration[:4], *at(pair.source))
    assert (cancelled["migration"], cancelled["text"]) == (migration, f"cancelling {migration}")
    pair.source.release_all()
    assert migd("wait", "given-up", *at(pair.source)).exit_code == 130
    arrival = migd("wait", "given-up", "--json", *at(pair.destination))
    assert arrival.exit_code == 1
    assert json.loads(arrival.stdout)["outcome"] == "aborted"
    assert pair.source.stop() == 0
    pair.source.restart()
    assert migd("wait", migration[:5], *at(pair.source)).exit_code == 130
    shown = migd("attach", "given-up", *at(pair.source))
    assert shown.exit_code == 130
    assert shown.stdout.startswith(f"given-up -> {pair.address}: cancelled: ")
    pair.discard("given-up")


def test_nothing_to_follow(pair: DaemonPair) -> None:
    for command in ("attach", "wait"):
        output = migd(command, "ghost", "--json", *at(pair.source))
        assert output.exit_code == 1
        assert json.loads(output.stdout)["error"].startswith("'ghost' is in no migration here")
    output = migd("history", "ghost", *at(pair.source))
    assert output.exit_code == 1
    assert output.complaint == "migd: 'ghost' is in no migration that is remembered here"


# -- the past ----------------------------------------------------------------------------------------------


def test_history_as_lines_and_as_results(pair: DaemonPair) -> None:
    guest = pair.guest("historic", ram="4Mi", workload="idle")
    result = pair.migrate(guest.name).result
    lines = migd("history", "--limit", "1", *at(pair.source)).stdout.splitlines()
    assert len(lines) == 2, lines
    assert result.migration[:8] in lines[1]
    assert f"historic  ->  {pair.address}  completed" in lines[1]
    whole = migd("history", result.migration[:8], *at(pair.source)).stdout
    assert whole.startswith(f"historic -> {pair.address}: completed\n")
    assert "pages of RAM" in whole
    eventually(lambda: "historic" in migd("history", *at(pair.destination)).stdout, "the arrival's end")
    there = migd("history", result.migration, *at(pair.destination)).stdout
    assert there.startswith("historic <- migd ")
    assert "4 MiB of RAM" in there
    (entry,) = document("history", result.migration, *at(pair.source))["migrations"]
    assert entry["record"]["total_s"] == result.total_s
    assert entry["ended"].endswith("Z")
    pair.discard(guest.name)


# -- events ------------------------------------------------------------------------------------------------


def events(*arguments: object) -> list[Any]:
    output = migd("events", *arguments)
    assert (output.exit_code, output.stderr) == (0, "")
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_events_are_printed_and_followed(pair: DaemonPair) -> None:
    last = max((event["seq"] for event in events(*at(pair.source))), default=0)
    follower = start_migd("events", "--follow", "--since", last, "--json", *at(pair.source))
    guest = pair.guest("newsworthy", ram="4Mi", workload="idle")
    assert follower.stdout is not None
    first = json.loads(follower.stdout.readline())
    assert (first["type"], first["guest"], first["seq"]) == ("guest-attached", guest.name, last + 1)
    assert (first["schema"], first["state"], first["ram_bytes"]) == (1, "running", 4 << 20)
    migration = pair.migrate(guest.name).result.migration
    told = [first]
    while not {"guest-detached", "migration-finished"} <= {event["type"] for event in told}:
        told.append(json.loads(follower.stdout.readline()))
    follower.send_signal(signal.SIGINT)
    assert finish(follower).exit_code == 0
    assert [event["seq"] for event in told] == list(range(last + 1, last + 1 + len(told)))
    assert told == events("--since", last, *at(pair.source))
    ends = [event for event in told if event["type"] == "migration-finished"]
    assert [(event["migration"], event["outcome"]) for event in ends] == [(migration, "completed")]
    pair.discard(guest.name)


def test_a_follower_of_a_daemon_that_ends_is_told_so() -> None:
    daemon = DaemonProcess("source", "")
    try:
        daemon.start()
        daemon.ready()
        follower = start_migd("events", "--follow", *at(daemon))
        eventually(lambda: follows(daemon), "the follower")
        assert daemon.stop() == 0
        output = finish(follower)
        assert output.exit_code == 1
        assert output.complaint == f"migd: the daemon at {daemon.directory}/control.sock has ended"
    finally:
        daemon.close()


def follows(daemon: DaemonProcess) -> bool:
    """Somebody is connected to the command socket, and stays: the first connection only asks who is there."""
    before = _connected(daemon)
    time.sleep(0.2)
    return bool(before & _connected(daemon))


def _connected(daemon: DaemonProcess) -> set[str]:
    """Its connections, without the listener (whose flags say that it accepts)."""
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines():
        if line.endswith(f" {daemon.directory}/control.sock"):
            _, _, _, flags, _, _, inode, _ = line.split()
            if not int(flags, 16) & _ACCEPTS:
                found.add(inode)
    return found


def test_a_follower_that_does_not_read_holds_nobody_up_and_hears_what_it_missed(pair: DaemonPair) -> None:
    visit(pair.source, "somebody-before")
    with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as lines:
        sock.settimeout(30)
        sock.connect(str(pair.source.directory / "control.sock"))
        sock.sendall(ENCODER.encode(commands.Events(follow=True)) + b"\n")
        assert REPLIES.decode(lines.readline()).seq == 1  # type: ignore[union-attr]
        visits = 1500
        for number in range(visits):
            visit(pair.source, f"passer-by-{number}")
        assert migd("status", *at(pair.source)).exit_code == 0
        told = [REPLIES.decode(lines.readline())]
        while not (isinstance(told[-1], GuestAttached) and told[-1].guest == f"passer-by-{visits - 1}"):
            told.append(REPLIES.decode(lines.readline()))
        missed = [event for event in told if isinstance(event, Missed)]
        assert missed
        assert told[0].seq == 2  # type: ignore[union-attr]
        heard = len(told) - len(missed) + sum(event.events for event in missed)
        assert told[-1].seq == heard + 1  # type: ignore[union-attr]


def visit(daemon: DaemonProcess, name: str) -> None:
    """A guest of one page that attaches and goes: two events."""
    with control.new_socket() as sock:
        sock.settimeout(30)
        sock.connect(str(daemon.directory / "guest.sock"))
        block = control.Block("ram", 1)
        control.send(
            sock,
            control.Attach(
                version=control.VERSION, name=name, pid=1, state=control.GuestState.RUNNING, blocks=(block,)
            ),
        )
        packet = control.receive_from_daemon(sock)
        assert packet is not None
        assert isinstance(packet[0], control.Attached), packet
        control.close_all(packet[1])


# -- several commands at once, and other versions ----------------------------------------------------------


def test_commands_do_not_disturb_each_other(pair: DaemonPair) -> None:
    migration = begun(pair, "busy", SourceState.BULK)
    asked: list[subprocess.Popen[str]] = []
    for _ in range(3):
        asked += [
            start_migd(command, "--json", *at(pair.source)) for command in ("status", "list", "history")
        ]
        asked.append(start_migd("wait", migration[:4], *at(pair.source)))
    pair.source.release_all()
    assert [finish(process).exit_code for process in asked] == [0] * len(asked)
    pair.discard("busy")


@pytest.mark.parametrize("command", ["list", "history", "wait", "attach", "events"])
@pytest.mark.parametrize("answer", [b'{"type":"news"}\n', b'{"type":"moving","state":1}\n', b"\xff\n"])
def test_a_daemon_that_answers_in_another_version(tmp_path: Path, command: str, answer: bytes) -> None:
    arguments = ["vm1"] if command in ("wait", "attach") else []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "control.sock"))
        server.listen()
        server.settimeout(30)
        process = start_migd(command, *arguments, "--runtime-dir", tmp_path)
        connection, _ = server.accept()
        with connection:
            connection.sendall(answer)
            output = finish(process)
    assert (output.exit_code, output.stdout) == (1, "")
    assert "restart the daemon with the version that is installed" in output.complaint
