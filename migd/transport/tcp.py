"""The two ends of TCP: a listener that hands links over, and a connector that makes them."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from migd.errors import ConfigError, MigdError, PeerLost, ResourceError
from migd.limits import Limits
from migd.migration.bandwidth import Unlimited
from migd.migration.ports import Bandwidth, Clock
from migd.transport.channel import SocketChannel
from migd.transport.link import Dialogue, FrameLink
from migd.wire import messages
from migd.wire.framing import Frame, OtherFraming

log = logging.getLogger(__name__)

MAX_UNAUTHENTICATED = 8
"""Connections whose first frame has not come yet; one more is closed at once."""

_ACCEPT_PAUSE_S = 0.1


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` (``[::1]:7440`` for IPv6). ConfigError names what is wrong."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not _is_host(host) or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ConfigError(f"{text!r} is no HOST:PORT, like 127.0.0.1:7440 or [::1]:7440")
    return host, int(port)


def _is_host(text: str) -> bool:
    """Whether the resolver would take it at all: UnicodeError is what it raises otherwise."""
    try:
        return bool(text.encode("idna")) and text.isprintable() and not set(text) & set(" []")
    except UnicodeError:
        return False


def _reason(error: OSError) -> str:
    """In the kernel's words: asyncio's repeat the address. Errors of the resolver have numbers below 0."""
    number = error.errno or 0
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def refuse_open_plaintext(host: str, peer: str) -> None:
    """ConfigError unless ``host``, an IP address, is this very host."""
    if not ipaddress.ip_address(host).is_loopback:
        raise ConfigError(
            f"{peer} is another host, and guest memory would cross the network in plaintext, "
            "unauthenticated; set migration.insecure_plaintext = true to accept that"
        )


def refuse_open_listener(listen: str, *, insecure_plaintext: bool) -> None:
    """ConfigError for a HOST:PORT beyond loopback, unless plaintext is accepted: then a warning."""
    if insecure_plaintext:
        log.warning(
            "destination.insecure_plaintext is on: whoever reaches %s can read guest memory on its way and "
            "send guests here",
            listen,
        )
    elif not is_loopback(listen):
        raise ConfigError(
            f"destination.listen: {listen} can be reached from other hosts, and guest memory would "
            f"cross the network in plaintext, unauthenticated; set destination.insecure_plaintext = true to "
            f"accept that"
        )


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT leads to this host alone; a name that means nothing is the listener's to refuse."""
    try:
        found = socket.getaddrinfo(*parse_address(address), type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(ipaddress.ip_address(str(place[0])).is_loopback for *_, place in found)


class TcpConnector:
    """See ``migd.migration.ports.Connector``."""

    def __init__(
        self,
        address: str,
        clock: Clock,
        limits: Limits,
        *,
        insecure_plaintext: bool = False,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self.bandwidth = bandwidth or Unlimited()
        self._host, self._port = parse_address(address)
        self._clock = clock
        self._limits = limits
        self._insecure_plaintext = insecure_plaintext
        self.address = address

    async def connect(self) -> FrameLink:
        """PeerLost, naming address and cause, if nothing answers within ``connect_s``.

        ConfigError, before anything is sent, for an address beyond loopback without the operator's consent.
        """
        try:
            async with asyncio.timeout(self._limits.connect_s):
                sock = await self._first_that_answers()
        except TimeoutError as error:
            raise PeerLost(f"{self.address}: no connection within {self._limits.connect_s:g} s") from error
        except OSError as error:
            hint = "; is `migd destination` running there?" if error.errno == errno.ECONNREFUSED else ""
            raise PeerLost(f"{self.address}: {_reason(error)}{hint}") from error
        return FrameLink(SocketChannel(sock), self.bandwidth)

    async def _first_that_answers(self) -> socket.socket:
        """A name may have several addresses (``localhost``: IPv6 and IPv4) and a daemon listen on one."""
        loop = asyncio.get_running_loop()
        failure = OSError(errno.EADDRNOTAVAIL, "the name has no address")
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            if not self._insecure_plaintext:
                refuse_open_plaintext(str(address[0]), self.address)
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            try:
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise failure

    async def converse(self, migration: str) -> Dialogue:
        return Dialogue(await self.connect(), migration, self._clock, self._limits)


class Listener:
    """Accepts connections, reads their first frame, and runs ``serve(link, frame)`` as a task for each."""

    def __init__(
        self, address: str, serve: Callable[[FrameLink, Frame], Awaitable[None]], limits: Limits
    ) -> None:
        """Bound and listening, or ResourceError naming address and cause. ``serve`` must not raise."""
        self._serve = serve
        self._limits = limits
        self._unauthenticated = 0
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._sock = socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            hint = "; another program listens there" if error.errno == errno.EADDRINUSE else ""
            raise ResourceError(f"cannot listen on {address}: {_reason(error)}{hint}") from error
        self._sock.setblocking(False)
        host, port = self._sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"

    async def run(self) -> None:
        """Accept until cancelled; connections in service are cancelled, too."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        sock, _ = await loop.sock_accept(self._sock)
                    except OSError as error:  # EMFILE, ECONNABORTED: a later one may work
                        log.warning("accepting a connection failed: %s", error.strerror)
                        await asyncio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    if self._unauthenticated >= MAX_UNAUTHENTICATED:
                        sock.close()
                        await asyncio.sleep(0)  # a queue of connections is accepted without waiting once
                        continue
                    self._unauthenticated += 1  # here, not in the task: it may begin after the next accept
                    tasks.create_task(self._greet(FrameLink(SocketChannel(sock))))
        finally:
            self._sock.close()

    def close(self) -> None:
        """Stop listening, where ``run`` was never begun."""
        self._sock.close()

    async def _greet(self, link: FrameLink) -> None:
        try:
            frame = await self._first_frame(link)
            if frame is not None:
                await self._serve(link, frame)
        finally:
            link.close()

    async def _first_frame(self, link: FrameLink) -> Frame | None:
        try:
            async with asyncio.timeout(self._limits.hello_s):
                return await self._received(link)
        except OtherFraming as error:
            log.warning("a connection was refused: %s", error)
            return None
        except (TimeoutError, MigdError) as error:
            log.info("a connection ended before its first frame: %s", error or "too slow")
            return None
        finally:
            self._unauthenticated -= 1

    async def _received(self, link: FrameLink) -> Frame:
        try:
            return await link.receive()
        except OtherFraming as error:  # of our answer the peer can read just our framing version
            await link.send(messages.Refuse(migration=messages.NO_MIGRATION, reason=str(error)))
            raise
