"""Daemons that the tests of the API share, and the places that they use."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migd import api


@pytest.fixture(scope="package")
def pair() -> Iterator[api.DaemonPair]:
    with api.start_pair() as found:
        yield found


@pytest.fixture
def silent() -> Iterator[str]:
    """Where a connection is taken and nothing is said: a migration there goes on until it is ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where private directories are made: short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="migd-t-") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(directory)
