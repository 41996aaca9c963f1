"""ControlClient: one request to a daemon over its command socket, blocking, for the command line."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import msgspec

from migd import __version__
from migd.control.commands import ENCODER, REPLIES, Reply, Request
from migd.errors import ConfigError, PeerLost, TimedOut

_SILENCE_S = 60.0
"""A migration says something 20 times a second; asking a destination about an unknown outcome is bounded by
``connect_s`` and ``go_s``. A daemon that is silent for longer hangs."""

_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class ControlClient:
    """Talks to the daemon whose runtime directory is given."""

    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / "control.sock"

    def __str__(self) -> str:
        return f"the daemon at {self._path}"

    def ask(self, request: Request, timeout_s: float = math.inf) -> Iterator[Reply]:
        """Replies as they come. ConfigError if no daemon is there, PeerLost if it ends in between.

        TimedOut if the last has not come in time, however many have.
        """
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_SILENCE_S)
            try:
                sock.connect(str(self._path))
            except OSError as error:
                raise ConfigError(
                    f"no migd daemon answers at {self._path} ({error.strerror or error}); start one "
                    f"with `migd serve`, `migd source` or `migd destination`, or name its runtime directory "
                    f"with --runtime-dir"
                ) from error
            try:
                sock.sendall(ENCODER.encode(request) + b"\n")
                with sock.makefile("rb") as lines:
                    while line := _next_line(sock, lines, deadline):
                        yield self._understood(line)
            except TimeoutError as error:
                if time.monotonic() >= deadline:
                    raise TimedOut(
                        f"the daemon at {self._path} had not said all after {timeout_s:g} s"
                    ) from error
                raise PeerLost(f"the daemon at {self._path} said nothing for {_SILENCE_S:g} s") from error
            except OSError as error:
                raise PeerLost(f"the daemon at {self._path} went away: {error.strerror}") from error

    def _understood(self, line: bytes) -> Reply:
        """PeerLost, naming both versions as far as they are told, for what is no reply of ours."""
        try:
            return REPLIES.decode(line)
        except _UNDECODABLE as error:
            raise PeerLost(
                f"the daemon at {self._path} is migd {_version(line)}, and this command, migd {__version__}, "
                f"does not understand it: {error}; restart the daemon with the version that is installed, "
                f"guests outlive that"
            ) from error

    def ask_once(self, request: Request) -> Reply:
        """The last reply."""
        replies = list(self.ask(request))
        if not replies:
            raise PeerLost(f"the daemon at {self._path} gave no answer")
        return replies[-1]


class _Speaker(msgspec.Struct):
    """What tells who speaks, where a reply has it."""

    version: str = "of an unknown version"


def _version(line: bytes) -> str:
    try:
        return msgspec.json.decode(line, type=_Speaker).version
    except _UNDECODABLE:
        return _Speaker().version


def _next_line(sock: socket.socket, lines: BufferedReader, deadline: float) -> bytes:
    """b"" at the end. TimeoutError if nothing comes for too long, or the deadline has passed."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(min(left_s, _SILENCE_S))
    return lines.readline()
