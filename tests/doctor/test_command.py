"""`migd doctor` as an operator runs it, and what it says of the daemons here and their port."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migd import __version__
from migd.cli.doctor import Diagnosis
from migd.config import DestinationConfig
from migd.doctor import daemons
from migd.doctor.finding import Level
from migd.wire.protocol import SOFTWARE
from tests.doctor.reading import FAIL, OK, WARN, diagnosis
from tests.support.pair import DaemonPair, Output, daemon_pair, finish, migd, start_migd
from tests.support.raw_daemon import daemon_that_says


@pytest.fixture(scope="module")
def pair() -> Iterator[DaemonPair]:
    with daemon_pair() as pair:
        pair.guest("small", ram="4Mi", workload="idle")
        yield pair


# -- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(pair: DaemonPair) -> Output:
    """A whole examination, of the destination and from the source's directory."""
    config = pair.source.directory / "doctor.toml"
    config.write_text(f'[destination]\nlisten = "{pair.address}"\n')
    return migd(
        "doctor", "--json", "--to", pair.address, "--config", config, "--runtime-dir", pair.source.directory
    )


def test_whatever_is_not_well_says_what_it_means_and_what_to_do(here: Output) -> None:
    found = msgspec.json.decode(here.stdout, type=Diagnosis)
    assert found.schema == 1
    assert len(found.findings) > 20
    for finding in found.findings:
        assert finding.check
        assert finding.found
        assert finding.level is OK or (finding.meaning and finding.remedy), finding
        assert "\n" not in f"{finding.check}{finding.found}{finding.meaning}{finding.remedy}"


def test_a_host_that_runs_a_pair_of_daemons(pair: DaemonPair, here: Output) -> None:
    found = diagnosis(here)
    assert f"{__version__}, Python {platform.python_version()}" in found["migd"].found
    assert found["sealed memory"].level is OK
    assert found["pidfd"].level is OK
    assert found[f"runtime directory {pair.source.directory}"].found == "ours, mode 0700"
    daemon = found[f"daemon in {pair.source.directory}"]
    assert daemon.level is OK
    assert f"migd source {__version__}, pid {pair.source.process.pid}, 1 guests" in daemon.found
    assert f"{SOFTWARE} answers" in found[f"destination {pair.address}"].found
    assert found["protocol version"].found == "1"
    assert found["streams"].found == "2 of at most 16"
    assert found["clock there"].level is OK
    assert found["memory there"].level is OK
    assert found["way there"].found == "loopback"


def test_another_daemon_of_migd_on_the_configured_port_is_somebody_else(
    here: Output, pair: DaemonPair
) -> None:
    """Of the source's directory, since the destination's was not asked."""
    found = diagnosis(here)[f"port of {pair.address}"]
    assert found.level is FAIL
    assert "Address already in use" in found.found
    assert here.exit_code == 1


def test_as_text(pair: DaemonPair) -> None:
    config = pair.destination.directory / "doctor.toml"
    config.write_text('[destination]\nlisten = "0.0.0.0:0"\n')
    output = migd("doctor", "--config", config, "--runtime-dir", pair.destination.directory)
    assert (output.exit_code, output.stderr) == (1, "")
    lines = output.stdout.splitlines()
    assert lines[0].startswith("ok   migd ")
    at = next(number for number, line in enumerate(lines) if line.startswith("fail who can reach it"))
    assert lines[at + 1] == "       a destination refuses to start"
    assert lines[at + 2].startswith("       -> listen on loopback, or set destination.insecure_plaintext")
    assert "1 failed; live migrations will not work before that is mended" in lines[-1]


def test_usage(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[daemon]\ncolour = 1\n")
    bad = {
        ("--config", str(tmp_path / "bad.toml")): "unknown key daemon.colour",
        ("--to", "nowhere"): "'nowhere' is no HOST:PORT",
        ("--verbosely",): "--verbosely",
    }
    processes = {words: start_migd("doctor", *words, "--runtime-dir", tmp_path) for words in bad}
    for words, process in processes.items():
        output = finish(process)
        assert output.exit_code == 2, words
        assert bad[words] in output.stderr
        assert "Traceback" not in output.stderr


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    migd("doctor", "--runtime-dir", tmp_path / "run" / "source")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    output = migd("doctor", "--json", "--to", "127.0.0.1:1", "--runtime-dir", tmp_path)
    found = diagnosis(output)["destination 127.0.0.1:1"]
    assert output.exit_code == 1
    assert found.level is FAIL
    assert "no guest can be sent there" in found.meaning


# -- daemons and ports --------------------------------------------------------------------------------------


def test_no_daemon_runs(tmp_path: Path) -> None:
    reports, (found,) = daemons.statuses([tmp_path])
    assert reports == []
    assert (found.level, found.found) == (OK, "none runs here")


def test_daemons_that_run(pair: DaemonPair) -> None:
    reports, findings = daemons.statuses([pair.source.directory, pair.destination.directory])
    assert [report.role for report in reports] == ["source", "destination"]
    assert [finding.level for finding in findings] == [OK, OK]
    assert daemons.port(pair.address, reports).level is OK
    assert "destination, pid" in daemons.port(pair.address, reports).found


def test_a_daemon_of_another_version(pair: DaemonPair, tmp_path: Path) -> None:
    report = msgspec.structs.replace(pair.source.status(), version="9.9")
    with daemon_that_says(tmp_path, msgspec.json.encode(report) + b"\n"):
        _, (found,) = daemons.statuses([tmp_path])
    assert found.level is WARN
    assert f"migd source 9.9, pid {report.pid}" in found.found
    assert f"this command is {__version__}" in found.found


def test_a_daemon_that_is_not_understood(tmp_path: Path) -> None:
    with daemon_that_says(tmp_path, b'{"type":"news","version":"9.9"}\n'):
        reports, (found,) = daemons.statuses([tmp_path])
    assert reports == []
    assert found.level is FAIL
    assert f"is migd 9.9, and this command, migd {__version__}, does not understand it" in found.found


def test_a_port_that_is_free_and_one_that_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        taken = daemons.port(address, [])
    assert taken.level is FAIL
    assert "another program listens there" in taken.found
    assert daemons.port(address, []).level is OK
    assert daemons.port(address, []).level is OK  # it was let go of
    assert daemons.port("127.0.0.1:0", []).found == "whichever is free"


@pytest.mark.parametrize(
    ("listen", "consent", "level"),
    [
        ("127.0.0.1:0", False, OK),
        ("127.0.0.1:0", True, OK),
        ("0.0.0.0:0", False, FAIL),
        ("0.0.0.0:0", True, WARN),
    ],
)
def test_who_can_reach_a_destination(listen: str, consent: bool, level: Level) -> None:
    config = DestinationConfig(listen=listen, insecure_plaintext=consent)
    (found,) = [finding for finding in daemons.listening(config, []) if finding.check == "who can reach it"]
    assert found.level is level
