"""The command socket: a daemon's answers to any request, and a command's reading of any answer."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

from migd.control.client import ControlClient
from migd.control.commands import MAX_LINE_BYTES, REPLIES, Done, Failed, Reply, Request, Status
from migd.control.server import ControlServer
from migd.errors import PeerLost
from tests.fuzz import texts
from tests.fuzz.clockless import ClocklessLoop
from tests.fuzz.seeds import recorded
from tests.fuzz.target import ACCEPTED, Broken, Outcome, survives

_USAGE = 2


class Requests:
    """Each request of one line is answered with one line, by a daemon that does nothing but say done."""

    name = "requests"
    shared = 30

    def __init__(self) -> None:
        self.seeds = recorded("requests")
        self._directory = tempfile.mkdtemp(prefix="migd-fuzz-")
        self._loop = ClocklessLoop()

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return texts.json_mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        return self._loop.run(self._ask(data[:MAX_LINE_BYTES]))

    async def _ask(self, data: bytes) -> Outcome:
        understood: list[Request] = []

        async def handle(request: Request) -> AsyncIterator[Reply]:
            understood.append(request)
            yield Done(text="done")

        path = Path(self._directory) / "control.sock"
        serving = asyncio.ensure_future(ControlServer(path, handle).run())
        try:
            return self._judge(await _answer(path, data), understood)
        finally:
            serving.cancel()
            await asyncio.wait({serving})

    def _judge(self, answer: bytes, understood: list[Request]) -> Outcome:
        reply = REPLIES.decode(answer)
        if understood and reply == Done(text="done"):
            survives(understood[0])
            return Outcome(ACCEPTED, 1)
        if understood or not isinstance(reply, Failed) or reply.exit_code != _USAGE:
            raise Broken(f"{reply} to {understood}")
        return Outcome("Failed", 0)

    def close(self) -> None:
        self._loop.close()
        shutil.rmtree(self._directory)


async def _answer(path: Path, data: bytes) -> bytes:
    """All that comes back."""
    reader, writer = await asyncio.open_unix_connection(path)
    answer = b""
    with contextlib.suppress(ConnectionError):  # it does not read behind the line that it answers
        writer.write(data)
        writer.write_eof()
        while part := await reader.read(1 << 16):
            answer += part
    writer.close()
    return answer


class Answers:
    """Whatever a daemon says, a command understands it, or says that it does not."""

    name = "answers"
    shared = 30

    def __init__(self) -> None:
        self.seeds = recorded("answers")
        self._directory = tempfile.mkdtemp(prefix="migd-fuzz-")
        self._client = ControlClient(Path(self._directory))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{self._directory}/control.sock")
        self._listener.listen(1)
        self._said = b""
        self._daemon = threading.Thread(target=self._serve, daemon=True)
        self._daemon.start()

    def _serve(self) -> None:
        """A daemon that has one answer to everything, until its socket is shut."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    client.recv(1 << 16)
                    client.sendall(self._said)

    def mutate(self, data: bytes, chance: Random) -> bytes:
        return texts.json_mutated(data, chance.choice(self.seeds), chance)

    def run(self, data: bytes) -> Outcome:
        self._said, depth = data, 0
        try:
            for reply in self._client.ask(Status()):
                survives(reply)
                depth += 1
        except PeerLost as error:
            return Outcome(type(error).__name__, depth)
        return Outcome(ACCEPTED, depth)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._daemon.join()
        self._listener.close()
        shutil.rmtree(self._directory)
