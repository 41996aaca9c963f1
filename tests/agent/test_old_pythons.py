"""The agent is one file for Python 3.6 and later: its syntax, its imports, and a talk with each one here."""

from __future__ import annotations

import ast
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import migd
from migd.guest import agent
from migd.guest.hints import End, Greet, Hello, HintDecoder, Request, encode

AGENT = Path(agent.__file__)
WAIT_S = 30.0
OLDEST = (3, 6)

IN_PYTHON_3_6 = {
    "argparse", "contextlib", "errno", "gc", "gzip", "io", "os", "re", "select", "signal", "socket", "struct",
    "sys", "time", "typing", "zlib",
}  # fmt: skip
"""And what it takes from them: docs.python.org/3.6. A new import is looked up there first."""


def _version(python: Path) -> tuple[int, ...] | None:
    """None if it is none that runs."""
    program = "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=WAIT_S
        )
    except OSError:
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", done.stdout)
    return tuple(map(int, found.groups())) if found else None


def pythons() -> dict[str, Path]:
    """Those on the search path, or beside the one that runs the tests, which is always among them."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 20)]
    candidates = [Path(path) for path in map(shutil.which, names) if path]
    candidates += sorted(Path(sys.base_prefix).parent.glob("*/bin/python3"))
    versions = {version: python for python in candidates if (version := _version(python))}
    versions[sys.version_info[:2]] = Path(sys.executable)
    return {
        f"{version[0]}.{version[1]}": path for version, path in sorted(versions.items()) if version >= OLDEST
    }


PYTHONS = pythons()


def test_the_syntax_is_that_of_3_6() -> None:
    ast.parse(AGENT.read_text(), feature_version=OLDEST)


def test_it_imports_the_standard_library_of_3_6_and_nothing_else() -> None:
    found = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(AGENT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or "."] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        )
    }
    assert found == IN_PYTHON_3_6
    assert found <= sys.stdlib_module_names


def test_it_says_of_which_migd_it_is() -> None:
    assert migd.__version__ == agent.AGENT_VERSION


@pytest.mark.parametrize("version", PYTHONS)
def test_a_talk(version: str) -> None:
    """With every warning an error."""
    line = "agent.system_ram = lambda iomem: [agent.Run(0x100, 0x40100)]"
    code = f"import sys; sys.path.insert(0, {str(AGENT.parent)!r}); import agent; {line}; agent.main()"
    with tempfile.TemporaryDirectory(prefix="migd-a-") as base, socket.socket(socket.AF_UNIX) as listener:
        path = f"{base}/hints"
        listener.bind(path)
        listener.listen()
        listener.settimeout(WAIT_S)
        process = subprocess.Popen(
            [PYTHONS[version], "-I", "-S", "-B", "-W", "error", "-c", code, "--socket", path, "--verbose"],
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(WAIT_S)
                    sock.sendall(encode(Greet()) + encode(Request(1)))
                    decoder, frames = HintDecoder(), []
                    while not frames or not isinstance(frames[-1], End):
                        frames += decoder.feed(sock.recv(1 << 16))
                    assert isinstance(frames[0], Hello)
                    assert (decoder.garbage_bytes, decoder.rejected_frames) == (0, 0)
                process.terminate()
                _, log = process.communicate(timeout=WAIT_S)
            finally:
                process.kill()
        assert process.returncode == 0, log
        assert "epoch 1 asked for" in log
        assert "Error" not in log
