"""The configuration: every key, and for everything that is wrong one clear line that names file and key."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migd import config
from migd.config import Config, load
from migd.errors import ConfigError
from migd.limits import Limits
from tests.support.pair import finish, start_migd

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))

NO_BANDWIDTHS: list[object] = [-1, 1, 99_999, "99K", "fast", "", "1G/min", "-1G", "inf", True, 1.5]

GOOD: dict[str, list[object]] = {
    "daemon.runtime_dir": ["", "/run/migd", "~/migd"],
    "daemon.ram": ["memfd", "hugetlb", "/dev/shm"],
    "daemon.log_level": ["debug", "info", "warning", "error"],
    "daemon.workers": [0, 1, 64],
    "daemon.event_loop": ["uvloop", "asyncio"],
    "daemon.max_bandwidth": [0, 100_000, 10**12],
    "destination.listen": ["0.0.0.0:7440", "[::1]:0"],
    "destination.insecure_plaintext": [True, False],
    "destination.max_streams": [1, 64],
    "destination.max_bandwidth": [0, 100_000, 10**12],
    "destination.guest_command": [[], ["qemu", "{socket}", "{name}", "{migration}"]],
    "migration.insecure_plaintext": [True, False],
    "migration.streams": [1, 64],
    "migration.compression": ["auto", "lz4", "none"],
    "migration.verify": ["auto", "strict", "late", "off"],
    "migration.dirty_log": ["auto", "userfaultfd", "compare"],
    "migration.hints": [True, False],
    "migration.downtime_limit_ms": [0.5, 1000],
    "migration.max_iterations": [1, 1000],
    "migration.max_total_s": [0.5, 86400],
    "migration.on_exhausted": ["force", "cancel"],
    "migration.max_bandwidth": [0, 100_000, 10**12],
    **{f"limits.{name}": [10.5, 86400] for name in Limits.__struct_fields__},
    "limits.ping_s": [0.001, 9],
}
BAD: dict[str, list[object]] = {
    "daemon.runtime_dir": [1, True],
    "daemon.ram": ["", "shm", "dev/shm", "hugetlb ", 1, True],
    "daemon.log_level": ["loud", "INFO", 1],
    "daemon.workers": [-1, 65, "2", 1.5, True],
    "daemon.event_loop": ["trio", 1],
    "daemon.max_bandwidth": [*NO_BANDWIDTHS],
    "destination.listen": [7440, "", "host", "host:", ":7440", "host:port", "host:123456", "host:1 "],
    "destination.insecure_plaintext": ["yes", 1],
    "destination.max_streams": [0, 65, "16"],
    "destination.guest_command": ["qemu", [1]],
    "destination.max_bandwidth": [*NO_BANDWIDTHS],
    "migration.insecure_plaintext": ["yes", 1],
    "migration.streams": [0, 65, "2", 1.5],
    "migration.compression": ["zstd", True],
    "migration.verify": ["on", True],
    "migration.dirty_log": ["soft-dirty", True],
    "migration.hints": ["yes", 1],
    "migration.downtime_limit_ms": [0, -1, "300", True, float("nan")],
    "migration.max_iterations": [0, -1, 1.5],
    "migration.max_total_s": [0, -1, "300"],
    "migration.on_exhausted": ["wait", 1],
    "migration.max_bandwidth": [*NO_BANDWIDTHS],
    **{
        f"limits.{name}": [-1, "2", True, float("inf"), float("nan"), 86401]
        for name in Limits.__struct_fields__
    },
}


def keys() -> dict[str, object]:
    """Every key that there is, with its default."""
    return {
        f"{table}.{key}": value
        for table, keys in msgspec.to_builtins(Config()).items()
        for key, value in keys.items()
    }


def toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case _:
            return str(value)


def written(tmp_path: Path, key: str, value: object) -> Path:
    """A file with one key."""
    table, _, name = key.partition(".")
    path = tmp_path / "migd.toml"
    path.write_text(f"[{table}]\n{name} = {toml(value)}\n")
    return path


def test_the_tables_of_this_test_know_every_key() -> None:
    assert set(GOOD) == set(BAD) == set(keys())


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD.items() for value in values])
def test_every_key(tmp_path: Path, key: str, value: object) -> None:
    table, _, name = key.partition(".")
    found = msgspec.to_builtins(load(written(tmp_path, key, value)))
    assert found[table].pop(name) == (tuple(value) if isinstance(value, list) else value)
    expected = msgspec.to_builtins(Config())
    del expected[table][name]
    assert found == expected


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_names_file_and_key(tmp_path: Path, key: str, value: object) -> None:
    path = written(tmp_path, key, value)
    with pytest.raises(ConfigError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: {key}")
    assert "\n" not in text
    assert re.search("Expected|Invalid enum value|is no bandwidth|is too little", text)


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [("unlimited", 0), ("0", 0), ("1G", 10**9), ("2.5M", 2_500_000), ("100Ki", 102_400), ("1GB/s", 10**9)],
)
@pytest.mark.parametrize("table", ["daemon", "destination", "migration"])
def test_bandwidths_as_people_write_them(tmp_path: Path, table: str, text: str, bytes_s: int) -> None:
    found = load(written(tmp_path, f"{table}.max_bandwidth", text))
    assert getattr(found, table).max_bandwidth == bytes_s


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "migd.toml").touch()
    assert load(tmp_path / "migd.toml") == Config()


def test_limits_that_contradict_each_other(tmp_path: Path) -> None:
    path = written(tmp_path, "limits.dead_s", 1)
    with pytest.raises(ConfigError, match=r"limits: dead_s \(1\) must be more than ping_s \(2\)"):
        load(path)


# -- as the command line says it --------------------------------------------------------------------------

SAID: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": ("[limits]\ndead = 3\n", "{path}: unknown key limits.dead; do you mean dead_s?"),
    "a key unlike any": (
        "[destination]\nx = 3\n", "{path}: unknown key destination.x; there are listen, insecure_"),
    "an unknown table": ("[limit]\ndead_s = 3\n", "{path}: unknown key limit; do you mean limits?"),
    "a table unlike any": (
        "[x]\n", "{path}: unknown key x; there are daemon, destination, migration, limits"),
    "a key outside its table": ("streams = 2\n", "{path}: unknown key streams; it belongs into [migration]"),
    "a key in another table": (
        "[daemon]\nlisten = 1\n", "{path}: unknown key daemon.listen; it belongs into [destination]"),
    "a bandwidth that is none": (
        '[daemon]\nmax_bandwidth = "fast"\n',
        "{path}: daemon.max_bandwidth: 'fast' is no bandwidth; write it like 1G, 500M or unlimited"),
    "a bandwidth without its suffix": (
        "[migration]\nmax_bandwidth = 500\n",
        "{path}: migration.max_bandwidth: 500 bytes/s is too little; the least is 100K, and 0 is unlimited"),
    "an ill-typed value": (
        '[migration]\nstreams = "2"\n', "{path}: migration.streams: Expected `int`, got `str`"),
    "a value out of range": ("[migration]\nstreams = 0\n", "{path}: migration.streams: Expected `int` >= 1"),
    "a value that is none of the choices": (
        '[migration]\nverify = "on"\n', "{path}: migration.verify: Invalid enum value 'on'"),
    "a value where a table belongs": ("limits = 3\n", "{path}: limits: Expected `object`, got `int`"),
    "an element of a list": (
        '[destination]\nguest_command = ["a", 1]\n',
        "{path}: destination.guest_command[1]: Expected `str`, got `int`"),
    "no TOML": ("[daemon\n", "{path}: not TOML: Expected ']'"),
    "the same key twice": (
        "[daemon]\nworkers = 1\nworkers = 2\n", "{path}: not TOML: Cannot overwrite a value"),
    "no text": (b"\xff\xfe[daemon]", "{path}: not TOML: 'utf-8' codec"),
    "a home that nobody has": (
        '[daemon]\nruntime_dir = "~no-such-user/migd"\n', "daemon.runtime_dir: ~no-such-user/migd: "),
}  # fmt: skip


def said_by(daemon: subprocess.Popen[str]) -> str:
    """The one line that ``migd source`` ends with; exit code 2, and nothing was started."""
    output = finish(daemon)
    assert (output.exit_code, output.stdout) == (2, "")
    return output.complaint


def written_wrong(tmp_path: Path, name: str) -> tuple[Path, str]:
    """A file of the table above, and what is said of it."""
    content, text = SAID[name]
    path = tmp_path / f"{name.replace(' ', '-')}.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path, text.format(path=path)


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_of_a_file(tmp_path: Path, name: str) -> None:
    path, text = written_wrong(tmp_path, name)
    with pytest.raises(ConfigError) as error:
        config.runtime_dir(load(path), "source")
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


def test_the_daemon_says_the_same(tmp_path: Path) -> None:
    daemons = {}
    for name in ("an unknown key", "an ill-typed value", "no TOML", "a home that nobody has"):
        path, text = written_wrong(tmp_path, name)
        daemons[text] = start_migd("source", "--config", path)
    before = sorted(tmp_path.iterdir())
    for text, daemon in daemons.items():
        assert said_by(daemon).startswith("migd: " + text)
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, directory = (start_migd("source", "--config", path) for path in (tmp_path / "no.toml", tmp_path))
    assert said_by(missing) == f"migd: {tmp_path}/no.toml: No such file or directory"
    assert said_by(directory) == f"migd: {tmp_path}: Is a directory"


def test_text_is_utf_8_whatever_the_locale_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "migd.toml"
    path.write_bytes('# für später\n[daemon]\nruntime_dir = "/run/müller"\n'.encode())
    read: list[object] = []
    real = Path.read_text

    def noting(self: Path, *arguments: Any) -> str:
        read.extend(arguments)
        return real(self, *arguments)

    monkeypatch.setattr(Path, "read_text", noting)
    assert load(path).daemon.runtime_dir == "/run/müller"
    assert read == ["utf-8"]


# -- where it all lies -----------------------------------------------------------------------------------


def test_the_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert config.runtime_dir(Config(), "source") == Path("/run/user/7/migd/source")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    default = config.default_runtime_dir("destination")
    assert default.parts[:2] == ("/", "tmp")
    assert default.name == "destination"
    monkeypatch.setenv("HOME", "/home/me")
    chosen = msgspec.convert({"daemon": {"runtime_dir": "~/migd"}}, Config)
    assert config.runtime_dir(chosen, "source") == Path("/home/me/migd")


# -- the files that are shipped ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_files_load_and_say_the_defaults(path: Path) -> None:
    assert load(path) == Config()


def test_every_key_is_in_a_shipped_file() -> None:
    lines = [line.strip("# ") for path in SHIPPED for line in path.read_text().splitlines()]
    tables = {f"[{key.partition('.')[0]}]" for key in keys()}
    assert tables <= set(lines)
    missing = [
        key for key in keys() if not any(line.startswith(f"{key.partition('.')[2]} = ") for line in lines)
    ]
    assert missing == []


# -- every key is read --------------------------------------------------------------------------------------

HOLDERS = {
    "daemon": {"daemon"},
    "destination": {"destination", "place"},
    "migration": {"migration"},
    "limits": {"limits", "_limits"},
}
"""What a table is called where its keys are read: the last name before the key's."""
TYPES = {"DestinationConfig": "destination", "MigrationConfig": "migration", "DaemonConfig": "daemon"}
DEFINE_OR_SHOW = ("limits.py", "cli/reference.py", "cli/config.py", "doctor/")
"""What is read only there has no effect."""


def reads() -> Iterator[tuple[str, str]]:
    """(table, key) of every attribute that code takes from something called, or typed, like a table."""
    for path in sorted((ROOT / "migd").rglob("*.py")):
        if str(path.relative_to(ROOT / "migd")).startswith(DEFINE_OR_SHOW):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _reads_in(function)


def _reads_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, str]]:
    names = {name: {table} for table, names in HOLDERS.items() for name in names}
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id in TYPES:
            names[argument.arg] = {TYPES[argument.annotation.id]}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=alias)], value=ast.Attribute(attr=attr)) if attr in HOLDERS:
                names[alias] = {attr}
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Attribute(attr=holder) | ast.Name(id=holder), attr=key):
                yield from ((table, key) for table in names.get(holder, ()))


def test_every_key_is_read_by_code() -> None:
    found = set(reads())
    assert [key for key in keys() if tuple(key.split(".")) not in found] == []


def test_a_key_that_nobody_reads_is_noticed() -> None:
    code = ast.parse(
        "def f(config):\n    place = config.destination\n    return place.listen, config.daemon.ram\n"
    )
    function = code.body[0]
    assert isinstance(function, ast.FunctionDef)
    found = set(_reads_in(function))
    assert {("destination", "listen"), ("daemon", "ram")} <= found
    assert ("daemon", "workers") not in found
