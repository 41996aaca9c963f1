"""ControlServer: the daemon's end of the command socket."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec

from migd import __version__
from migd.control.commands import ENCODER, MAX_LINE_BYTES, REQUESTS, Failed, Reply, Request
from migd.errors import MigdError, ResourceError

log = logging.getLogger(__name__)

_BACKLOG = 16


class _Asker(msgspec.Struct):
    """What a request of any version has, whatever else."""

    version: str = "of an unknown version"


def _not_understood(line: bytes, error: Exception) -> str:
    """One line that names both versions, if the client is of another."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        asker = msgspec.json.decode(line, type=_Asker)
        if asker.version != __version__:
            return (
                f"this daemon is migd {__version__} and does not understand migd {asker.version}: {error}; "
                f"restart the daemon with the version that is installed, guests outlive that"
            )
    return f"not a request: {error}"


class ControlServer:
    """Answers each connection's one request with the replies that ``handle`` yields."""

    def __init__(self, path: Path, handle: Callable[[Request], AsyncIterator[Reply]]) -> None:
        self._path = path
        self._handle = handle
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            self._sock.bind(str(path))
            path.chmod(0o600)
            # Clients may come from here on: whoever was told that the daemon is ready is not turned away.
            self._sock.listen(_BACKLOG)
        except OSError as error:
            self._sock.close()
            raise ResourceError(f"control socket {path}: {error.strerror or error}") from error

    async def run(self) -> None:
        """Serve until cancelled; connections end with it, also those that have not asked yet."""
        try:
            async with asyncio.TaskGroup() as tasks:

                def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    tasks.create_task(self._serve(reader, writer))

                server = await asyncio.start_unix_server(serve, sock=self._sock, limit=MAX_LINE_BYTES)
                try:
                    await asyncio.Event().wait()  # serve_forever() would wait for idle connections, too
                finally:
                    server.close()
        finally:
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for reply in self._replies(await reader.readline()):
                writer.write(ENCODER.encode(reply) + b"\n")
                await writer.drain()
        except (OSError, ValueError) as error:  # the client went away, or sent an endless line
            log.debug("control connection: %s", error)
        except Exception:  # our own bug: it shall not end the daemon with its migrations
            log.exception("control connection: unexpected failure")
        finally:
            writer.close()

    async def _replies(self, line: bytes) -> AsyncIterator[Reply]:
        try:
            request = REQUESTS.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            yield Failed(error=_not_understood(line, error), exit_code=2)
            return
        try:
            async with aclosing(self._handle(request)) as replies:  # type: ignore[type-var]
                async for reply in replies:
                    yield reply
        except MigdError as error:
            yield Failed(error=str(error), exit_code=error.exit_code)
