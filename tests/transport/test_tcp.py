"""The two ends of TCP: addresses, who may connect, for how long, and errors that name the place."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from migd.errors import ConfigError, PeerLost, ResourceError
from migd.limits import Limits
from migd.transport.link import FrameLink
from migd.transport.tcp import MAX_UNAUTHENTICATED, Listener, TcpConnector, parse_address
from migd.wire import messages
from migd.wire.framing import Frame, FrameEncoder
from tests.transport.lines import ID, Clock, open_fds

READY = messages.Ready(migration=ID)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7440", "127.0.0.1", 7440),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("localhost:65535", "localhost", 65535),
        ("host-1.example.org:1", "host-1.example.org", 1),
        ("[::1]:7440", "::1", 7440),
        ("::1:7440", "::1", 7440),
        ("[fe80::1%eth0]:7440", "fe80::1%eth0", 7440),
        ("bücher.example:7440", "bücher.example", 7440),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "host", "host:", ":7440", "[]:7440", "host:port", "host:-1", "host:65536", "host:7 440",
        "host:0x10", "host:\u0667", "7440", "127.0.0.1:7440 ", " 127.0.0.1:7440", "a..b:7440", "a b:1",
        "x" * 64 + ".example:7440", "a\0b:7440", "a\nb:7440", "[[::1]]:7440",
    ],
)  # fmt: skip
def test_bad_addresses_name_what_is_right(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no HOST:PORT, like 127\.0\.0\.1:7440") as error:
        parse_address(text)
    assert repr(text) in str(error.value)


# -- TcpConnector ---------------------------------------------------------------------------------------


def connector(address: str, **limits: float) -> TcpConnector:
    return TcpConnector(address, Clock(), Limits(**limits))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


async def test_nobody_listens() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(PeerLost) as error:
        await connector(address).connect()
    assert str(error.value) == f"{address}: Connection refused; is `migd destination` running there?"


async def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(PeerLost, match=r"no-such-host\.invalid:7440: "):
        await connector("no-such-host.invalid:7440", connect_s=30).connect()


async def test_a_host_that_does_not_answer() -> None:
    """A full accept queue drops SYNs, as a firewall would."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        host, port = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex((host, port))
            before = open_fds()
            with pytest.raises(PeerLost, match=rf"127\.0\.0\.1:{port}: no connection within 0\.1 s"):
                await connector(f"{host}:{port}", connect_s=0.1).connect()
            assert open_fds() <= before
        finally:
            for sock in waiting:
                sock.close()


async def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` is ::1 first on many hosts, and the destination listens on 127.0.0.1."""
    loop = asyncio.get_running_loop()
    nobody = free_port()

    async with listening() as (listener, served):
        port = parse_address(listener.address)[1]

        async def found(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", nobody)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
            ]

        tcp = connector("two.example:1")
        monkeypatch.setattr("migd.transport.tcp.asyncio.get_running_loop", lambda: Resolving(loop, found))
        link = await tcp.connect()
        monkeypatch.undo()
        await link.send(READY)
        assert (await served.get()).message() == READY
        link.close()


class Resolving:
    """The running loop with an answer of its own for names: loopback has no name with two addresses."""

    def __init__(self, loop: asyncio.AbstractEventLoop, getaddrinfo: object) -> None:
        self._loop = loop
        self.getaddrinfo = getaddrinfo

    def __getattr__(self, name: str) -> object:
        return getattr(self._loop, name)


async def test_a_connector_makes_links_and_dialogues() -> None:
    async with listening() as (listener, served):
        tcp = connector(listener.address)
        assert tcp.address == listener.address
        link = await tcp.connect()
        await link.send(READY)
        dialogue = await tcp.converse(ID)
        await dialogue.send(READY)
        for _ in range(2):
            assert (await served.get()).message() == READY
        link.close()
        dialogue.close()


# -- Listener -------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(**limits: float) -> AsyncIterator[tuple[Listener, asyncio.Queue[Frame]]]:
    """A running listener, and the first frames of those it served (their links stay open until the end)."""
    served: asyncio.Queue[Frame] = asyncio.Queue()
    ending = asyncio.Event()

    async def serve(_link: FrameLink, frame: Frame) -> None:
        served.put_nowait(frame)
        await ending.wait()

    listener = Listener("127.0.0.1:0", serve, Limits(**limits))
    running = asyncio.create_task(listener.run())
    try:
        yield listener, served
    finally:
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled()


def dial(listener: Listener) -> socket.socket:
    sock = socket.create_connection(parse_address(listener.address))
    sock.setblocking(False)
    return sock


async def ended(sock: socket.socket) -> bool:
    """Waits until the other end has closed."""
    try:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 10) == b""
    except ConnectionResetError:
        return True


async def test_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        before = open_fds()
        with pytest.raises(ResourceError) as error:
            Listener(address, _never, Limits())
        assert str(error.value) == (
            f"cannot listen on {address}: Address already in use; another program listens there"
        )
        assert open_fds() == before


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.1:7440", "Cannot assign requested address"),
        ("no-such-host.invalid:7440", r"(Name or service not known|Temporary failure in name resolution)"),
    ],
)
async def test_an_address_that_is_not_ours(address: str, reason: str) -> None:
    with pytest.raises(ResourceError, match=f"cannot listen on {address}: {reason}"):
        Listener(address, _never, Limits())


async def _never(_link: FrameLink, _frame: Frame) -> None:
    raise AssertionError


async def test_ipv6() -> None:
    try:
        listener = Listener("[::1]:0", _never, Limits())
    except ResourceError:
        pytest.skip("no IPv6 here")
    assert listener.address.startswith("[::1]:")
    running = asyncio.create_task(listener.run())
    link = await connector(listener.address).connect()
    link.close()
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running})


async def test_a_first_frame_is_served_and_its_link_closed_behind_it() -> None:
    async def serve(link: FrameLink, frame: Frame) -> None:
        await link.send(frame.message())

    listener = Listener("127.0.0.1:0", serve, Limits())
    running = asyncio.create_task(listener.run())
    link = await connector(listener.address).connect()
    await link.send(READY)
    assert (await link.receive()).message() == READY
    with pytest.raises(PeerLost, match="closed the connection"):
        await link.receive()
    link.close()
    running.cancel()
    await asyncio.wait({running})


async def test_who_says_nothing_is_dropped_in_time() -> None:
    async with listening(hello_s=0.05) as (listener, served):
        silent, half = dial(listener), dial(listener)
        half.send(b"MIGD")
        assert await ended(silent)
        assert await ended(half)
        assert served.empty()
        link = await connector(listener.address).connect()
        await link.send(READY)
        await served.get()
        link.close()
        silent.close()
        half.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n" * 4, b"\x16\x03\x01" + bytes(60), bytes(48), b""])
async def test_who_speaks_another_protocol_is_dropped_and_others_are_served(data: bytes) -> None:
    async with listening() as (listener, served):
        sock = dial(listener)
        sock.send(data)
        sock.shutdown(socket.SHUT_WR)
        assert await ended(sock)
        sock.close()
        link = await connector(listener.address).connect()
        await link.send(READY)
        assert (await served.get()).message() == READY
        link.close()


async def test_only_so_many_may_be_silent_however_fast_they_come() -> None:
    """All wait in the backlog when the listener first looks: the limit must hold within one accept loop."""
    async with listening() as (listener, served):
        socks = [dial(listener) for _ in range(MAX_UNAUTHENTICATED + 6)]
        reading = [asyncio.create_task(ended(sock)) for sock in socks]
        for _ in range(6):
            await asyncio.wait(
                {one for one in reading if not one.done()}, return_when=asyncio.FIRST_COMPLETED
            )
            if sum(one.done() for one in reading) == 6:
                break
        open_ones = [sock for sock, one in zip(socks, reading, strict=True) if not one.done()]
        assert len(open_ones) == MAX_UNAUTHENTICATED
        for one in reading:
            one.cancel()
        await asyncio.wait(set(reading))
        # Once they have said who they are, they do not count any more.
        for sock in open_ones:
            sock.send(FrameEncoder().message(READY))
            assert (await served.get()).message() == READY
        link = await connector(listener.address).connect()
        await link.send(READY)
        assert (await served.get()).message() == READY
        link.close()
        for sock in socks:
            sock.close()


async def test_ending_the_listener_ends_its_connections() -> None:
    before = open_fds()
    async with listening() as (listener, served):
        sock, silent = dial(listener), dial(listener)
        sock.send(FrameEncoder().message(READY))
        await served.get()
    assert await ended(sock)
    assert await ended(silent)
    sock.close()
    silent.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert open_fds() <= before
