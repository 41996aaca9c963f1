"""Asking a destination what it is, and how far its clock is from ours, by PROBE and ABOUT."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass

from migd.errors import PeerLost, ProtocolError, Refused
from migd.limits import Limits
from migd.migration.ports import Clock
from migd.transport.link import FrameLink
from migd.transport.tcp import TcpConnector
from migd.wire import handshake, messages
from migd.wire.messages import About

_QUESTIONS = 5
"""The fastest round trip of so many says most about the clocks: half of it is what is not known of them."""


@dataclass(frozen=True)
class Answer:
    """What a destination said, and what the time that it took tells."""

    about: About
    round_trip_s: float
    """From PROBE to ABOUT, over a connection that was there."""
    clock_offset_s: float
    """Its clock less ours, right to within half of the round trip."""


async def ask(address: str, clock: Clock, limits: Limits) -> Answer:
    """The best of a few answers of the destination at ``HOST:PORT``, each on a connection of its own.

    PeerError naming the cause if there is none, ConfigError for a bad address. Nothing of a guest is sent, so
    this goes beyond loopback without the consent that a migration needs.
    """
    connector = TcpConnector(address, clock, limits, insecure_plaintext=True)
    answers = []
    for _ in range(_QUESTIONS):
        link = await connector.connect()
        try:
            async with asyncio.timeout(limits.hello_s):
                answers.append(await _ask(link, address, clock))
        except TimeoutError as error:
            raise PeerLost(f"{address}: no ABOUT within {limits.hello_s:g} s") from error
        finally:
            link.close()
    return min(answers, key=lambda answer: answer.round_trip_s)


async def _ask(link: FrameLink, address: str, clock: Clock) -> Answer:
    question = handshake.probe(secrets.token_hex(16))
    sent_ns, sent_at = time.time_ns(), clock.now()
    await link.send(question)
    frame = await link.receive()
    round_trip_s = clock.now() - sent_at
    answer = frame.message()
    if isinstance(answer, messages.Refuse):
        raise Refused(f"{address} refused: {answer.reason}")
    if not isinstance(answer, About) or answer.migration != question.migration:
        raise ProtocolError(f"{address}: {frame.type.name} where ABOUT was due")
    offset_s = (answer.realtime_ns - sent_ns) / 1e9 - round_trip_s / 2
    return Answer(answer, round_trip_s, offset_s)
