"""Debian's packages for the lab: fetched and unpacked beside the system, and kept in a cache of its own."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from migd.errors import ResourceError

Progress = Callable[[str], None]
"""Is told, a line at a time, what takes long."""

_APT = Path("/etc/apt")
_OS_RELEASE = Path("/etc/os-release")

_LISTS_S = 180.0
_DOWNLOAD_S = 600.0
_COMMAND_S = 60.0
_LOCK_S = 1200.0  # somebody else is downloading lists and two sets of packages
_LOCK_POLL_S = 0.2

_OPTION_FIELDS = {"arch": "Architectures", "lang": "Languages"}
"""Options of one-line sources whose field in a .sources file is called otherwise."""


class LabUnavailable(ResourceError):
    """A real guest is not to be had on this host; the message has what is missing, and what to do."""


def silent(line: str) -> None:
    """The progress that nobody looks at."""


def cache() -> Path:
    """Where the lab keeps what it made: ``$XDG_CACHE_HOME/migd/lab``."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "migd" / "lab"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabUnavailable(f"{directory}: {error.strerror}: set XDG_CACHE_HOME to elsewhere") from error
    return directory


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Nobody else is building in this cache. LabUnavailable when somebody is for too long."""
    deadline = time.monotonic() + _LOCK_S
    with (directory / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise LabUnavailable(
                        f"another process has been building in {directory} for {_LOCK_S:.0f} s"
                    ) from error
                time.sleep(_LOCK_POLL_S)
        yield


def built_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, a directory in a cache; if it is not there yet ``build`` fills it, whole or not at all."""
    if target.is_dir():
        return target
    with locked(target.parent):
        for interrupted in target.parent.glob(".building-*"):
            shutil.rmtree(interrupted, ignore_errors=True)
        if not target.is_dir():
            try:
                _build(target, build)
            except OSError as error:
                raise LabUnavailable(f"{target}: {error}") from error
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(
        prefix=".building-", dir=target.parent, ignore_cleanup_errors=True
    ) as building:
        made = Path(building) / "made"
        made.mkdir()
        build(made)
        made.rename(target)


def codename() -> str:
    """Such as bookworm. LabUnavailable where this is not Debian on x86-64 with apt."""
    if platform.machine() != "x86_64":
        raise LabUnavailable(f"the lab's guest is x86-64, and this host {platform.machine()}")
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise LabUnavailable("the lab's guest is made of Debian packages, and there is no apt-get here")
    release: dict[str, str] = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', _text(_OS_RELEASE), re.MULTILINE))
    if release.get("ID") != "debian" or "VERSION_CODENAME" not in release:
        raise LabUnavailable(
            f"the lab's guest is made of Debian packages, and this is {release.get('PRETTY_NAME', 'unknown')}"
        )
    return release["VERSION_CODENAME"]


def install(packages: Iterable[str]) -> None:
    """Into the system itself. LabUnavailable unless we are root and apt can do it."""
    wanted = tuple(packages)
    by_hand = f"apt-get install --no-install-recommends {' '.join(wanted)}"
    codename()
    if os.geteuid() != 0:
        raise LabUnavailable(f"not installed, and only root can: {by_hand}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    _run(("apt-get", "-q", "update"), _LISTS_S, environment=environment)
    _run(
        ("apt-get", "-q", "install", "-y", "--no-install-recommends", *wanted),
        _DOWNLOAD_S,
        environment=environment,
    )


class Apt:
    """apt with lists, cache and sources of its own, in ``directory``: needs no root and changes no system.

    Its sources are this machine's own Debian sources, and with ``backports`` their backports, too, which are
    then preferred.
    """

    def __init__(self, directory: Path, *, backports: bool = False) -> None:
        """Fetches the lists. LabUnavailable without Debian or network."""
        name = codename()
        sources = [source.of_suites(name) for source in _machine_sources()]
        sources = [source for source in sources if source.suites and "main" in source.components]
        if not sources:
            raise LabUnavailable(f"{_APT} names no source of {name}")
        if backports:
            sources += [source.backports(name) for source in sources if name in source.suites]
        self._config = directory / "apt.conf"
        for sub in ("lists/partial", "cache/archives/partial", "sources.d"):
            (directory / sub).mkdir(parents=True)
        (directory / "sources.d" / "lab.sources").write_text("\n".join(map(str, sources)))
        self._config.write_text(
            _CONFIG.format(directory=directory)
            + (f'APT::Default-Release "{name}-backports";\n' if backports else "")
        )
        _run(("apt-get", "-c", str(self._config), "-q", "update"), _LISTS_S)

    def download(self, packages: Iterable[str], into: Path) -> None:
        """The packages alone, without what they depend on, checked by apt, as files of ``into``."""
        _run(
            ("apt-get", "-c", str(self._config), "-q", "download", *packages),
            _DOWNLOAD_S,
            directory=into,
        )

    def dependencies(self, package: str, *, recurse: bool = False) -> list[str]:
        """The names of the packages that this one cannot do without."""
        options = ("--recurse",) if recurse else ()
        text = _run(
            ("apt-cache", "-c", str(self._config), "depends", "--important", *options, package),
            _COMMAND_S,
        )
        return sorted(set(re.findall(r"^ *\|?(?:Pre)?Depends: ([^\s<]+)", text, re.MULTILINE)))

    def dependency(self, package: str, pattern: str) -> str:
        """What a meta package stands for: the one dependency of such a name. LabUnavailable without one."""
        for name in self.dependencies(package):
            if re.fullmatch(pattern, name):
                return name
        raise LabUnavailable(f"Debian's {package} depends on nothing like {pattern}")


def unpack(packages: Path, root: Path) -> None:
    """All ``.deb`` files of a directory, into ``root``, and nothing of them is run."""
    for package in sorted(packages.glob("*.deb")):
        _run(("dpkg-deb", "-x", str(package), str(root)), _COMMAND_S)


class _Source:
    """One stanza of a .sources file."""

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    @property
    def suites(self) -> list[str]:
        return self._fields.get("Suites", "").split()

    @property
    def components(self) -> list[str]:
        return self._fields.get("Components", "").split()

    def of_suites(self, name: str) -> _Source:
        """As far as it is of this release: its main, updates and security suite."""
        wanted = (name, f"{name}-updates", f"{name}-security")
        return self._with_suites(suite for suite in self.suites if suite in wanted)

    def backports(self, name: str) -> _Source:
        return self._with_suites([f"{name}-backports"])

    def _with_suites(self, suites: Iterable[str]) -> _Source:
        return _Source({**self._fields, "Suites": " ".join(suites), "Components": "main", "Types": "deb"})

    def __str__(self) -> str:
        return "".join(f"{name}: {value}\n" for name, value in self._fields.items())


def _machine_sources() -> Iterator[_Source]:
    for path in sorted((_APT / "sources.list.d").glob("*.sources")):
        yield from _stanzas(_text(path))
    for path in (_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*.list"))):
        if path.exists():
            yield from _one_liners(_text(path))


def _stanzas(text: str) -> Iterator[_Source]:
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():  # goes on: a key, or suites one a line
                fields[name] = fields.get(name, "") + "\n" + line
            else:
                name, _, value = line.partition(":")
                name = name.title()
                fields[name] = value.strip()
        if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes").lower() != "no":
            yield _Source(fields)


def _one_liners(text: str) -> Iterator[_Source]:
    line = re.compile(r"^\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#\n]+)", re.MULTILINE)
    for options, uri, suite, components in line.findall(text):
        pairs = (option.partition("=")[::2] for option in options.split())
        yield _Source(
            {_OPTION_FIELDS.get(name, name.title()): value.replace(",", " ") for name, value in pairs}
            | {"URIs": uri, "Suites": suite, "Components": components.strip()}
        )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise LabUnavailable(f"{path}: {error.strerror}") from error


def _run(
    command: tuple[str, ...],
    limit_s: float,
    *,
    directory: Path | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Its output. LabUnavailable with apt's own reason where it fails, or takes longer."""
    called = " ".join(word for word in command[:6] if word not in ("-c", "-q") and "/" not in word)
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=(environment or dict(os.environ)) | {"LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
        )
    except OSError as error:
        raise LabUnavailable(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise LabUnavailable(
            f"{called}: not done in {limit_s:.0f} s: is the network slow or absent?"
        ) from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
        raise LabUnavailable(
            f"{called}: {'; '.join(said[:2]) or done.stderr[-200:].strip()}: is there a network?"
        )
    return done.stdout


_CONFIG = """\
Dir::State::lists "{directory}/lists";
Dir::Cache "{directory}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{directory}/sources.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
// The directory is ours alone, so apt's own user could not write to it.
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
// What the system does after an update is about the system's lists.
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
