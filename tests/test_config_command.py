"""`migd config`: what is wrong with a file beyond its types, and what a file means."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from migd.cli import reference
from migd.cli.main import main
from migd.config import Config, load
from migd.control.commands import Status
from tests.support.pair import DaemonProcess, migd


def config(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["config", *map(str, arguments)])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "migd.toml"
    path.write_text(text)
    return path


# -- check ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", reference.ROLES)
def test_a_shipped_file_is_fine_and_has_every_default(tmp_path: Path, role: str) -> None:
    """With a runtime directory of the test's own: nobody's daemon shall make a difference."""
    path = Path(__file__).resolve().parent.parent / "configs" / f"{role}.toml"
    done = config("check", path, "--role", role)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{path}: ok for migd {role}\n  every key has its default\n"


def test_what_differs_from_the_defaults_and_what_is_of_no_use(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f'[daemon]\nruntime_dir = "{tmp_path}/run"\nmax_bandwidth = "2.5G"\n[destination]\nmax_streams = 8\n',
    )
    done = config("check", path, "--role", "source")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"{path}: ok for migd source",
        f'  daemon.runtime_dir = "{tmp_path}/run"  (default "")',
        '  daemon.max_bandwidth = "2500M"  (default 0)',
        "  destination.max_streams = 8  (default 16; of no use to migd source)",
    ]
    assert not (tmp_path / "run").exists(), "nothing is changed"


def test_a_file_that_no_daemon_would_even_read(tmp_path: Path) -> None:
    path = written(tmp_path, "[migration]\nstreems = 4\n")
    done = migd("config", "check", path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.complaint == f"migd: {path}: unknown key migration.streems; do you mean streams?"
    as_json = migd("config", "check", path, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["error"] in done.complaint


FAILS = {
    '[daemon]\nruntime_dir = "{tmp}/file/run"': ("daemon.runtime_dir", "another"),
    '[daemon]\nruntime_dir = "{tmp}/' + 100 * "x" + '"': ("daemon.runtime_dir", "choose a shorter"),
    '[daemon]\nruntime_dir = "~no-such-user/migd"': ("daemon.runtime_dir", "name a directory in full"),
    '[daemon]\nram = "{tmp}/none"': ("daemon.ram", "name a directory on tmpfs or hugetlbfs"),
    '[destination]\nlisten = "a..b:7440"': ("destination.listen", "write HOST:PORT"),
    '[destination]\nlisten = "0.0.0.0:7440"': ("destination.listen", "destination.insecure_plaintext = true"),
    '[destination]\nguest_command = ["no-such-program", "{{socket}}"]': (
        "destination.guest_command", "name it with its whole path"),
    '[destination]\nguest_command = ["{python}"]': ("destination.guest_command", "pass {socket}"),
    "[limits]\nprogress_s = 2": ("limits.progress_s", "make it several times ping_s"),
}  # fmt: skip


def filled(text: str, tmp_path: Path) -> str:
    (tmp_path / "file").touch()
    return (
        text.replace("{tmp}", str(tmp_path))
        .replace("{python}", sys.executable)
        .replace("{{", "{")
        .replace("}}", "}")
    )


@pytest.mark.parametrize("text", FAILS)
def test_what_would_not_work_here(tmp_path: Path, text: str) -> None:
    key, remedy = FAILS[text]
    path = written(tmp_path, filled(text, tmp_path))
    done = config("check", path)
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"fail  {path}: {key}: ")
    assert lines[2].startswith("      -> ")
    assert remedy in lines[2]
    assert f"{path}: not usable for migd serve" in lines
    found = json.loads(config("check", path, "--json").stdout)
    assert (found["schema"], found["ok"], found["role"]) == (1, False, "serve")
    (failed,) = [finding for finding in found["findings"] if finding["level"] == "fail"]
    assert failed["check"] == key


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[daemon]\nram = "/proc"\n[destination]\nlisten = "0.0.0.0:1"\n[limits]\nprogress_s = 1\n',
    )
    assert config("check", path).stdout.count("fail  ") == 3
    assert config("check", path, "--role", "source").stdout.count("fail  ") == 2


WARNS = {
    '[daemon]\nmax_bandwidth = "1M"\n[migration]\nmax_bandwidth = "2M"': "migration.max_bandwidth: 2M, more",
    "[migration]\ndowntime_limit_ms = 1": "migration.downtime_limit_ms: 1 ms",
    "[limits]\nhint_first_s = 3": "limits.hint_first_s: 3 s, longer than hint_window_s (2 s)",
    "[migration]\nstreams = 32": "migration.streams: 32, more than destination.max_streams (16)",
    '[destination]\nlisten = "0.0.0.0:7440"\ninsecure_plaintext = true': "destination.listen: 0.0.0.0:7440",
}


@pytest.mark.parametrize("text", WARNS)
def test_what_cannot_have_the_effect_it_asks_for(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    done = config("check", path)
    assert done.exit_code == 0
    assert f"warn  {path}: {WARNS[text]}" in done.stdout
    assert f"{path}: ok for migd serve" in done.stdout


def test_what_check_accepts_a_daemon_starts_with(tmp_path: Path) -> None:
    text = '[daemon]\nmax_bandwidth = "50M"\n[destination]\nlisten = "127.0.0.1:0"\n'
    assert config("check", written(tmp_path, text), "--role", "destination").exit_code == 0
    daemon = DaemonProcess("destination", text)
    try:
        daemon.start()
        daemon.ready()
        assert daemon.client.ask_once(Status())
    finally:
        daemon.close()


# -- show -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", reference.ROLES)
def test_what_is_shown_is_a_file_that_says_the_same(tmp_path: Path, role: str) -> None:
    path = written(
        tmp_path,
        '[daemon]\nruntime_dir = "/run/m\\"ü"\nmax_bandwidth = "1.5G"\n'
        '[destination]\nguest_command = ["a", "{socket}"]\n'
        "[migration]\nhints = false\nmax_total_s = 0.5\n[limits]\ndead_s = 77\n",
    )
    shown = config("show", path, "--role", role)
    assert shown.exit_code == 0
    expected, tables = load(path), reference.TABLES_OF[role]
    again = load(written(tmp_path, shown.stdout))
    for table in tables:
        assert getattr(again, table) == getattr(expected, table)
    unmentioned = {"destination", "migration"} - set(tables)
    assert all(f"[{table}]" not in shown.stdout for table in unmentioned)


def test_without_a_file_it_is_the_defaults() -> None:
    shown = config("show", "--role", "serve")
    assert 'listen = "127.0.0.1:7440"' in shown.stdout
    assert shown.stdout == reference.as_toml(Config(), "serve")


def test_shown_as_json_every_key_is_explained(tmp_path: Path) -> None:
    found = json.loads(config("show", "--json", written(tmp_path, "[migration]\nstreams = 7\n")).stdout)
    keys = {key["key"]: key for key in found["keys"]}
    assert set(keys) == {key.path for table in reference.TABLES for key in reference.keys(table)}
    assert keys["migration.streams"]["value"] == 7
    assert keys["migration.streams"]["default"] == 2
    assert keys["migration.streams"]["values"] == "integer from 1 to 64"
    assert keys["migration.verify"]["values"] == '"auto", "strict", "late" or "off"'
    assert all(key["meaning"] for key in keys.values())


@pytest.mark.parametrize("arguments", [["show", "no.toml"], ["check", "no.toml"]])
def test_a_file_that_is_not_there(arguments: list[str]) -> None:
    done = migd("config", *arguments)
    assert (done.exit_code, done.complaint) == (2, "migd: no.toml: No such file or directory")
