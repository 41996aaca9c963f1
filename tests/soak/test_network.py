"""The proxy: what it does to a connection, and only then."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.soak.network import Blow, Proxy, Stroke

WAIT_S = 10.0


class Echo:
    """Sends back whatever comes; remembers what came."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(4096):
                    sock.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    echo = Echo()
    proxy = Proxy(echo.address)
    yield proxy
    proxy.close()
    echo.close()


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    sock = socket.create_connection((host, int(port)), WAIT_S)
    assert exchange(sock, b"hello") == b"hello"
    return sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """What comes back of ``data``, up to the end of the connection; ConnectionError as it comes."""
    sock.sendall(data)
    back = b""
    while len(back) < len(data) and (part := sock.recv(4096)):
        back += part
    return back


def test_without_a_blow_everything_passes(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.weather.clear()
        proxy.weather.strike()
        assert exchange(sock, b"x" * 100_000) == b"x" * 100_000
    assert not proxy.weather.struck


def test_fin_at_a_byte(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.weather.clear(Blow(Stroke.FIN, at_byte=10))
        assert exchange(sock, b"0123456") == b"0123456"
        assert len(exchange(sock, b"789abcd")) <= 3  # the echo of the last three may be cut off, too
    assert proxy.weather.struck


def test_rst_at_a_byte_of_the_way_back(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.weather.clear(Blow(Stroke.RST, at_byte=3, backwards=True))
        with pytest.raises(ConnectionError):  # noqa: PT012  # the reset may come with either
            exchange(sock, b"0123456")
            exchange(sock, b"0123456")
    assert proxy.weather.struck


def test_flip_of_one_bit(proxy: Proxy) -> None:
    with connect(proxy) as sock:
        proxy.weather.clear(Blow(Stroke.FLIP, at_byte=9))
        assert exchange(sock, bytes(8)) == bytes(8)
        assert exchange(sock, bytes(8)) == bytes([0, 2, 0, 0, 0, 0, 0, 0])
        assert exchange(sock, bytes(8)) == bytes(8)


@pytest.mark.parametrize("everywhere", [True, False])
def test_one_connection_or_all(proxy: Proxy, everywhere: bool) -> None:
    with connect(proxy) as hit, connect(proxy) as other:
        proxy.weather.clear(Blow(Stroke.FIN, at_byte=0, everywhere=everywhere))
        assert exchange(hit, b"0123") == b""
        if everywhere:
            assert other.recv(1) == b""
        else:
            assert exchange(other, b"0123") == b"0123"


def test_a_black_hole_swallows_until_it_is_lifted(proxy: Proxy) -> None:
    with connect(proxy) as sock, connect(proxy) as other:
        proxy.weather.clear(Blow(Stroke.BLACKHOLE))
        proxy.weather.strike()
        for swallowed in (sock, other):
            swallowed.sendall(b"0123")
            swallowed.settimeout(0.1)
            with pytest.raises(TimeoutError):
                swallowed.recv(1)
            swallowed.settimeout(WAIT_S)
        proxy.weather.clear()
        with pytest.raises(ConnectionError):
            sock.recv(1)
    with connect(proxy) as later:
        assert exchange(later, b"0123") == b"0123"
