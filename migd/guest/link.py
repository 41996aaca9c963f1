"""GuestLink: the daemon's end of a guest's control connection; requests and answers meet by id."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

import msgspec

from migd.errors import GuestError
from migd.guest import control
from migd.guest.control import Checked, Failed, FromGuest, Prepared, ToGuest

M = TypeVar("M", bound=FromGuest)


class RequestRefused(GuestError):
    """The guest understood a request and cannot do it; the message has its reason."""

    def __init__(self, text: str, *, immovable: bool = False) -> None:
        super().__init__(text)
        self.immovable = immovable


class GuestLink:
    """One connected guest. Owns the socket until ``close``; ``gone`` is set when the guest closed its end."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[tuple[FromGuest, list[int]]]] = {}
        self.gone = asyncio.Event()
        self.prepared: asyncio.Future[Prepared] = self._loop.create_future()
        self.checked: asyncio.Future[Checked] = self._loop.create_future()
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        try:
            packet = control.receive_from_guest(self._sock)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, GuestError):
            packet = None
        if packet is None:
            self.close()
            return
        message, fds = packet
        if isinstance(message, Checked) and not self.checked.done():
            self.checked.set_result(message)
        elif isinstance(message, Prepared) and not self.prepared.done():
            self.prepared.set_result(message)
        elif isinstance(message, Failed) and not message.id and not self.prepared.done():
            self.prepared.set_exception(GuestError(f"guest {self._name}: {message.reason}"))
            self.prepared.exception()  # perhaps nobody waits for it
        waiting = self._waiting.pop(message.id, None)
        if waiting is None or waiting.done():
            control.close_all(fds)  # the answer to a request nobody waits for any more
        else:
            waiting.set_result((message, fds))

    @property
    def is_prepared(self) -> bool:
        """PREPARED has come."""
        prepared = self.prepared
        return prepared.done() and not prepared.cancelled() and prepared.exception() is None

    def tell(self, message: ToGuest, fds: list[int] | None = None) -> None:
        """Send without waiting for an answer. GuestError if the guest does not read or is gone."""
        if self.gone.is_set():
            raise GuestError(f"guest {self._name} is not connected")
        try:
            control.send(self._sock, message, fds)
        except BlockingIOError as error:
            raise GuestError(f"guest {self._name} does not read its control socket") from error
        except OSError as error:
            raise GuestError(f"guest {self._name}: {error.strerror}") from error

    async def ask(
        self, message: ToGuest, kind: type[M], timeout_s: float, fds: list[int] | None = None
    ) -> tuple[M, list[int]]:
        """Send a request; its answer and descriptors (now the caller's). GuestError in bounded time."""
        what = type(message).__name__.upper()
        request = msgspec.structs.replace(message, id=self._next_id)
        self._next_id += 1
        future: asyncio.Future[tuple[FromGuest, list[int]]] = self._loop.create_future()
        self._waiting[request.id] = future
        try:
            self.tell(request, fds)
            async with asyncio.timeout(timeout_s):
                answer, received = await future
        except TimeoutError as error:
            _close_unclaimed(future)
            raise GuestError(f"guest {self._name} did not answer {what} within {timeout_s:g} s") from error
        except asyncio.CancelledError:
            _close_unclaimed(future)
            raise
        finally:
            self._waiting.pop(request.id, None)
        if isinstance(answer, kind):
            return answer, received
        control.close_all(received)
        if isinstance(answer, Failed):
            reason = f"guest {self._name} refused {what}: {answer.reason}"
            raise RequestRefused(reason, immovable=answer.immovable)
        raise GuestError(f"guest {self._name} answered {what} with {type(answer).__name__}")

    async def order(
        self, message: ToGuest, kind: type[M], timeout_s: float, fds: list[int] | None = None
    ) -> M:
        """``ask`` for an answer that brings no descriptors; those it brings all the same are closed."""
        answer, unwanted = await self.ask(message, kind, timeout_s, fds)
        control.close_all(unwanted)
        return answer

    async def unasked(self, message: asyncio.Future[M], what: str) -> M:
        """What the guest says by itself, ``checked`` or ``prepared``. GuestError if it ends before."""
        try:
            return await asyncio.shield(message)
        except asyncio.CancelledError:
            if message.cancelled():
                raise GuestError(f"guest {self._name} ended before {what}") from None
            raise

    def close(self) -> None:
        """Give the connection up; whoever waits for an answer gets GuestError."""
        if self.gone.is_set():
            return
        self.gone.set()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(GuestError(f"guest {self._name} closed its control connection"))
        for unasked in (self.checked, self.prepared):
            if not unasked.done():
                unasked.cancel()


def _close_unclaimed(answer: asyncio.Future[tuple[FromGuest, list[int]]]) -> None:
    """An answer may arrive in the very iteration of the loop in which its request is given up."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        control.close_all(answer.result()[1])
