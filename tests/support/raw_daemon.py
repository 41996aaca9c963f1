"""The command socket of a daemon that says, once, what a test wants it to say."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

WAIT_S = 10.0


@contextlib.contextmanager
def daemon_that_says(directory: Path, line: bytes) -> Iterator[None]:
    """Answers the first request in this directory with these bytes."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(directory / "control.sock"))
        server.listen()
        server.settimeout(WAIT_S)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(line)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(WAIT_S)
        assert not thread.is_alive()
