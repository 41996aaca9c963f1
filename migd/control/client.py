"""ControlClient: one request to a daemon over its command socket, blocking, for the command line."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from migd.control.commands import ENCODER, REPLIES, Reply, Request
from migd.errors import ConfigError, PeerLost

_SILENCE_S = 60.0
"""A migration says something 20 times a second; asking a destination about an unknown outcome is bounded by
``connect_s`` and ``go_s``. A daemon that is silent for longer hangs."""


class ControlClient:
    """Talks to the daemon whose runtime directory is given."""

    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / "control.sock"

    def ask(self, request: Request) -> Iterator[Reply]:
        """Replies as they come. ConfigError if no daemon is there, PeerLost if it ends in between."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_SILENCE_S)
            try:
                sock.connect(str(self._path))
            except OSError as error:
                raise ConfigError(
                    f"no migd daemon answers at {self._path} ({error.strerror or error}); start one with "
                    f"`migd source` or `migd destination`, or name its runtime directory with --runtime-dir"
                ) from error
            try:
                sock.sendall(ENCODER.encode(request) + b"\n")
                with sock.makefile("rb") as lines:
                    for line in lines:
                        yield REPLIES.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise PeerLost(f"the daemon at {self._path} is of another version: {error}") from error
            except TimeoutError as error:
                raise PeerLost(f"the daemon at {self._path} said nothing for {_SILENCE_S:g} s") from error
            except OSError as error:
                raise PeerLost(f"the daemon at {self._path} went away: {error.strerror}") from error

    def ask_once(self, request: Request) -> Reply:
        """The last reply."""
        replies = list(self.ask(request))
        if not replies:
            raise PeerLost(f"the daemon at {self._path} gave no answer")
        return replies[-1]
