"""RawPeer: one end of a migration connection, by hand: real frames, right or doctored, over a real socket."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator

from migd.ram.block import PAGE_BYTES
from migd.wire import messages
from migd.wire.framing import Frame, FrameDecoder, FrameEncoder
from migd.wire.protocol import MAX_VERSION, MIN_VERSION

WAIT_S = 10.0


def new_id() -> str:
    return secrets.token_hex(16)


def hello(migration: str, *, guest: str = "raw", pages: int = 256, streams: int = 1) -> messages.Hello:
    """What a source says first; change it by ``msgspec.structs.replace``."""
    return messages.Hello(
        migration=migration,
        min_version=MIN_VERSION,
        max_version=MAX_VERSION,
        software="a test",
        guest=guest,
        page_bytes=PAGE_BYTES,
        blocks=(messages.BlockInfo("ram", pages),),
        streams=streams,
    )


class RawPeer:
    """A blocking connection; every wait ends after ``WAIT_S``."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self.encoder = FrameEncoder()
        self._decoder = FrameDecoder()

    @classmethod
    def connect(cls, address: str) -> RawPeer:
        host, _, port = address.rpartition(":")
        return cls(socket.create_connection((host, int(port)), WAIT_S))

    def send(self, message: messages.Message) -> None:
        self.sock.sendall(self.encoder.message(message))

    def receive(self) -> Frame | None:
        """The next frame; None when the connection was closed."""
        frame = None
        while frame is None:
            received = self.sock.recv_into(self._decoder.next_buffer())
            if not received:
                return None
            frame = self._decoder.advance(received)
        return frame

    def message(self) -> messages.Message:
        """The next message that is neither PING nor PREPARED: both come whenever they come."""
        while True:
            frame = self.receive()
            assert frame is not None, "the peer closed the connection"
            message = frame.message()
            if not isinstance(message, messages.Ping | messages.Prepared):
                return message

    def closed(self) -> bool:
        """The other side closes, or resets, whatever it says before that."""
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 16):
                pass
        return True

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def raw_server(serve: Callable[[RawPeer], None]) -> Iterator[str]:
    """A destination that is not migd: one connection, served by ``serve``; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)

        def accept() -> None:
            sock, _ = listener.accept()
            with sock:
                serve(RawPeer(sock))

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(WAIT_S)
        assert not thread.is_alive()
