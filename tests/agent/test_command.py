"""`migd agent`: the agent's source, its systemd unit, and how it is installed."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from migd.cli.agent import TARGET, UNIT_NAME, UNIT_TARGET
from migd.cli.agent import agent as command
from migd.guest import agent


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def unit_of(installation: str) -> str:
    found = re.search(r"<<'END_OF_UNIT'\n(.*)^END_OF_UNIT$", installation, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_print_gives_the_source_byte_for_byte() -> None:
    assert printed("--print").encode() == Path(agent.__file__).read_bytes()


def test_what_is_printed_runs_where_nothing_of_migd_is(tmp_path: Path) -> None:
    program = tmp_path / "agent.py"
    program.write_text(printed("--print"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", program, "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, f"migd-agent {agent.AGENT_VERSION}\n")


def test_the_unit_is_one(tmp_path: Path) -> None:
    """systemd says so, where it is installed; the target folder of the agent need not be there for that."""
    text = printed("--unit")
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # as systemd reads it
    unit.read_string(text)
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    assert service["Type"] == "simple"
    assert service["Restart"] == "always"
    assert service["ExecStart"].split()[-1] == TARGET
    # Each of these hides something that the agent reads, or the port.
    assert not {"PrivateDevices", "ProtectKernelLogs", "ProcSubset", "PrivateUsers", "User"} & set(service)
    assert {"CAP_SYS_ADMIN", "CAP_SYSLOG"} <= set(service["CapabilityBoundingSet"].split())

    if not shutil.which("systemd-analyze"):
        return
    path = tmp_path / UNIT_NAME
    path.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_what_the_agent_understands() -> None:
    start = re.search(r"^ExecStart=\S+ (.*)$", printed("--unit"), re.MULTILINE)
    assert start
    *options, target = start[1].split()
    assert target == TARGET
    subprocess.run([sys.executable, *options, agent.__file__, "--version"], check=True, capture_output=True)


def test_install_says_what_to_copy_and_where() -> None:
    text = printed("--install")
    assert unit_of(text) == printed("--unit")
    for line in (
        f"scp {agent.__file__} root@VM:{TARGET}",
        f"python3 {TARGET} --info",
        "systemctl daemon-reload",
        f"systemctl enable --now {UNIT_NAME}",
    ):
        assert line in text.splitlines()
    assert f"virt-customize -a IMAGE --mkdir {Path(TARGET).parent} --copy-in {agent.__file__}" in text
    assert UNIT_TARGET in text
    assert agent.PORT_NAME in text


def test_the_whole_of_it_is_a_shell_script() -> None:
    """So that a line, or all of them, can be pasted."""
    subprocess.run(["sh", "-n"], input=printed("--install"), text=True, check=True)


def test_without_options_it_explains() -> None:
    text = printed()
    assert text == printed("--help")
    assert all(option in text for option in ("--install", "--unit", "--print", agent.PORT_NAME))


@pytest.mark.parametrize("wrong", ["--uninstall", "operand"])
def test_what_it_does_not_know_is_a_usage_error(wrong: str) -> None:
    assert CliRunner().invoke(command, [wrong]).exit_code == 2


def test_the_command_needs_no_heavy_module() -> None:
    """Nor the agent itself, which is read as text."""
    code = (
        "import sys; from migd.cli.agent import agent; agent(['--print'], standalone_mode=False); "
        "sys.exit(bool({'numpy', 'asyncio', 'migd.guest.agent', 'msgspec'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
