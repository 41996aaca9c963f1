"""`migd clean`: what nobody needs goes; what decides who runs a guest, and what lives, stays."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from migd.cli.clean import Cleaning
from migd.cli.main import main
from migd.control.commands import GuestStatus
from migd.errors import ResourceError
from migd.host import RuntimeDir
from migd.leftovers.guests import GuestProcess, _name, guest_processes
from migd.leftovers.remains import Remains
from migd.migration.journal import Journal, Mark, Record
from migd.wire import messages
from tests.support.pair import (
    DaemonPair,
    DaemonProcess,
    daemon_pair,
    eventually,
    processes_naming,
    ram_digest,
)
from tests.support.raw_peer import RawPeer, new_id

ID = "0123456789abcdef" * 2


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory that a daemon was in, and no usual ones but this."""
    with tempfile.TemporaryDirectory(prefix="migd-c-") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        path = Path(base) / "migd" / "source"
        with RuntimeDir(path):
            pass
        yield path


def clean(*arguments: object) -> Cleaning:
    done = CliRunner().invoke(main, ["clean", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return msgspec.json.decode(done.stdout, type=Cleaning)


def journal(place: Path, side: str, *marks: Mark, migration: str = ID, guest: str = "nobody-1") -> Path:
    for mark in marks:
        record = Record(migration=migration, mark=mark, guest=guest, peer="there:7440")
        Journal(place / "journal" / side).append(record)
    return place / "journal" / side / f"{migration}.jsonl"


# -- journals ---------------------------------------------------------------------------------------------

OVER = [
    ("source", [Mark.ABORTED], "over: guest nobody-1 ran on here"),
    ("source", [Mark.GO, Mark.ABORTED], "over: guest nobody-1 ran on here"),
    ("source", [Mark.GO, Mark.STARTED, Mark.RELEASED], "over: guest nobody-1 left for there:7440"),
    ("source", [Mark.GO, Mark.RELEASED], "over: guest nobody-1 left for there:7440"),
    ("destination", [Mark.ABORTED], "over: guest nobody-1 was never started here"),
    ("destination", [Mark.READY, Mark.ABORTED], "over: guest nobody-1 was never started here"),
]
UNDECIDED = [
    ("source", [Mark.GO], "only it knows who runs guest nobody-1. Start the daemon here again"),
    ("source", [Mark.GO, Mark.STARTED], "a paused copy of it must not be resumed"),
    ("source", [Mark.READY], "ready is no record of a source"),
    ("destination", [Mark.READY], "its source may still ask"),
    ("destination", [Mark.READY, Mark.STARTED], "only this record keeps it from resuming its own copy"),
    ("source", [Mark.GO, Mark.STARTED, Mark.CONDEMNED], "it stays paused here and at there:7440"),
    ("source", [Mark.VERIFIED], "verified is no record of a source"),
    ("destination", [Mark.READY, Mark.STARTED, Mark.VERIFIED], "only this record keeps it from resuming"),
    ("destination", [Mark.READY, Mark.STARTED, Mark.CONDEMNED], "was bad (): it stays paused here"),
    ("destination", [Mark.GO], "go is no record of a destination"),
    ("destination", [Mark.RELEASED], "released is no record of a destination"),
]


@pytest.mark.parametrize(("side", "marks", "why"), OVER)
def test_a_journal_that_is_over_goes(place: Path, side: str, marks: list[Mark], why: str) -> None:
    path = journal(place, side, *marks)
    (only,) = clean().removed
    assert (only.kind, only.place) == ("journal", str(path))
    assert why in only.why
    assert not path.exists()


@pytest.mark.parametrize(("side", "marks", "why"), UNDECIDED)
def test_a_journal_that_still_decides_stays(place: Path, side: str, marks: list[Mark], why: str) -> None:
    path = journal(place, side, *marks)
    before = path.read_bytes()
    found = clean()
    assert found.removed == []
    (only,) = found.kept
    assert (only.kind, only.place) == ("journal", str(path))
    assert why in only.why
    assert path.read_bytes() == before


def test_every_last_mark_of_either_side_is_judged() -> None:
    """A mark that is added to the journal needs a row above."""
    judged = {(side, marks[-1]) for side, marks, _ in OVER + UNDECIDED}
    assert judged == {(side, mark) for side in ("source", "destination") for mark in Mark}


@pytest.mark.parametrize(
    "content",
    [
        b"garbage\n",
        b'{"format":99,"software":"migd 9","migration":"x"}\n',
        b'{"format":2,"software":"","migration":"x","mark":"over"}\n',
    ],
    ids=["garbage", "a later format", "an unknown mark"],
)
@pytest.mark.parametrize("behind", [(), (Mark.ABORTED,)])
def test_a_journal_that_cannot_be_read_stays(place: Path, content: bytes, behind: tuple[Mark, ...]) -> None:
    path = journal(place, "source", *behind) if behind else place / "journal" / "source" / f"{ID}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
    (only,) = clean().kept
    assert only.why.startswith("cannot be read, and so may decide something: ")
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b'{"format":2,"softw'])
def test_a_journal_whose_only_record_is_torn_goes(place: Path, content: bytes) -> None:
    """A record is on the disk as a whole before anything that it announces."""
    path = place / "journal" / "destination" / f"{ID}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (only,) = clean().removed
    assert only.why == "no record in it was completed: nothing came of it"
    assert not path.exists()


def test_what_is_torn_behind_a_record_that_decides_changes_nothing(place: Path) -> None:
    path = journal(place, "source", Mark.GO)
    with path.open("ab") as file:
        file.write(b'{"format":2,"software":"migd","migration":"%s","mark":"aborted"' % ID.encode())
    assert [kept.place for kept in clean().kept] == [str(path)]


# -- guests that live -------------------------------------------------------------------------------------


@contextlib.contextmanager
def living(*arguments: str, memfd: str = "") -> Iterator[int]:
    """A process with these arguments, that holds a memfd if one is named; its pid."""
    script = (
        f"import os, sys\nfd = os.memfd_create({memfd!r}) if {memfd!r} else -1\nprint(flush=True)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        assert process.poll() is None  # nobody ended it
    finally:
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "memfd"),
    [
        (["migd", "guest", "--name", "nobody-1"], ""),
        (["/usr/bin/migd", "guest", "--name=nobody-1", "--ram", "1Gi"], ""),
        (["an-emulator"], "migd-ram"),
    ],
    ids=["by its arguments", "by its arguments, otherwise written", "by the RAM it holds"],
)
def test_a_released_guest_that_may_live_keeps_its_record(
    place: Path, arguments: list[str], memfd: str
) -> None:
    """RELEASED means that it was told to end, not that it did: without the record it would be resumed."""
    path = journal(place, "source", Mark.GO, Mark.RELEASED)
    with living(*arguments, memfd=memfd) as pid:
        (kept,) = [kept for kept in clean().kept if kept.kind == "journal"]
        assert re.search(
            rf"but process .*\b{pid}\b.* may be its copy here, which must not be resumed", kept.why
        )
        assert path.exists()
    clean()
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "name"), [((), ""), (("--name",), ""), (("--name", "a"), "a"), (("x", "--name=b"), "b")]
)
def test_the_name_of_a_guest_by_its_arguments(arguments: tuple[str, ...], name: str) -> None:
    """A process that is just being killed has its descriptors still, and no arguments any more."""
    assert _name(arguments, "python3") == name


def test_a_qemu_of_ours_is_known_by_its_monitor_as_its_guest_and_no_other(place: Path) -> None:
    monitor = f"unix:{place}/qemu-vm-7/qmp,server=on,wait=off"
    with living("qemu-system-x86_64", "-qmp", monitor, memfd="migd-ram") as pid:
        (found,) = [guest for guest in guest_processes() if guest.pid == pid]
        assert found.name == "vm-7"
        assert found.may_be("vm-7", place)
        assert not found.may_be("nobody-1", place)
        assert not found.may_be("vm-7", HERE)


def test_another_guest_that_lives_keeps_no_record(place: Path) -> None:
    path = journal(place, "source", Mark.GO, Mark.RELEASED)
    with living("migd", "guest", "--name", "nobody-2", memfd="migd-ram"):
        clean()
    assert not path.exists()


HERE = Path("/")


@pytest.mark.parametrize("way", ["{path}", "{relative}", "{link}", "--socket={path}"])
def test_a_guest_of_another_daemon_is_not_ours_whatever_its_name(place: Path, way: str) -> None:
    """And ours is ours, by whatever path it was told."""
    (place / "link").symlink_to(place)
    word = way.format(path=place, relative=os.path.relpath(place), link=place / "link")
    with living("migd", "guest", "--name", "shown", f"{word}/guest.sock", memfd="migd-ram") as pid:
        (found,) = [guest for guest in guest_processes() if guest.pid == pid]
        assert not found.may_be("shown", HERE)
        assert found.may_be("shown", place)
        assert (found.belongs_to(HERE), found.belongs_to(place)) == (False, True)


def test_a_guest_whose_directory_is_gone_may_be_anybodys() -> None:
    with living("migd", "guest", "--name", "shown", "--socket", "/not/there/guest.sock") as pid:
        (found,) = [guest for guest in guest_processes() if guest.pid == pid]
        assert found.home is None
        assert found.may_be("shown", HERE)


def test_a_name_that_is_cut_in_the_process_list_still_is_known() -> None:
    def shown(name: str) -> GuestProcess:
        return GuestProcess(pid=1, name=name, home=None, files=frozenset())

    assert shown("a-guest-na").may_be("a-guest-named-long", HERE)
    assert shown("a-guest-na").may_be("a-guest-na", HERE)
    assert not shown("a-guest-n").may_be("a-guest-named-long", HERE)
    assert not shown("a-guest-na").may_be("another", HERE)


def test_guests_are_known_by_what_they_show() -> None:
    with living("migd", "guest", "--name", "shown") as by_name, living("x", memfd="migd-ram") as by_ram:
        found = {guest.pid: guest for guest in guest_processes()}
        assert found[by_name].name == "shown"
        assert found[by_name].may_be("shown", HERE)
        assert not found[by_name].may_be("show", HERE)
        assert found[by_ram].name == ""
        assert found[by_ram].may_be("anybody", HERE)
        assert os.getpid() not in found


def test_what_only_mentions_a_guest_is_none() -> None:
    with living("migd", "status") as first, living("the", "guest", "list") as second:
        assert not {first, second} & {guest.pid for guest in guest_processes()}


# -- sockets, logs, files of RAM ----------------------------------------------------------------------------


def test_stale_sockets_go(place: Path) -> None:
    for name in ("control.sock", "guest.sock"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(place / name))
    (place / "other.sock").touch()
    assert [gone.place for gone in clean().removed] == [
        str(place / "control.sock"),
        str(place / "guest.sock"),
    ]
    assert sorted(path.name for path in place.iterdir()) == ["lock", "other.sock"]


def test_a_file_that_only_is_called_like_a_socket_stays(place: Path) -> None:
    (place / "control.sock").write_text("precious")
    assert clean().removed == []
    assert (place / "control.sock").read_text() == "precious"


def test_logs_of_guests_that_are_gone_go(place: Path) -> None:
    gone, written = place / "guest-gone.log", place / "guest-here.log"
    for path in (gone, written, place / "notes.log"):
        path.touch()
    with living("migd", "guest", "--name", "here"):
        found = clean()
    assert [item.place for item in found.removed] == [str(gone)]
    assert [item.place for item in found.kept if item.kind == "log"] == [str(written)]
    assert sorted(path.name for path in place.iterdir()) == ["guest-here.log", "lock", "notes.log"]


def test_ram_that_nobody_has_open_goes(place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="migd-c-", dir="/dev/shm") as directory:
        left, used, other = (
            Path(directory) / name for name in ("migd-vm-ram-0a0b0c0d", "migd-vm-ram-00000000", "x")
        )
        for path in (left, used, other):
            path.touch()
        config = place / "config.toml"
        config.write_text(f'[daemon]\nram = "{directory}"\n')
        with used.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert [gone.place for gone in clean("--config", config).removed] == [str(left)]
        assert sorted(path.name for path in Path(directory).iterdir()) == [used.name, "x"]


def test_a_ram_directory_that_is_none_ends_it_before_anything_is_removed(place: Path) -> None:
    path = journal(place, "source", Mark.ABORTED)
    config = place / "config.toml"
    config.write_text('[daemon]\nram = "/proc"\n')
    done = CliRunner().invoke(main, ["clean", "--config", str(config)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "daemon.ram: /proc is neither on tmpfs nor on hugetlbfs" in done.stderr
    assert path.exists()


# -- the command --------------------------------------------------------------------------------------------


def test_a_dry_run_removes_nothing(place: Path) -> None:
    path = journal(place, "source", Mark.ABORTED)
    (place / "guest-gone.log").touch()
    dry = clean("--dry-run")
    assert dry.dry_run
    assert path.exists()
    assert (place / "guest-gone.log").exists()
    wet = clean()
    assert (wet.dry_run, wet.removed, wet.kept) == (False, dry.removed, dry.kept)
    assert clean().removed == []


def test_as_text(place: Path) -> None:
    over = journal(place, "source", Mark.ABORTED)
    undecided = journal(place, "source", Mark.GO, migration="f" * 32)
    dry = CliRunner().invoke(main, ["clean", "--dry-run"]).stdout.splitlines()
    assert dry[0] == f"would remove journal {over}: over: guest nobody-1 ran on here"
    wet = CliRunner().invoke(main, ["clean"]).stdout.splitlines()
    assert wet[0] == f"removed journal {over}: over: guest nobody-1 ran on here"
    assert wet[1].startswith(f"kept journal {undecided}: GO was sent to there:7440 and no answer came")
    assert wet[2] == "removed 1, kept 1, failed 0"


def test_a_directory_that_a_daemon_uses_is_left_alone(place: Path) -> None:
    path = journal(place, "source", Mark.ABORTED)
    with RuntimeDir(place):
        (kept,) = clean().kept
        assert (kept.kind, kept.place) == ("directory", str(place))
        assert kept.why == f"another migd daemon uses {place}"
        named = CliRunner().invoke(main, ["clean", "--runtime-dir", str(place)])
        assert (named.exit_code, named.stdout) == (3, "")
        assert named.stderr == f"migd: another migd daemon uses {place}\n"
    assert path.exists()


def test_no_daemon_can_start_while_a_directory_is_cleaned(place: Path) -> None:
    with Remains(place), pytest.raises(ResourceError, match="another migd daemon uses"):
        RuntimeDir(place).__enter__()
    with RuntimeDir(place):
        pass


def test_a_directory_that_is_no_runtime_directory_is_not_made_one(tmp_path: Path) -> None:
    (tmp_path / "control.sock").touch()
    for path in (tmp_path, tmp_path / "not-there"):
        done = CliRunner().invoke(main, ["clean", "--runtime-dir", str(path)])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == f"migd: {path} is no runtime directory of a migd daemon\n"
    assert [path.name for path in tmp_path.iterdir()] == ["control.sock"]


def test_nothing_to_clean(place: Path) -> None:
    assert CliRunner().invoke(main, ["clean"]).stdout == "removed 0, kept 0, failed 0\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a file that cannot be removed")
def test_what_cannot_be_removed_is_said_and_the_rest_goes(place: Path) -> None:
    stuck, path = journal(place, "source", Mark.ABORTED), place / "guest-gone.log"
    path.touch()
    if subprocess.run(["chattr", "+i", str(stuck)], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        done = CliRunner().invoke(main, ["clean", "--json"])
    finally:
        subprocess.run(["chattr", "-i", str(stuck)], check=True)
    found = msgspec.json.decode(done.stdout, type=Cleaning)
    assert done.exit_code == 1
    assert [failed.place for failed in found.failed] == [str(stuck)]
    assert "Operation not permitted" in found.failed[0].why
    assert stuck.exists()
    assert not path.exists()


# -- after a real crash -------------------------------------------------------------------------------------


def test_the_answer_to_go_is_the_same_after_cleaning() -> None:
    """Why a destination's ABORTED may go: one that knows nothing of a migration says the same, durably."""
    daemon = DaemonProcess("destination", '[destination]\nlisten = "127.0.0.1:0"\n')
    migration = new_id()
    try:
        daemon.start()
        daemon.ready()
        for _ in range(2):
            with contextlib.closing(RawPeer.connect(daemon.address)) as peer:
                peer.send(messages.Go(migration=migration))
                assert isinstance(peer.message(), messages.Aborted)
            daemon.kill()
            (gone,) = [
                item for item in clean("--runtime-dir", daemon.directory).removed if item.kind == "journal"
            ]
            assert Path(gone.place).stem == migration
            daemon.restart()
    finally:
        daemon.close()


@pytest.fixture
def held() -> Iterator[DaemonPair]:
    with daemon_pair(held=True) as pair:
        yield pair


def test_after_a_crash_of_both_daemons_cleaning_costs_nobody_a_guest(held: DaemonPair) -> None:
    """One guest between GO and STARTED, one between READY and GO, one that stayed, all both sides killed."""
    held.guest("stayed", ram="8Mi")
    held.guest("started", ram="8Mi")
    held.guest("waiting", ram="8Mi")
    held.source.hold("verifying", "started")
    held.launch("started")
    held.source.wait_held("started")
    held.source.hold("awaiting-ready", "waiting")
    held.launch("waiting")
    held.source.wait_held("waiting")
    eventually(lambda: _records(held, "destination", Mark.READY), "READY of the other")
    held.source.kill()
    held.destination.kill()
    processes = sorted(_incoming(held))

    there = clean("--runtime-dir", held.destination.directory)
    here = clean("--runtime-dir", held.source.directory)

    assert sorted(_incoming(held)) == processes
    assert [Path(item.place).name for item in here.removed] == ["control.sock", "guest.sock"]
    assert [Path(item.place).name for item in there.removed] == ["control.sock", "guest.sock"]
    assert [item.why.split()[0] for item in here.kept if item.kind == "journal"] == ["GO"]
    assert len([item for item in there.kept if item.kind == "journal"]) == 2
    assert len([item for item in there.kept if item.kind == "guest"]) == len(processes)

    held.destination.restart()
    held.source.restart()
    for name, daemon in (("started", held.destination), ("waiting", held.source), ("stayed", held.source)):
        guest = eventually(lambda name=name, daemon=daemon: _running(daemon, name), f"{name} to run")
        before = ram_digest(guest.pid)
        eventually(lambda guest=guest, before=before: ram_digest(guest.pid) != before, f"{name} to write")
    assert _running(held.source, "started") is None
    assert _running(held.destination, "waiting") is None


def _records(pair: DaemonPair, side: str, mark: Mark) -> list[Path]:
    directory = getattr(pair, side).directory / "journal" / side
    return [
        path
        for path in directory.glob("*.jsonl")
        if (lines := path.read_bytes().splitlines()) and json.loads(lines[-1])["mark"] == mark
    ]


def _incoming(pair: DaemonPair) -> list[int]:
    """Those that became guests: spare processes end with their daemon."""
    pids = processes_naming("migd.guest.incoming", f"{pair.destination.directory}/guest.sock")
    return [pid for pid in pids if ram_digest(pid)]


def _running(daemon: DaemonProcess, name: str) -> GuestStatus | None:
    found = daemon.guest(name)
    return found if found is not None and found.state == "running" else None
