"""The command line as an operator meets it: real processes, one clear line for whatever is wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from migd.cli.main import main
from migd.cli.options import Size
from migd.errors import EXIT_CODES
from tests.support.pair import DaemonPair, DaemonProcess, finish, migd, start_migd

COMMANDS = sorted(main.commands)


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    found = DaemonPair()
    yield found
    found.close()


# -- help ------------------------------------------------------------------------------------------------


def test_the_commands() -> None:
    assert COMMANDS == [
        "agent", "attach", "cancel", "clean", "config", "demo", "destination", "doctor", "events", "guest",
        "history", "list", "migrate", "preload", "qemu", "resolve", "serve", "set", "source", "status",
        "wait",
    ]  # fmt: skip


def test_help_names_every_command_and_exit_code() -> None:
    output = migd("--help")
    assert (output.exit_code, output.stderr) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command} " in output.stdout
    said = " ".join(output.stdout.split())
    assert [code for code, meaning in EXIT_CODES.items() if f"{code} {meaning}" not in said] == []
    assert migd("-h").stdout == output.stdout


def test_help_of_every_command() -> None:
    asked = {command: start_migd(command, "--help") for command in COMMANDS}
    for command, process in asked.items():
        output = finish(process)
        assert (output.exit_code, output.stderr) == (0, "")
        assert output.stdout.startswith(f"Usage: python -m migd {command} ")
        for option in main.commands[command].params:
            if isinstance(option, click.Option):
                assert max(option.opts, key=len) in output.stdout


def test_whoever_asks_a_daemon_does_not_wait_for_what_moves_memory() -> None:
    """They take 0.2 s to start, and with numpy and an event loop twice that."""
    found = "import sys, migd.cli.main; print(sorted({'numpy', 'uvloop', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_version() -> None:
    assert migd("--version").stdout.startswith("migd, version ")


# -- usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("4096", 4096), ("1K", 1000), ("1Ki", 1024), ("512Mi", 512 << 20), ("1Gi", 1 << 30),
        ("1G", 10**9), ("1GB", 10**9), ("1GiB", 1 << 30), ("1.5Gi", 3 << 29), ("2Ti", 2 << 40),
        ("5M", 5000000),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["", "B", "G", "1X", "1iG", "1Mi5", "Gi1", "one", "0x10", "1 G G", "nan", "1,5G"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no size; write it like 512Mi, 1Gi or 50M"):
        Size().convert(text, None, None)


@pytest.mark.parametrize("text", ["inf", "1e400", "infGi", "-1Gi", "-5"])
def test_sizes_that_are_no_number_of_bytes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


BAD_USAGE = [
    (["guest"], "Missing option '--name'"),
    (["guest", "--name", "vm1", "--ram", "lots"], "Invalid value for '--ram': 'lots' is no size"),
    (["guest", "--name", "vm1", "--workload", "gaming"], "'gaming' is not one of"),
    (["migrate"], "Missing argument 'GUEST'"),
    (["migrate", "vm1"], "Missing option '--to'"),
    (["migrate", "vm1", "--to", "x:1", "--streams", "0"], "0 is not in the range 1<=x<=64"),
    (["migrate", "vm1", "--to", "x:1", "--verify", "maybe"], "'maybe' is not one of"),
    (["cancel"], "Missing argument 'GUEST|MIGRATION'"),
    (["teleport"], "No such command 'teleport'"),
    (["status", "--yaml"], "--yaml"),
]


@pytest.mark.parametrize(("arguments", "complaint"), BAD_USAGE)
def test_bad_usage(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_bad_usage_of_the_program() -> None:
    output = migd("guest", "--name", "vm1", "--ram", "lots")
    assert (output.exit_code, output.stdout) == (2, "")
    assert "'lots' is no size; write it like 512Mi, 1Gi or 50M" in output.stderr
    assert "Traceback" not in output.stderr


# -- without a daemon --------------------------------------------------------------------------------------


NEED_A_DAEMON = [
    ["status"], ["list"], ["history"], ["events"], ["cancel", "vm1"], ["resolve", "vm1"], ["attach", "vm1"],
    ["wait", "vm1"], ["migrate", "vm1", "--to", "127.0.0.1:1"],
]  # fmt: skip


def test_no_daemon_answers(tmp_path: Path) -> None:
    processes = [start_migd(*arguments, "--runtime-dir", tmp_path) for arguments in NEED_A_DAEMON]
    for process in processes:
        output = finish(process)
        assert (output.exit_code, output.stdout) == (2, "")
        assert output.complaint == (
            f"migd: no migd daemon answers at {tmp_path}/control.sock (No such file or directory); start one "
            "with `migd serve`, `migd source` or `migd destination`, or name its runtime directory with "
            "--runtime-dir"
        )


def test_with_json_an_error_is_a_document_too(tmp_path: Path) -> None:
    commands = [[*arguments, "--json"] for arguments in NEED_A_DAEMON]
    processes = [start_migd(*arguments, "--runtime-dir", tmp_path) for arguments in commands]
    for process in processes:
        output = finish(process)
        assert output.exit_code == 2
        found = json.loads(output.stdout)
        assert found == {"schema": 1, "error": output.complaint.removeprefix("migd: "), "exit_code": 2}


def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control.sock"))
    output = migd("status", "--runtime-dir", tmp_path)
    assert output.exit_code == 2
    assert "(Connection refused)" in output.complaint


def test_a_guest_without_a_daemon(tmp_path: Path) -> None:
    output = migd("guest", "--name", "vm1", "--ram", "1Mi", "--socket", tmp_path / "guest.sock")
    assert output.exit_code != 0
    assert str(tmp_path / "guest.sock") in output.complaint


# -- with daemons ---------------------------------------------------------------------------------------


def test_status_of_a_pair_as_text(pair: DaemonPair) -> None:
    pair.guest("texter", ram="4Mi", workload="idle")
    source = migd("status", "--runtime-dir", pair.source.directory)
    assert (source.exit_code, source.stderr) == (0, "")
    assert f"migd source 0.1.0, pid {pair.source.process.pid}, {pair.source.directory}" in source.stdout
    assert "texter" in source.stdout
    assert "4 MiB" in source.stdout
    assert "no migrations" in source.stdout
    assert "limits: connect_s 10, hello_s 5," in source.stdout
    destination = migd("status", "--runtime-dir", pair.destination.directory)
    assert f"listening on {pair.address} (plaintext)" in destination.stdout
    assert "no guest is attached" in destination.stdout


def test_status_of_a_pair_as_json(pair: DaemonPair) -> None:
    pair.guest("jason", ram="4Mi", workload="idle")
    documents = [
        json.loads(migd("status", "--json", "--runtime-dir", daemon.directory).stdout)
        for daemon in (pair.source, pair.destination)
    ]
    assert [document["schema"] for document in documents] == [1, 1]
    source, destination = (document["daemons"][0] for document in documents)
    assert (source["role"], destination["role"]) == ("source", "destination")
    assert source["pid"] == pair.source.process.pid
    (guest,) = [guest for guest in source["guests"] if guest["name"] == "jason"]
    assert (guest["state"], guest["ram_bytes"]) == ("running", 4 << 20)
    assert (source["migrations"], destination["migrations"]) == ([], [])
    assert destination["listen"] == pair.address
    assert source["limits"]["guest_s"] == 2.0


@pytest.mark.parametrize(
    ("to", "complaint"),
    [
        ("nowhere", "'nowhere' is no HOST:PORT"),
        ("host:99999", "'host:99999' is no HOST:PORT"),
        ("a..b:7440", "'a..b:7440' is no HOST:PORT"),
    ],
)
def test_a_destination_that_is_no_address(pair: DaemonPair, to: str, complaint: str) -> None:
    if "still" not in pair.guests:
        pair.guest("still", ram="4Mi", workload="idle")
    output = pair.migrate("still", "--to", to)
    assert output.exit_code == 2
    assert complaint in output.complaint
    assert pair.source.guest("still").state == "running"


def test_nothing_to_cancel_or_resolve(pair: DaemonPair) -> None:
    output = migd("cancel", "ghost", "--runtime-dir", pair.source.directory)
    assert output.exit_code == 1
    assert output.complaint == "migd: 'ghost' is in no migration that leaves from here"
    output = migd("resolve", "ghost", "--runtime-dir", pair.source.directory)
    assert output.exit_code == 1
    assert "no guest 'ghost' is attached here" in output.complaint


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n", b"\n", b"{}\n", b'{"type":"status","x":1}\n', b'{"type":"cancel","target":"\xff"}\n',
        b'{"x":' + b"[" * 50_000 + b"\n", b'{"type":"cancel"', b"x" * (3 << 20),
    ],
)  # fmt: skip
def test_a_control_connection_that_speaks_nonsense(pair: DaemonPair, line: bytes) -> None:
    """The daemon answers what is a line, ends what is not, and goes on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(pair.source.directory / "control.sock"))
        try:
            sock.sendall(line)
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as replies:
                answer = replies.read()
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    if answer:
        assert json.loads(answer)["type"] == "failed"
        assert json.loads(answer)["exit_code"] == 2
    else:
        assert len(line) > 1 << 20
    assert migd("status", "--runtime-dir", pair.source.directory).exit_code == 0
    assert "Traceback" not in pair.source.log


# -- starting ---------------------------------------------------------------------------------------------


def test_a_second_daemon_in_the_same_directory(pair: DaemonPair) -> None:
    output = migd("source", "--runtime-dir", pair.source.directory)
    assert output.exit_code == 3
    assert output.stdout == ""
    assert output.complaint == f"migd: another migd daemon uses {pair.source.directory}"
    assert migd("status", "--runtime-dir", pair.source.directory).exit_code == 0


def test_a_port_that_is_taken(pair: DaemonPair, tmp_path: Path) -> None:
    config = tmp_path / "d.toml"
    config.write_text(f'[destination]\nlisten = "{pair.address}"\n')
    output = migd("destination", "--config", config, "--runtime-dir", tmp_path / "run")
    assert output.exit_code == 3
    assert output.stderr.splitlines()[-1] == (
        f"migd: cannot listen on {pair.address}: Address already in use; another program listens there"
    )
    assert len(output.stderr.splitlines()) == 1, output.stderr


def test_a_runtime_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 100), "too long for a unix socket path, choose a shorter"),
    ):
        output = migd("source", "--runtime-dir", directory)
        assert output.exit_code == 3
        assert output.complaint == f"migd: runtime directory {directory}: {reason}"


# -- ending -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("role", ["source", "destination"])
def test_ctrl_c_ends_a_daemon_and_removes_its_sockets(role: str, loop: str) -> None:
    """Also while somebody is connected and says nothing."""
    listen = '[destination]\nlisten = "127.0.0.1:0"\n'
    daemon = DaemonProcess(role, f'[daemon]\nevent_loop = "{loop}"\n{listen}')
    idle = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    try:
        daemon.start()
        daemon.ready()
        for sock, name in zip(idle, ("control.sock", "guest.sock"), strict=True):
            sock.connect(str(daemon.directory / name))
        if role == "destination":
            host, _, port = daemon.address.rpartition(":")
            idle.append(socket.create_connection((host, int(port))))
        assert daemon.status().pid == daemon.process.pid
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(30) == 0
        assert not list(daemon.directory.glob("*.sock"))
        assert "Traceback" not in daemon.log
        assert "Error" not in daemon.log
    finally:
        for sock in idle:
            sock.close()
        daemon.close()


def test_two_signals_are_as_good_as_one() -> None:
    daemon = DaemonProcess("source", "")
    try:
        daemon.start()
        daemon.ready()
        for _ in range(3):
            daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(30) == 0
    finally:
        daemon.close()


def test_a_client_of_a_daemon_that_ends(pair: DaemonPair, tmp_path: Path) -> None:
    """A daemon that dies while it is asked: one line, no traceback."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "control.sock"))
        server.listen()
        process = start_migd("cancel", "vm1", "--runtime-dir", tmp_path)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1000).startswith(b'{"type":"cancel"')
    output = finish(process)
    assert output.exit_code == 1
    assert output.complaint == f"migd: the daemon at {tmp_path}/control.sock gave no answer"


def test_a_daemon_of_another_version(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "control.sock"))
        server.listen()
        for answer in (b'{"type":"news"}\n', b"\xff\xff\n", b'{"type":"done","text":"\xff"}\n'):
            process = start_migd("status", "--runtime-dir", tmp_path)
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)
                output = finish(process)
            assert output.exit_code == 1
            assert "is migd of an unknown version, and this command, migd" in output.complaint
