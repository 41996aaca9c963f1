"""PROBE and ABOUT: a destination is asked what it is, and its clock compared with ours."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from migd.errors import ConfigError, PeerError
from migd.host import MonotonicClock
from migd.limits import Limits
from migd.transport import probe
from migd.wire import handshake, messages
from migd.wire.protocol import SOFTWARE
from tests.support.pair import DaemonProcess
from tests.support.raw_peer import RawPeer

ABOUT = handshake.about(handshake.probe("0" * 32), realtime_ns=0, free_bytes=1, max_streams=16)
QUICK = Limits(connect_s=5, hello_s=0.5)


@contextlib.contextmanager
def destination(serve: Callable[[RawPeer], None]) -> Iterator[str]:
    """One that is not migd, for any number of connections, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    sock, _ = listener.accept()
                    with sock, contextlib.suppress(OSError):
                        serve(RawPeer(sock))

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def daemon() -> Iterator[DaemonProcess]:
    daemon = DaemonProcess("destination", '[destination]\nlisten = "127.0.0.1:0"\n')
    try:
        daemon.start()
        daemon.ready()
        yield daemon
    finally:
        daemon.close()


async def test_the_clock_of_the_same_host_is_found_to_be_the_same(daemon: DaemonProcess) -> None:
    answer = await probe.ask(daemon.address, MonotonicClock(), Limits())
    assert answer.about.software == SOFTWARE
    assert answer.round_trip_s > 0
    slack_s = 0.001  # the two clocks that are read are adjusted apart by that much at most
    assert abs(answer.clock_offset_s) <= answer.round_trip_s / 2 + slack_s


async def test_a_clock_that_is_an_hour_ahead_is_found_out() -> None:
    def serve(asked: RawPeer) -> None:
        question = asked.message()
        assert isinstance(question, messages.Probe)
        now_ns = time.time_ns()
        asked.send(handshake.about(question, now_ns + 3600 * 10**9, free_bytes=1, max_streams=1))

    with destination(serve) as address:
        answer = await probe.ask(address, MonotonicClock(), QUICK)
    assert abs(answer.clock_offset_s - 3600) <= answer.round_trip_s / 2 + 0.001


def _refuses(asked: RawPeer) -> None:
    asked.message()
    asked.send(messages.Refuse(migration="0" * 32, reason="not today"))


def _frames_otherwise(asked: RawPeer) -> None:
    asked.message()
    asked.sock.sendall(b"MIGD\x03" + bytes(43))


def _says_something_else(asked: RawPeer) -> None:
    asked.send(messages.Begin(migration=asked.message().migration))


def _answers_another_question(asked: RawPeer) -> None:
    asked.message()
    asked.send(ABOUT)


def _hangs_up(asked: RawPeer) -> None:
    asked.message()


def _says_nothing(asked: RawPeer) -> None:
    asked.closed()


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (_refuses, "refused: not today"),
        (_frames_otherwise, "the peer frames with version 3"),
        (_says_something_else, "BEGIN where ABOUT was due"),
        (_answers_another_question, "ABOUT where ABOUT was due"),
        (_hangs_up, "the peer closed the connection"),
        (_says_nothing, "no ABOUT within 0.5 s"),
    ],
)
async def test_what_is_no_answer(serve: Callable[[RawPeer], None], reason: str) -> None:
    with destination(serve) as address, pytest.raises(PeerError, match=reason):
        await probe.ask(address, MonotonicClock(), QUICK)


async def test_nobody_there() -> None:
    with pytest.raises(PeerError, match="Connection refused; is `migd destination` running there"):
        await probe.ask("127.0.0.1:1", MonotonicClock(), QUICK)
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        await probe.ask("nowhere", MonotonicClock(), QUICK)
