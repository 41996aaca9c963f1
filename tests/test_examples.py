"""The examples of docs/api.md, as they stand there: what a reader copies works, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pair import eventually, processes_naming

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "api.md"
EXAMPLES = re.findall(r"^```(sh|python)\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
NAMES = [f"{number}-{language}" for number, (language, _) in enumerate(EXAMPLES, 1)]


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of an example, and where it makes others: short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        commands = Path(directory) / "bin"
        commands.mkdir()
        for name, words in (("migd", f"{sys.executable} -m migd"), ("python3", sys.executable)):
            (commands / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            (commands / name).chmod(0o755)
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
        yield Path(directory)
        for pid in processes_naming(directory):  # of an example that failed
            os.kill(pid, signal.SIGKILL)


def command(language: str, text: str, private: Path) -> list[str]:
    if language == "sh":
        return ["bash", "-euo", "pipefail", "-c", text]
    if "def test_" not in text:
        return [sys.executable, "-c", text]
    (private / "test_example.py").write_text(text)
    return [sys.executable, "-m", "pytest", "-q", "-p", "migd.pytest_plugin"]


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=NAMES)
def test_an_example_runs(language: str, text: str, private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    done = subprocess.run(
        command(language, text, private), cwd=private, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    eventually(lambda: not processes_naming(str(private)), "the end of its processes")


def test_there_are_examples_of_each_way() -> None:
    assert [language for language, _ in EXAMPLES] == ["sh", "python", "python", "python"]
    assert "def test_" in EXAMPLES[-1][1]
